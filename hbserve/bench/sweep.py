"""The search for the highest rate that keeps the targets; such a rate is called good."""

from __future__ import annotations

import math
from collections.abc import Iterable


class RateSearch:
    """A search that multiplies or divides the rate until one is good and one is not, then bisects between them.

    Args:
        first: first rate.
        precision: the search ends when the lowest bad rate is at most this share above the best good one.
        factor: factor between rates before there is one of each kind.
        max_runs: the search ends after so many rates in any case.

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
        """Return the rate to try now; None if the search has ended."""
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
        """Note whether a rate was good. A good rate above a bad one is noise and does not count.

        Args:
            is_far: the limit is far away; the next step is twice as long while there is not one rate of each kind.
        """
        self._num_runs += 1
        self._is_far = is_far
        if good:
            self.best = max(self.best, min(rate, self.worst))
        else:
            self.worst = min(self.worst, rate)
            self.best = min(self.best, rate)


class GivenRates(RateSearch):
    """A list of rates in place of a search."""

    def __init__(self, rates: Iterable[float]) -> None:
        self._rates = list(rates)
        super().__init__(self._rates[0], 0.0)

    def next_rate(self) -> float | None:
        """See `RateSearch.next_rate`."""
        return self._rates[self._num_runs] if self._num_runs < len(self._rates) else None


def interpolated_rate(runs: Iterable[tuple[float, float]], attainment: float) -> float | None:
    """Interpolate where attainment falls below a limit; None without a run on either side of it.

    Args:
        runs: rates, and the attainment reached at them.
        attainment: the limit.
    """
    ordered = sorted(runs)
    bad = next((index for index, (_, reached) in enumerate(ordered) if reached < attainment), None)
    if not bad:
        return None
    (low, above), (high, below) = ordered[bad - 1], ordered[bad]
    share = (above - attainment) / (above - below)
    return float(low * (high / low) ** share)
