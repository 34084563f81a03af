"""The order in which step sizes get CUDA graphs: a few before the first step, the others later. Pure.

A step takes the smallest captured size that holds it, so with few graphs it computes more padding:

    sizes     1  2  4  8  16  24  32  ...  64  80  ...  256
    at first  1        8                   64           256     each at least 8 times the one before, and the largest
    later           by need, or from the smallest on while the worker has nothing to do

The largest is captured first, because all others fit into its memory: a later capture takes little more.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable

_FIRST_RATIO = 8
"""Decode steps of a few rows and of 8 times as many take nearly the same time: both wait for the weights."""
DUE_STEPS = 32
"""Steps that a missing size would have suited, before it is captured beside or between steps of requests."""


class GraphSizes:
    """The sizes of one kind of step.

    Args:
        sizes: to capture in the end, ascending.
        defers: capture only some of them at first.

    Attributes:
        first: sizes to capture before the first step, largest first.
        missing: sizes without a graph, ascending.
    """

    def __init__(self, sizes: list[int], defers: bool) -> None:
        self._sizes, self.missing = sizes, list(sizes)
        self._captured: list[int] = []
        self._misses: Counter[int] = Counter()  # steps of a size that is missing
        self.first = first_sizes(sizes) if defers else sizes[::-1]

    @property
    def max(self) -> int:
        """The largest size; 0: there is none."""
        return self._sizes[-1] if self._sizes else 0

    @property
    def min_captured(self) -> int:
        """The smallest size with a graph."""
        return self._captured[0]

    def add(self, size: int) -> None:
        """Note that a size has been captured."""
        insort(self._captured, size)
        self.missing.remove(size)
        self._misses.pop(size, None)

    def best(self, count: int) -> int:
        """Return the size that suits a step of ``count`` rows or tokens, at most `max`; it may be missing."""
        return self._sizes[bisect_left(self._sizes, count)]

    def choose(self, count: int) -> int:
        """Return the captured size for a step of ``count`` rows or tokens, and note what it misses."""
        best = self.best(count)
        size = self._captured[bisect_left(self._captured, count)]
        if size != best:
            self._misses[best] += 1
        return size

    def next(self) -> tuple[int, int] | None:
        """Return the missing size that most steps would have used, else the smallest, and their number; None: none."""
        if not self.missing:
            return None
        return self._misses.most_common(1)[0] if self._misses else (self.missing[0], 0)

    def give_up(self) -> None:
        """Do without the missing sizes."""
        self._sizes = list(self._captured)
        self.missing.clear()
        self._misses.clear()


class DelayLimit:
    """Bounds what captures between steps cost a request: each waits for at most one.

    Captures while no step is under way delay no request, and are not counted.
    """

    def __init__(self) -> None:
        self._delayed: set[int] = set()  # slots of sequences that have waited

    def on_installed(self, slots: Iterable[int]) -> None:
        """Note that slots have new sequences."""
        self._delayed.difference_update(slots)

    def allows(self, misses: int, slots: Iterable[int]) -> bool:
        """Whether a size that so many steps have missed may be captured before a step of the sequences in ``slots``."""
        return misses >= DUE_STEPS and self._delayed.isdisjoint(slots)

    def on_captured(self, slots: Iterable[int]) -> None:
        """Note that the sequences in ``slots`` have waited for a capture."""
        self._delayed.update(slots)


def first_sizes(sizes: list[int]) -> list[int]:
    """Return the sizes to capture before the first step, largest first: few, and one of them holds any step."""
    first: list[int] = []
    for size in sizes:
        if not first or size >= _FIRST_RATIO * first[-1] or size == sizes[-1]:
            first.append(size)
    return first[::-1]


def captured_batch_sizes(max_rows: int) -> list[int]:
    """Return the batch sizes to capture, up to ``max_rows``: dense where padding would cost most."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_rows + 32, 32)]
    return [*(size for size in sizes if size < max_rows), max_rows]


def draft_batch_sizes(max_rows: int) -> list[int]:
    """Return the batch sizes to capture for a draft model: its steps are short, and all are captured at the start."""
    sizes = [1 << power for power in range(max_rows.bit_length())]
    return [*(size for size in sizes if size < max_rows), max_rows]
