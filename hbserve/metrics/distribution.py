"""Containers of samples: a snapshot, a sliding window, sums over a window, and a histogram since the start."""

from __future__ import annotations

import bisect
import itertools
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


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
        """Make one of (value, weight) pairs in any order."""
        ordered = sorted(samples)
        return Distribution(tuple(value for value, _ in ordered), tuple(weight for _, weight in ordered))

    @staticmethod
    def merged(parts: Iterable[Distribution]) -> Distribution:
        """Put the samples of several together."""
        pairs = (zip(part.values, part.weights, strict=True) for part in parts)
        return Distribution.of(itertools.chain.from_iterable(pairs))

    def thinned(self, max_values: int) -> Distribution:
        """Reduce to at most ``max_values`` values: neighbours become their mean, with their weights added up."""
        if len(self.values) <= max_values:
            return self
        bounds = [len(self.values) * index // max_values for index in range(max_values + 1)]
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
        """Number of samples: the sum of the weights."""
        return sum(self.weights)

    @property
    def mean(self) -> float:
        """Mean of the samples; 0 if there are none."""
        total = sum(value * weight for value, weight in zip(self.values, self.weights, strict=True))
        return total / self.count if self.weights else 0.0

    def percentile(self, percent: float) -> float:
        """Nearest rank: the smallest sample that at least ``percent`` (0 to 100) of all do not exceed; 0 if none."""
        if not self.values:
            return 0.0
        cumulated = list(itertools.accumulate(self.weights))
        rank = max(1, math.ceil(round(percent / 100 * cumulated[-1], 9)))
        return self.values[bisect.bisect_left(cumulated, rank)]


class SlidingWindow:
    """The latest ``max_samples`` samples, with their times on ``clock`` (seconds, monotonic)."""

    def __init__(self, max_samples: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, float, int]] = deque(maxlen=max_samples)

    def add(self, value: float, weight: int = 1) -> None:
        """Add a sample with the present time, seen ``weight`` times."""
        self._samples.append((self._clock(), value, weight))

    def since(self, start: float) -> Distribution:
        """Return the samples from the time ``start`` on."""
        # list() copies in one step: another thread may add samples meanwhile.
        latest = itertools.takewhile(lambda sample: sample[0] >= start, reversed(list(self._samples)))
        return Distribution.of((value, weight) for _, value, weight in latest)

    def clear(self) -> None:
        """Forget all samples."""
        self._samples.clear()


class CountWindow:
    """Sums of named quantities over a sliding window of ``seconds``.

    The window is kept in slices, so that memory does not grow with the number of events.
    """

    NUM_SLICES = 60

    def __init__(self, seconds: float) -> None:
        self._slice_s = seconds / self.NUM_SLICES
        self._slices: deque[tuple[int, defaultdict[str, float]]] = deque(maxlen=self.NUM_SLICES + 2)

    def start_of(self, now: float, seconds: float | None = None) -> float:
        """Return the start of the window that ends now: a border of a slice, so that its sums are exact.

        Args:
            seconds: length of a shorter window; rounded to whole slices.
        """
        return self._oldest(now, seconds) * self._slice_s

    def at(self, now: float) -> defaultdict[str, float]:
        """Return the sums of the present slice, to add to."""
        index = math.floor(now / self._slice_s)
        if not self._slices or self._slices[-1][0] != index:
            self._slices.append((index, defaultdict(float)))
        return self._slices[-1][1]

    def totals(self, now: float, seconds: float | None = None) -> defaultdict[str, float]:
        """Return the sums of the window that ends now; ``seconds`` as in `start_of`."""
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


class Histogram:
    """Numbers of samples by size, since the start: one bucket per bound of Prometheus.

    Args:
        bounds: upper bounds, ascending; one more bucket holds the samples above the last.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Add a sample, seen ``count`` times."""
        self.counts[bisect.bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def as_dict(self) -> dict[str, Any]:
        """Return ``bounds``, ``counts`` (per bucket, not cumulated; one more than bounds) and ``sum``."""
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.sum}
