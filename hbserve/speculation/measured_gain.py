"""What drafts gain in the time that passes, by measurement: they are stopped where they lose.

`hbserve.speculation.choice` predicts what drafts bring, from the device's step times and from how often guesses were
right. Predictions miss what they do not know: the host's time, kernels that change with the number of rows, guesses
that look better than they are. So a worker's meter compares the time between two results with the time in which the
same tokens would have come without drafts::

    plain steps, now and then   ─►  T(N): time from result to result, with N sequences and no look at any guess
    steps with drafts           ─►  n tokens in t seconds, which would have taken n / N · T(N)

    gain    what was measured lately, and `kept`: as a part of what was promised. Drafts are tried while the gain is
            enough, or a promise that counts for that part is
    debt    time lost by drafts; it is paid back by 1 % of all time. With too much of it no guess is looked at until it
            is paid. What was lost between two measurements of T(N) is computed with their mean: a host gets slower and
            faster

So drafts cost about 1 % of the time and `_MAX_DEBT_STEPS` steps at most, for each size of a batch. A single slow step
counts little, because a step of a new size may load kernels or capture a graph.
Runs in the scheduler's process; time is passed in.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from hbserve.policy.least_squares import LeastSquares

_MAX_LOSS = 0.01
"""Part of the time that drafts may cost."""
_MAX_DEBT_STEPS = 5.0
"""Debt at which nothing is looked at, in plain steps."""
_MIN_GAIN_ALONE, _MIN_GAIN_OF_BATCH = 1.02, 1.05
"""What drafts must gain, as promised times what was kept of promises. Sequences of a batch with drafts end at different
times, so its last steps are for few: it must gain more."""
_NUM_PLAIN, _MAX_PLAIN = 4, 8
"""Plain steps that are measured at a time, and that count."""
_FIRST_INTERVALS = 16.0
"""Intervals for which promises count as kept, at first, and `_FIRST_GAIN` as the gain: one or two prove nothing."""
_FIRST_GAIN = 1.15
_MEMORY = 0.95
"""Weight of the past at each interval: about the last twenty say how much of promises is kept."""
_MEMORY_OF_PLAIN = 0.98
_MAX_AGE, _MAX_AGE_IF_CLEAR, _CLEAR_GAIN = 64, 256, 1.3
"""Intervals after which plain steps are measured again, and the same where drafts clearly gain."""
_MIN_PLAIN_S = 1e-6
_MIN_WAIT = 64
"""Intervals without drafts after which promises count in full again, if there is no debt."""
_MAX_KEPT = 1.25
_MAX_OUTLIER, _MAX_FIRST_OUTLIER, _NUM_FIRST = 2.0, 1.5, 32
"""Multiple of the time without drafts that an interval counts as, at most, and the same of the first ones with drafts
of a size: they may load kernels and capture graphs."""


class Tried(NamedTuple):
    """How a step was planned.

    Attributes:
        size: of the batch, see `GainMeter.size_of`.
        num_sequences: that decode on the instance, those included that the step leaves out.
        num_keys: sum of their positions.
        has_looked: guesses were looked at.
        gain: promised of its drafts; 0: there are none.
        is_whole: each sequence has a row in it.
    """

    size: tuple[int, bool]
    num_sequences: int
    num_keys: int
    has_looked: bool = False
    gain: float = 0.0
    is_whole: bool = True


@dataclass(slots=True)
class _Size:
    """What is known of batches of about one size.

    Attributes:
        plain: recent plain steps: seconds from result to result, and their work.
        num_due: plain steps to be measured before guesses are looked at; age: intervals since the last one.
        drafting_s: time of steps with drafts, recent ones first; brought_s: time that their tokens would have taken
            without drafts; promised_s: what that would be if promises had been kept.
        expected: part of promises that is expected to be kept, before it is measured.
        settled_s: debt up to the last measurement of plain steps; spent_s, brought_steps: what drafts have taken since
            then, and the plain steps that would have brought the same.
        is_closed: the debt was too much, and is not paid yet.
        num_waited: intervals without drafts, one after the other; num_drafting: all intervals with drafts.
    """

    plain: deque[tuple[float, tuple[float, float]]] = field(default_factory=lambda: deque(maxlen=_MAX_PLAIN))
    plain_s: float = 0.0
    plain_work: tuple[float, float] = (0.0, 0.0)
    num_due: int = _NUM_PLAIN
    age: int = 0
    drafting_s: float = 0.0
    brought_s: float = 0.0
    promised_s: float = 0.0
    expected: float = 1.0
    settled_s: float = 0.0
    spent_s: float = 0.0
    brought_steps: float = 0.0
    last_plain_s: float = 0.0
    is_closed: bool = False
    num_waited: int = 0
    num_drafting: int = 0

    @property
    def gain(self) -> float:
        """Factor on tokens per second that was measured."""
        first_s = _FIRST_INTERVALS * self.plain_s
        return (self.brought_s + _FIRST_GAIN * self.expected * first_s) / (self.drafting_s + first_s)

    @property
    def kept(self) -> float:
        """The same as a part of what was promised."""
        first_s = _FIRST_INTERVALS * self.plain_s
        return min((self.brought_s + self.expected * first_s) / (self.promised_s + first_s), _MAX_KEPT)

    @property
    def debt_s(self) -> float:
        """Time that drafts have lost; at least 0."""
        return max(self.settled_s + self.spent_s - self.brought_steps * self.plain_s, 0.0)

    def like(self) -> _Size:
        """Return what is known of another size at first: the same, without its debt."""
        known = _Size(deque(maxlen=_MAX_PLAIN), self.plain_s, self.plain_work, num_due=0)
        known.drafting_s, known.brought_s, known.promised_s = self.drafting_s, self.brought_s, self.promised_s
        known.expected = self.expected
        return known

    def add_plain(self, seconds: float, work: tuple[float, float]) -> None:
        """Note a plain step."""
        self.plain.append((seconds, work))
        durations = sorted([seconds for seconds, _ in self.plain])
        num_dropped = len(durations) // 4  # at each end
        # results that come together have no time between them
        self.plain_s = max(statistics.fmean(durations[num_dropped : len(durations) - num_dropped]), _MIN_PLAIN_S)
        rows, keys = zip(*[work for _, work in self.plain], strict=True)
        self.plain_work = statistics.fmean(rows), statistics.fmean(keys)
        self.num_due, self.age = max(self.num_due - 1, 0), 0
        if not self.num_due:
            mean_s = (self.plain_s + (self.last_plain_s or self.plain_s)) / 2
            self.settled_s = max(self.settled_s + self.spent_s - self.brought_steps * mean_s, 0.0)
            self.spent_s, self.brought_steps, self.last_plain_s = 0.0, 0.0, self.plain_s
        self.pay(seconds)

    def spend(self, seconds: float, brought_s: float) -> None:
        """Count an interval that drafts have changed."""
        self.spent_s += (1 - _MAX_LOSS) * seconds
        self.brought_steps += brought_s / self.plain_s
        self.pay(0.0)

    def pay(self, seconds: float) -> None:
        """Pay back debt after an interval, and see whether drafts are permitted."""
        self.settled_s = max(self.settled_s - _MAX_LOSS * seconds, 0.0)
        if not self.is_closed and self.debt_s > _MAX_DEBT_STEPS * self.plain_s:
            self.settled_s, self.spent_s, self.brought_steps = _MAX_DEBT_STEPS * self.plain_s, 0.0, 0.0
            self.is_closed, self.num_due = True, _NUM_PLAIN
        elif not self.debt_s:
            self.is_closed = False

    def add_drafting(self, seconds: float, brought_s: float, gain: float) -> None:
        """Note an interval with drafts."""
        self.brought_s = _MEMORY * self.brought_s + brought_s
        self.promised_s = _MEMORY * self.promised_s + gain * seconds
        self.drafting_s = _MEMORY * self.drafting_s + seconds
        self.num_waited = 0
        self.num_drafting += 1

    def add_waiting(self) -> None:
        """Note an interval without drafts."""
        self.num_waited += 1
        if self.num_waited >= _MIN_WAIT and not self.debt_s and self.kept < 1:
            self.expected = (1 + self.kept) / 2
            self.brought_s = self.promised_s = self.drafting_s = 0.0
            self.num_waited = 0


class GainMeter:
    """Meter of one worker: what drafts gain there, by the size of its batch.

    What it answers changes with results only.
    """

    def __init__(self) -> None:
        self._fit = LeastSquares([0.0] * 3, memory=_MEMORY_OF_PLAIN)  # of plain steps: of each, of a row, of a key
        self._sizes: dict[tuple[int, bool], _Size] = {}
        self._since: float | None = None  # of the interval that the next result ends; None: the worker was idle in it
        self._was_plain = self._drafted = False  # the last interval

    @staticmethod
    def size_of(num_sequences: int, is_shared: bool) -> tuple[int, bool]:
        """Return the size under which a batch is counted: its power of two, and whether others share the device."""
        return num_sequences.bit_length(), is_shared

    def may_look(self, size: tuple[int, bool]) -> bool:
        """Whether a step may look at guesses."""
        found = self._find(size)
        return found is not None and not found.num_due and not found.is_closed

    def permits(self, size: tuple[int, bool], gain: float) -> bool:
        """Whether a step may have drafts that promise to multiply the tokens per second by ``gain``."""
        found = self._find(size)
        if found is None or not found.plain_s:
            return False
        return max(gain * found.kept, found.gain) >= _min_gain(size)

    def on_planned(self, now: float, was_idle: bool) -> None:
        """Note that a plan has been sent; ``was_idle``: to a worker without steps in flight."""
        if was_idle and now != self._since:
            self._since = None

    def on_result(self, now: float, tried: Tried | None, num_tokens: int) -> None:
        """Note a result.

        Args:
            tried: None: the step had prompts, or nothing to do with decoding.
            num_tokens: that sequences have got.
        """
        seconds, self._since = None if self._since is None else now - self._since, now
        if tried is None or seconds is None:
            self._was_plain = self._drafted = False
            return
        size = self._sizes.get(tried.size)
        if size is None:
            nearest = self._find(tried.size)
            size = self._sizes[tried.size] = _Size() if nearest is None else nearest.like()
        is_plain = tried.is_whole and not tried.has_looked and not tried.gain
        was_plain, self._was_plain = self._was_plain, is_plain
        drafted, self._drafted = self._drafted, tried.gain > 0
        if is_plain and was_plain:  # the first one after others may have waited for their results
            size.add_plain(seconds, (tried.num_sequences, tried.num_keys))
            if seconds > 0:
                self._fit.add((1.0, tried.num_sequences, tried.num_keys), seconds, 1 / seconds)
                self._fit.sweep()
            size.add_waiting()
            return
        if not size.plain_s:
            return
        plain_s = self._plain_s(size, tried)
        outlier = _MAX_OUTLIER if size.num_drafting >= _NUM_FIRST else _MAX_FIRST_OUTLIER
        seconds = min(seconds, outlier * plain_s * max(1.0, num_tokens / tried.num_sequences))
        brought_s = num_tokens / tried.num_sequences * plain_s
        if tried.gain or drafted:
            size.spend(seconds, brought_s)
        else:
            size.pay(seconds)
        if tried.gain:
            size.add_drafting(seconds, brought_s, tried.gain)
        else:
            size.add_waiting()
        size.age += 1
        if size.age > (_MAX_AGE_IF_CLEAR if tried.gain and size.gain > _CLEAR_GAIN else _MAX_AGE):
            size.num_due, size.age = _NUM_PLAIN, 0

    def _find(self, size: tuple[int, bool]) -> _Size | None:
        """Return what is known of a size, or else of the nearest one that is known."""
        if (found := self._sizes.get(size)) is not None:
            return found
        known = [other for other in self._sizes if other[1] == size[1] and self._sizes[other].plain_s]
        return self._sizes[min(known, key=lambda other: abs(other[0] - size[0]))] if known else None

    def _plain_s(self, size: _Size, tried: Tried) -> float:
        """Return the time of a plain step with all sequences of a step, from those that were measured."""
        rows, keys = size.plain_work
        more_s = self._fit.predict((0.0, tried.num_sequences - rows, tried.num_keys - keys))
        return min(max(size.plain_s + more_s, size.plain_s / 2), 2 * size.plain_s)


def _min_gain(size: tuple[int, bool]) -> float:
    return _MIN_GAIN_ALONE if size[0] == 1 else _MIN_GAIN_OF_BATCH
