"""Counts by size, for ever: what Prometheus scrapes."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_S = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
E2E_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)
LENGTHS = tuple(float(1 << exponent) for exponent in range(18))
BATCHES = tuple(float(1 << exponent) for exponent in range(11))


class Histogram:
    """How many samples were at most as large as each bound.

    Args:
        bounds: upper bounds, ascending; one more bucket holds what is above the last.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """A sample, seen ``count`` times."""
        self.counts[bisect.bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def as_dict(self) -> dict[str, Any]:
        """``bounds``, ``counts`` (per bucket, not cumulated; one more than bounds) and ``sum``."""
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.sum}
