"""Search for the highest rate that is still good."""

from __future__ import annotations

import math
from collections.abc import Iterable


class RateSearch:
    """Multiplies or divides until one rate is good and one is not, then bisects between them.

    Args:
        first: the rate to begin with.
        precision: ends when the lowest bad rate is at most this share above the best good one.
        factor: between rates before there is one of each kind.
        max_runs: it ends after so many in any case.

    Attributes:
        best: highest good rate; 0 before there is one.
        worst: lowest bad rate; infinite before there is one.
    """

    MAX_RUNS = 30

    def __init__(self, first: float, precision: float, factor: float = 2.0, max_runs: int = MAX_RUNS) -> None:
        self.best, self.worst = 0.0, math.inf
        self._first, self._precision, self._factor, self._max_runs = first, precision, factor, max_runs
        self._num_runs = 0
        self._is_far = False

    def next_rate(self) -> float | None:
        """What to try now; None if it is known well enough."""
        if self._num_runs >= self._max_runs:
            return None
        if self._num_runs == 0:
            return self._first
        factor = self._factor**2 if self._is_far else self._factor
        if self.best == 0:
            return self.worst / factor
        if math.isinf(self.worst):
            return self.best * factor
        if self.worst <= self.best * (1 + self._precision):
            return None
        return math.sqrt(self.best * self.worst)

    def add(self, rate: float, good: bool, is_far: bool = False) -> None:
        """What came of a rate. Noise may contradict itself: a good rate above a bad one is not believed.

        Args:
            is_far: the limit is not near: the next step is twice as long, while there is not one of each kind.
        """
        self._num_runs += 1
        self._is_far = is_far
        if good:
            self.best = max(self.best, min(rate, self.worst))
        else:
            self.worst = min(self.worst, rate)
            self.best = min(self.best, rate)


class GivenRates(RateSearch):
    """No search: these rates, one after the other."""

    def __init__(self, rates: Iterable[float]) -> None:
        self._rates = list(rates)
        super().__init__(self._rates[0], 0.0)

    def next_rate(self) -> float | None:
        """See `RateSearch.next_rate`."""
        return self._rates[self._num_runs] if self._num_runs < len(self._rates) else None


def interpolated_rate(runs: Iterable[tuple[float, float]], attainment: float) -> float | None:
    """Where attainment falls below what is asked for, between the two runs around it; None if not both are there.

    Args:
        runs: rates and what was attained at them.
    """
    ordered = sorted(runs)
    bad = next((index for index, (_, reached) in enumerate(ordered) if reached < attainment), None)
    if not bad:
        return None
    (low, above), (high, below) = ordered[bad - 1], ordered[bad]
    share = (above - attainment) / (above - below)
    return float(low * (high / low) ** share)
