"""When requests come."""

from __future__ import annotations

import numpy as np


def draw_arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Times of a renewal process, seconds from its start, ascending.

    The gaps are gamma distributed with mean ``1 / rate`` and a coefficient of variation of
    ``sqrt(burstiness)``: 1 is a Poisson process, 0 is even spacing, more is burstier.

    Args:
        rate: requests per second.
        burstiness: the gaps' variance over their squared mean.
    """
    if burstiness == 0:
        return [index / rate for index in range(count)]
    gaps = np.random.default_rng([seed, 1]).gamma(1 / burstiness, burstiness / rate, size=count)
    times: list[float] = np.cumsum(gaps).tolist()
    return times
