"""From windows to a steady picture of the load that still notices when it turns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hbserve.semi_pd.latency_model import Workload

_MEMORY_S = 20.0  # a window counts 1/e of its weight after so long
_TURN_DEVIATIONS = 3.0  # of a count that a steady load would explain


@dataclass(slots=True)
class _Totals:
    """Weighted sums over windows."""

    seconds: float = 0.0
    requests: float = 0.0
    prompt: float = 0.0
    prompt_squared: float = 0.0
    context: float = 0.0
    output: float = 0.0
    output_weight: float = 0.0


class WorkloadEstimator:
    """Means over the last seconds; forgets them at once where the load has turned.

    A window is a turn where its number of requests, or of prompt tokens, is further from the mean
    than chance explains. The state of the moment (backlog, running, spread) is passed on as it is.
    """

    def __init__(self) -> None:
        self._totals = _Totals()
        self._last_end: float | None = None
        self.num_turns = 0
        """How often the load has turned."""

    def update(self, now: Workload, start: float, end: float) -> Workload:
        """The picture after a window from ``start`` to ``end``; overlapping windows count their new part."""
        seconds = end - start if self._last_end is None else min(end - start, end - self._last_end)
        if seconds <= 0:
            return self._estimate(now)
        self._last_end = end
        if self._turned(now, end - start):
            self.num_turns += 1
            self._totals = _Totals()
            seconds = end - start
        totals, keep = self._totals, math.exp(-seconds / _MEMORY_S)
        requests = now.arrival_rate * seconds
        for name, amount in (
            ("seconds", seconds),
            ("requests", requests),
            ("prompt", requests * now.prompt_tokens),
            ("prompt_squared", requests * now.prompt_tokens_squared),
            ("context", requests * now.context_tokens),
            ("output", requests * now.output_tokens if now.output_tokens else 0.0),
            ("output_weight", requests if now.output_tokens else 0.0),
        ):
            setattr(totals, name, keep * getattr(totals, name) + amount)
        return self._estimate(now)

    def _turned(self, now: Workload, seconds: float) -> bool:
        totals = self._totals
        if totals.seconds < 2 * seconds or totals.requests < 1:
            return False
        seen = now.arrival_rate * seconds
        expected = totals.requests / totals.seconds * seconds
        if abs(seen - expected) > _TURN_DEVIATIONS * math.sqrt(expected) + 1:
            return True
        if seen < 3:
            return False
        mean = totals.prompt / totals.requests
        deviation = math.sqrt(max(0.0, totals.prompt_squared / totals.requests - mean**2) / seen)
        return abs(now.prompt_tokens - mean) > _TURN_DEVIATIONS * deviation + 0.1 * mean

    def _estimate(self, now: Workload) -> Workload:
        totals = self._totals
        if totals.requests <= 0 or totals.seconds <= 0:
            return now
        return replace(
            now,
            arrival_rate=totals.requests / totals.seconds,
            prompt_tokens=totals.prompt / totals.requests,
            prompt_tokens_squared=totals.prompt_squared / totals.requests,
            context_tokens=totals.context / totals.requests,
            output_tokens=totals.output / totals.output_weight if totals.output_weight else now.output_tokens,
        )
