"""Points of a profile that are learnt while a system serves: from its own steps, and from probes while it is idle.

Steps of about one size share a *bin*. A bin counts with the median of its steps' times, and only when it has several:
the first steps of a size may compile kernels, and a process may be stopped during a step. The number of bins is
bounded, and so is the number of times in each.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from hbserve.policy.probe_step import ProbeSize
from hbserve.policy.step_profile import FORMAT, StepPoint, StepProfile
from hbserve.policy.step_time_predictor import StepWork

SOURCE = "learnt while serving"
"""What a learnt profile says of its numbers."""
_NUM_NEEDED = 3
"""Steps after which a bin counts."""
_NUM_KEPT = 5
_MAX_BINS = 160
_SIZES_PER_OCTAVE, _CONTEXTS_PER_OCTAVE = 2, 1
_MIN_POINTS, _MIN_RANGE = 3, 4.0
"""Sizes that prompts and decode batches must have each, and the largest over the smallest of them."""
_DECODE_ROWS = (1, 4, 16, 64, 128)
_DECODE_CONTEXTS = (512, 4096)
_PROMPTS = ((64, 0), (256, 0), (512, 0), (256, 2048), (1024, 0), (512, 8192), (2048, 0))
_MIXED = ((256, 4, 512), (256, 16, 512), (512, 64, 512))


class ProbeLimits(NamedTuple):
    """The largest step that an instance takes: tokens and rows of a step, and tokens of a sequence."""

    max_tokens: int
    max_rows: int
    max_context: int


class _Bin:
    def __init__(self) -> None:
        self.times: deque[tuple[float, ProbeSize]] = deque(maxlen=_NUM_KEPT)

    @property
    def counts(self) -> bool:
        return len(self.times) >= _NUM_NEEDED

    @property
    def point(self) -> StepPoint:
        seconds, size = sorted(self.times)[len(self.times) // 2]
        return StepPoint(percentage=100, **size._asdict(), ms=1000 * seconds)


class LearntPoints:
    """The bins of steps at the whole device, and which probes are still of use."""

    def __init__(self) -> None:
        self._bins: dict[tuple[int, ...], _Bin] = {}
        self._too_large: set[ProbeSize] = set()
        self._slow: set[ProbeSize] = set()

    def observe(self, work: StepWork, seconds: float) -> None:
        """Note how long a step took. Steps with several short prompts have no place in a profile, and are left out."""
        size = _size_of(work)
        if size is None or work.is_shared or not 0 < seconds < math.inf:
            return
        key = _key(size)
        found = self._bins.get(key)
        if found is None:
            if len(self._bins) >= _MAX_BINS:
                return
            found = self._bins[key] = _Bin()
        found.times.append((seconds, size))

    def next_probe(
        self, limits: ProbeLimits, estimate_s: Callable[[StepWork], float], max_s: float
    ) -> ProbeSize | None:
        """Return a size that has not been seen often enough; None: there is none left.

        Each size is seen once before any is seen again, so that a disturbance of seconds spoils no size. They
        go from small to large, so that each is predicted from smaller ones.

        Args:
            estimate_s: predicts a step; 0: it knows nothing.
            max_s: steps that are predicted to take longer are left to the requests.
        """
        wanted: tuple[int, ProbeSize] | None = None
        for size in _probes():
            if size in self._too_large or not _fits(size, limits):
                continue
            if any(size != slow and _covers(size, slow) for slow in self._slow):
                continue
            found = self._bins.get(_key(size))
            num_seen = (0 if found is None else len(found.times)) + (size in self._slow)
            if num_seen >= _NUM_NEEDED or (wanted is not None and num_seen >= wanted[0]):
                continue
            if estimate_s(size.work) > max_s or (found is None and len(self._bins) >= _MAX_BINS):
                self._too_large.add(size)
            else:
                wanted = num_seen, size
        return None if wanted is None else wanted[1]

    def on_probed(self, size: ProbeSize, seconds: float, max_s: float) -> None:
        """Note how long a step of a probe took.

        One that took longer than ``max_s`` is no point. Its size is tried once more, because something may have been in
        its way, and larger ones wait for that. If it is as slow again, neither is tried any more.
        """
        if seconds <= max_s:
            self._slow.discard(size)
            self.observe(size.work, seconds)
        elif size in self._slow:
            self._too_large |= {other for other in _probes() if _covers(other, size)}
        else:
            self._slow.add(size)

    @property
    def num_points(self) -> int:
        """Points that a profile would have now."""
        return sum(found.counts for found in self._bins.values())

    @property
    def is_enough(self) -> bool:
        """Whether curves through the points say how time grows: prompts and decode batches of several sizes."""
        points = [found.point for found in self._bins.values() if found.counts]
        prompts = {point.prompt_tokens for point in points if not point.decode_rows}
        batches = {point.decode_rows for point in points if not point.prompt_tokens}
        return all(len(sizes) >= _MIN_POINTS and max(sizes) >= _MIN_RANGE * min(sizes) for sizes in (prompts, batches))

    def profile(self, model: str, device: str) -> StepProfile:
        """Return the points as a profile; there must be enough of them."""
        points = sorted(
            (found.point for found in self._bins.values() if found.counts),
            key=lambda p: (bool(p.decode_rows), bool(p.prompt_tokens), p.prompt_tokens, p.decode_rows, p.ms),
        )
        return StepProfile(format=FORMAT, model=model, device=device, source=SOURCE, steps=tuple(points))


def _size_of(work: StepWork) -> ProbeSize | None:
    """Return the size with one prompt and equal contexts that is as much work; None: there is none."""
    rows, keys, tokens, pairs, _ = work
    context = pairs / tokens - tokens / 2 if tokens else 0.0
    if context < -0.5 or not (rows or tokens):
        return None
    decode_context = round(keys / rows) + 1 if rows else 0
    return ProbeSize(round(tokens), max(0, round(context)), round(rows), decode_context)


def _key(size: ProbeSize) -> tuple[int, ...]:
    tokens, context, rows, decode_context = size
    sizes = (round(_SIZES_PER_OCTAVE * math.log2(number + 1)) for number in (tokens, rows))
    # A context counts from the length on at which its attention is a part of the time that can be seen.
    contexts = (round(_CONTEXTS_PER_OCTAVE * math.log2(number + 256)) for number in (context, decode_context))
    return (*sizes, *contexts)


def _probes() -> Iterator[ProbeSize]:
    for context in _DECODE_CONTEXTS:
        for rows in _DECODE_ROWS:
            yield ProbeSize(decode_rows=rows, decode_context=context)
    for tokens, context in _PROMPTS:
        yield ProbeSize(tokens, context)
    for tokens, rows, context in _MIXED:
        yield ProbeSize(tokens, 0, rows, context)


def _covers(size: ProbeSize, other: ProbeSize) -> bool:
    """Whether a size is at least as large as another one in every number."""
    return all(a >= b for a, b in zip(size, other, strict=True))


def _fits(size: ProbeSize, limits: ProbeLimits) -> bool:
    num_tokens = size.prompt_tokens + size.decode_rows
    num_rows = size.decode_rows + bool(size.prompt_tokens)
    longest = max(size.prompt_tokens + size.prompt_context, size.decode_context)
    return num_tokens <= limits.max_tokens and num_rows <= limits.max_rows and longest < limits.max_context
