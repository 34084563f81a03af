"""Search for the highest rate that is still good."""

from __future__ import annotations

import math


class RateSearch:
    """Doubles or halves until one rate is good and one is not, then bisects between them.

    Args:
        first: the rate to begin with.
        precision: ends when the lowest bad rate is at most this share above the best good one.

    Attributes:
        best: highest good rate; 0 before there is one.
        worst: lowest bad rate; infinite before there is one.
    """

    MAX_RUNS = 30

    def __init__(self, first: float, precision: float) -> None:
        self.best, self.worst = 0.0, math.inf
        self._first, self._precision = first, precision
        self._num_runs = 0

    def next_rate(self) -> float | None:
        """What to try now; None if it is known well enough."""
        if self._num_runs >= self.MAX_RUNS:
            return None
        if self._num_runs == 0:
            return self._first
        if self.best == 0:
            return self.worst / 2
        if math.isinf(self.worst):
            return self.best * 2
        if self.worst <= self.best * (1 + self._precision):
            return None
        return math.sqrt(self.best * self.worst)

    def add(self, rate: float, good: bool) -> None:
        """What came of a rate. Noise may contradict itself: a good rate above a bad one is not believed."""
        self._num_runs += 1
        if good:
            self.best = max(self.best, min(rate, self.worst))
        else:
            self.worst = min(self.worst, rate)
            self.best = min(self.best, rate)
