"""Samples of one quantity: a snapshot of them, and the sliding window that it is taken from."""

from __future__ import annotations

import bisect
import itertools
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Distribution:
    """Weighted samples, in order of size.

    Attributes:
        values: ascending.
        weights: how many times each value was seen.
    """

    values: tuple[float, ...] = ()
    weights: tuple[int, ...] = ()

    @staticmethod
    def of(samples: Iterable[tuple[float, int]]) -> Distribution:
        """Of (value, weight) pairs in any order."""
        ordered = sorted(samples)
        return Distribution(tuple(value for value, _ in ordered), tuple(weight for _, weight in ordered))

    @staticmethod
    def merged(parts: Iterable[Distribution]) -> Distribution:
        """All samples of several."""
        return Distribution.of(
            itertools.chain.from_iterable(zip(part.values, part.weights, strict=True) for part in parts)
        )

    def thinned(self, most: int) -> Distribution:
        """Of no more than so many values: neighbours become their mean, with their weights added up."""
        if len(self.values) <= most:
            return self
        bounds = [len(self.values) * index // most for index in range(most + 1)]
        values, weights = [], []
        for begin, end in itertools.pairwise(bounds):
            weight = sum(self.weights[begin:end])
            pairs = zip(self.values[begin:end], self.weights[begin:end], strict=True)
            mean = sum(value * count for value, count in pairs) / weight
            values.append(min(max(mean, self.values[begin]), self.values[end - 1]))  # rounding must not disorder them
            weights.append(weight)
        return Distribution(tuple(values), tuple(weights))

    @property
    def count(self) -> int:
        """Samples in all, by weight."""
        return sum(self.weights)

    @property
    def mean(self) -> float:
        """0 where there are none."""
        total = sum(value * weight for value, weight in zip(self.values, self.weights, strict=True))
        return total / self.count if self.weights else 0.0

    def percentile(self, percent: float) -> float:
        """The smallest sample that at least ``percent`` of them do not exceed (nearest rank); 0 where there are none.

        Args:
            percent: in [0, 100].
        """
        if not self.values:
            return 0.0
        cumulated = list(itertools.accumulate(self.weights))
        rank = max(1, math.ceil(round(percent / 100 * cumulated[-1], 9)))
        return self.values[bisect.bisect_left(cumulated, rank)]


class SlidingWindow:
    """The latest samples, with their times.

    Args:
        max_samples: how many stay at most.
        clock: seconds, never running back.
    """

    def __init__(self, max_samples: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, float, int]] = deque(maxlen=max_samples)

    def add(self, value: float, weight: int = 1) -> None:
        """A sample of now, seen ``weight`` times."""
        self._samples.append((self._clock(), value, weight))

    def since(self, start: float) -> Distribution:
        """The samples from ``start`` on."""
        # A copy, in one go: another thread may add samples meanwhile.
        latest = itertools.takewhile(lambda sample: sample[0] >= start, reversed(list(self._samples)))
        return Distribution.of((value, weight) for _, value, weight in latest)

    def clear(self) -> None:
        """Forget all samples."""
        self._samples.clear()


class CountWindow:
    """Sums of named quantities over a sliding window, in slices of it: memory does not grow with their number.

    Args:
        seconds: what `start_of` and `totals` look back, at most.
    """

    NUM_SLICES = 60

    def __init__(self, seconds: float) -> None:
        self._slice_s = seconds / self.NUM_SLICES
        self._slices: deque[tuple[int, defaultdict[str, float]]] = deque(maxlen=self.NUM_SLICES + 2)

    def start_of(self, now: float, seconds: float | None = None) -> float:
        """Where the window that ends now begins: at a slice's border, so that sums over it are exact.

        Args:
            seconds: a shorter window; to the whole slice.
        """
        return self._oldest(now, seconds) * self._slice_s

    def at(self, now: float) -> defaultdict[str, float]:
        """The sums of the slice that ``now`` is in, to add to."""
        index = math.floor(now / self._slice_s)
        if not self._slices or self._slices[-1][0] != index:
            self._slices.append((index, defaultdict(float)))
        return self._slices[-1][1]

    def totals(self, now: float, seconds: float | None = None) -> defaultdict[str, float]:
        """The sums of the window that ends now; ``seconds`` as in `start_of`."""
        oldest = self._oldest(now, seconds)
        totals: defaultdict[str, float] = defaultdict(float)
        for index, sums in list(self._slices):
            if index >= oldest:
                for name, value in list(sums.items()):
                    totals[name] += value
        return totals

    def _oldest(self, now: float, seconds: float | None) -> int:
        num_slices = self.NUM_SLICES
        if seconds is not None:
            num_slices = min(num_slices, max(1, round(seconds / self._slice_s)))
        return math.floor(now / self._slice_s + 1e-9) - num_slices
