"""What drafts gain in the time that passes, by measurement: they are stopped where they lose.

`hbserve.speculation.choice` predicts what drafts bring, from the device's step times and from how often guesses were
right. Predictions miss what they do not know: the host's time, kernels that change with the number of rows, guesses
that look better than they are. So a worker's meter compares the time between two results with the time in which the
same tokens would have come without drafts::

    plain steps, now and then   ─►  T(N): time from result to result, with N sequences and no look at any guess
    steps with drafts           ─►  n tokens in t seconds, which would have taken n / N · T(N)

    gain    what was measured lately, and `kept`: as a part of what was promised. Drafts are tried while their promise
            is enough, counted for that part
    debt    time lost by drafts, paid back by 1 % of all time. What drafts have saved counts only a little: else a
            drafter that was right for long could lose for as long. With a debt above the limit drafts stop

The limit is `_MAX_DEBT_STEPS` plain steps, and more while the measured gain is large: chance then explains the debt.
A size that has stopped goes on when its debt is paid, or earlier if the promises of its drafts grow far beyond what was
kept of them. After each trial that fails the next one comes later.

So drafts cost about 1 % of the time and a few plain steps at most, for each size of a batch. A single slow step counts
little, because a step of a new size may load kernels or capture a graph.
Runs in the scheduler's process; time is passed in.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from hbserve.policy.least_squares import LeastSquares

_MAX_LOSS, _MIN_LOSS = 0.01, 0.001
"""Part of the time that drafts may cost: at first, and after many trials that have failed."""
_MAX_DEBT_STEPS = 2.0
"""Debt at which drafts stop, in plain steps."""
_MORE_DEBT_STEPS, _MAX_SURE_GAIN = 10.0, 0.5
"""How much more that is for a measured gain of 1 above `_SURE_GAIN`, and the largest gain above it that counts."""
_SURE_GAIN = 1.1
_MAX_SAVED_STEPS = 1.0
"""What drafts have saved, as far as it counts, in plain steps."""
_MAX_TRIAL_DEBT_STEPS = 8.0
"""Debt up to which drafts may be tried before it is paid."""
_MIN_GAIN_OF_TRIAL, _FIRST_WAIT, _MAX_WAIT = 1.5, 32, 4096
"""What they must promise then, times what was kept; and intervals until then, twice as many after each failure."""
_MIN_GAIN_ALONE, _MIN_GAIN_OF_BATCH = 1.02, 1.1
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
"""Intervals without drafts after which promises count more again, if there is no debt."""
_MAX_KEPT = 1.25
_NUM_USUAL, _MIN_USUAL = 15, 3
"""Intervals with drafts whose median says how long one usually is, and how many of them are needed for that. The first
of a step has the gap before it, which may be longer than all its rounds."""
_MAX_OUTLIER, _MAX_FIRST_OUTLIER = 2.0, 3.0
"""Multiple of the usual interval with drafts that one counts as, at most; and of the time without drafts, while the
usual one is not known. A slow step may load kernels or capture graphs."""


class Tried(NamedTuple):
    """How a step was planned.

    Attributes:
        size: of the batch, see `GainMeter.size_of`.
        num_sequences: that decode on the instance, those included that the step leaves out.
        num_keys: sum of their positions.
        has_looked: guesses were looked at.
        has_waited: the plan waited for a result because of drafts that were to come.
        gain: promised of its drafts; 0: there are none.
        is_whole: each sequence has a row in it.
    """

    size: tuple[int, bool]
    num_sequences: int
    num_keys: int
    has_looked: bool = False
    gain: float = 0.0
    is_whole: bool = True
    has_waited: bool = False


@dataclass(slots=True)
class _Size:
    """What is known of batches of about one size.

    Attributes:
        plain: recent plain steps: seconds from result to result, and their work.
        num_due: plain steps to be measured before guesses are looked at; age: intervals since the last one.
        drafting_s: time of steps with drafts, recent ones first; brought_s: time that their tokens would have taken
            without drafts; promised_s: what that would be if promises had been kept.
        expected: part of promises that is expected to be kept, before it is measured.
        usual: recent intervals with drafts, in plain steps: of later rounds of a step, and of the first ones.
        debt_steps: time lost, in plain steps; negative: a little of what drafts have saved.
        spent_s, brought_steps: what drafts have taken since the last measurement of plain steps, and the plain steps
            that would have brought the same.
        loss: part of the time that drafts may cost: the rate at which debt is paid.
        is_closed: the debt was too much, and is not paid yet. Then `num_until_trial` intervals are left until drafts
            may be tried again, `wait` are their number after the next failure, and `debt_at_trial` is the debt then.
        num_waited: intervals without drafts, one after the other.
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
    usual: tuple[deque[float], deque[float]] = field(default_factory=lambda: (_new_usual(), _new_usual()))
    debt_steps: float = 0.0
    spent_s: float = 0.0
    brought_steps: float = 0.0
    last_plain_s: float = 0.0
    loss: float = _MAX_LOSS
    is_closed: bool = False
    num_until_trial: int = 0
    debt_at_trial: float = 0.0
    wait: int = _FIRST_WAIT
    num_waited: int = 0

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
    def may_try(self) -> bool:
        """Whether drafts are permitted, or would be if they promised enough."""
        return not self.is_closed or (not self.num_until_trial and self.debt_steps < _MAX_TRIAL_DEBT_STEPS)

    def permits(self, gain: float, min_gain: float) -> bool:
        """Whether drafts may be tried that promise so much."""
        promise = gain * self.kept
        return self.may_try and promise >= (_MIN_GAIN_OF_TRIAL if self.is_closed else min_gain)

    def like(self) -> _Size:
        """Return what is known of another size at first: the same, without its debt."""
        known = _Size(deque(maxlen=_MAX_PLAIN), self.plain_s, self.plain_work, num_due=0)
        known.drafting_s, known.brought_s, known.promised_s = self.drafting_s, self.brought_s, self.promised_s
        known.expected, known.usual = self.expected, (self.usual[0].copy(), self.usual[1].copy())
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
            last_s = self.last_plain_s or self.plain_s
            # a host gets slower and faster: what was lost since the last measurement is computed with the mean of both
            mean_s = (last_s + self.plain_s) / 2
            counted_s = max(self.spent_s - self.brought_steps * last_s, 0.0)
            self.debt_steps += (max(self.spent_s - self.brought_steps * mean_s, 0.0) - counted_s) / self.plain_s
            self.debt_steps = max(self.debt_steps, -_MAX_SAVED_STEPS)
            self.spent_s, self.brought_steps, self.last_plain_s = 0.0, 0.0, self.plain_s
        self.pay(seconds)

    def counted_s(self, seconds: float, is_first: bool, num_steps: float, plain_s: float) -> float:
        """Return what an interval with drafts counts as.

        Args:
            is_first: of its step, not that of a later round.
            num_steps: plain steps that would have brought its tokens.
        """
        usual = self.usual[is_first]
        usual.append(seconds / plain_s)
        if len(usual) >= _MIN_USUAL:
            return min(seconds, _MAX_OUTLIER * max(statistics.median(usual), 1.0) * plain_s)
        return min(seconds, _MAX_FIRST_OUTLIER * plain_s * max(1.0, num_steps))

    def spend(self, seconds: float, brought_s: float) -> None:
        """Count an interval that drafts have changed."""
        self.spent_s += seconds
        self.brought_steps += brought_s / self.plain_s
        self.debt_steps = max(self.debt_steps + (seconds - brought_s) / self.plain_s, -_MAX_SAVED_STEPS)
        if self.debt_steps > self._limit() and (not self.is_closed or not self.num_until_trial):
            if self.is_closed or self.wait > _FIRST_WAIT:
                self.loss = max(self.loss / 2, _MIN_LOSS)
            self.is_closed, self.num_due = True, _NUM_PLAIN
            self.num_until_trial, self.wait = self.wait, min(2 * self.wait, _MAX_WAIT)
            self.debt_at_trial = self.debt_steps

    def pay(self, seconds: float) -> None:
        """Pay back debt after an interval, and see whether drafts are permitted."""
        self.num_until_trial = max(self.num_until_trial - 1, 0)
        if self.debt_steps > 0:
            self.debt_steps = max(self.debt_steps - self.loss * seconds / self.plain_s, 0.0)
        if self.debt_steps <= 0:
            self.is_closed = False
            if self.debt_steps <= -_MAX_SAVED_STEPS:
                self.loss, self.wait = _MAX_LOSS, _FIRST_WAIT

    def add_drafting(self, seconds: float, brought_s: float, gain: float) -> None:
        """Note an interval with drafts."""
        self.brought_s = _MEMORY * self.brought_s + brought_s
        self.promised_s = _MEMORY * self.promised_s + gain * seconds
        self.drafting_s = _MEMORY * self.drafting_s + seconds
        self.num_waited = 0

    def add_waiting(self) -> None:
        """Note an interval without drafts."""
        self.num_waited += 1
        if self.num_waited >= _MIN_WAIT and self.debt_steps <= 0 and self.kept < 1:
            self.expected = (1 + self.kept) / 2
            self.brought_s = self.promised_s = self.drafting_s = 0.0
            self.num_waited = 0

    def _limit(self) -> float:
        """Debt at which drafts stop."""
        sure = min(max(self.gain - _SURE_GAIN, 0.0), _MAX_SURE_GAIN)
        return (self.debt_at_trial if self.is_closed else 0.0) + _MAX_DEBT_STEPS + _MORE_DEBT_STEPS * sure


class GainMeter:
    """Meter of one worker: what drafts gain there, by the size of its batch.

    What it answers changes with results only.
    """

    def __init__(self) -> None:
        self._fit = LeastSquares([0.0] * 3, memory=_MEMORY_OF_PLAIN)  # of plain steps: of each, of a row, of a key
        self._sizes: dict[tuple[int, bool], _Size] = {}
        self._since: float | None = None  # of the interval that the next result ends; None: the worker was idle in it
        self._was_plain = self._drafted = False  # the last interval
        self._last: Tried | None = None

    @staticmethod
    def size_of(num_sequences: int, is_shared: bool) -> tuple[int, bool]:
        """Return the size under which a batch is counted: its power of two, and whether others share the device."""
        return num_sequences.bit_length(), is_shared

    def may_look(self, size: tuple[int, bool]) -> bool:
        """Whether a step may look at guesses."""
        found = self._find(size)
        return found is not None and not found.num_due and found.may_try

    def permits(self, size: tuple[int, bool], gain: float) -> bool:
        """Whether a step may have drafts that promise to multiply the tokens per second by ``gain``."""
        found = self._find(size)
        return found is not None and found.plain_s > 0 and found.permits(gain, _min_gain(size))

    def on_planned(self, now: float, was_idle: bool) -> None:
        """Note that a plan has been sent; ``was_idle``: to a worker without steps in flight."""
        if was_idle and now != self._since:
            self._since = None

    def on_result(self, now: float, tried: Tried | None, num_tokens: int) -> None:
        """Note a result.

        Args:
            tried: the same object for all rounds of a step; None: it had prompts, or nothing to do with decoding.
            num_tokens: that sequences have got.
        """
        seconds, self._since = None if self._since is None else now - self._since, now
        is_first, self._last = tried is not self._last, tried
        if tried is None or seconds is None:
            self._was_plain = self._drafted = False
            return
        size = self._sizes.get(tried.size)
        if size is None:
            nearest = self._find(tried.size)
            size = self._sizes[tried.size] = _Size() if nearest is None else nearest.like()
        is_plain = tried.is_whole and not tried.has_looked and not tried.has_waited and not tried.gain
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
        num_steps = num_tokens / tried.num_sequences
        if tried.gain or drafted or tried.has_waited:
            if tried.gain:
                seconds = size.counted_s(seconds, is_first, num_steps, plain_s)
            else:
                seconds = min(seconds, _MAX_FIRST_OUTLIER * plain_s)
            size.spend(seconds, num_steps * plain_s)
        size.pay(seconds)
        if tried.gain:
            size.add_drafting(seconds, num_steps * plain_s, tried.gain)
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


def _new_usual() -> deque[float]:
    return deque(maxlen=_NUM_USUAL)


def _min_gain(size: tuple[int, bool]) -> float:
    return _MIN_GAIN_ALONE if size[0] == 1 else _MIN_GAIN_OF_BATCH
