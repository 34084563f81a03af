"""What goes into the next step of a worker that does both phases: prompts, for as long as TPOT's target leaves time.

Every sequence that decodes waits for the prompts in its step. A budget in tokens does not bound that: the last tokens
of a long prompt take several times as long as the first ones of a short one. A budget in time does, and what the batch
is ahead of its target may be spent: on larger steps, and on steps without decode rows while more prompts wait than one
step holds. That is when prompts are in danger; at other times they are hardly sooner done without decode rows, and what
is spent then is missing when many come.

What the batch is ahead a sequence that has just come is not, and one of few tokens has few gaps to make good in what it
loses in one. So no more is spent than every sequence can spare.
"""

from __future__ import annotations

import math

from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork

_MAX_AHEAD = 8.0
"""Intervals that decode can be ahead, or behind, by the account; what is beyond is forgotten."""
_MIN_TOKENS = 128
"""Of prompts in a step that has any, however long it takes: they must get on."""
_STEPS_TO_CATCH_UP = 4.0
"""In so many steps a sequence makes good what it is late."""
_KEPT = 0.95
"""Of TPOT's target, for what a sequence can spare: steps take longer than foreseen, and tokens have a way to go. On an
H200, without it, sequences of 16 tokens ended at 1.00 to 1.02 times the target."""
_MIN_LIMIT = 0.5
"""Of the interval, for a step that makes good."""


def slack_s(
    now: float, first_token_time: float, num_tokens: int, num_left: int, target_s: float, interval_s: float
) -> float:
    """Time that a sequence can lose and still be within its target when it ends, if it gets its tokens at intervals.

    Negative: it must be faster than that. Infinite: it is too late for that, too.

    Args:
        num_tokens: at most, after its first one; num_left: of them that are in no step yet.
        target_s: of TPOT.
    """
    slack = first_token_time + num_tokens * _KEPT * target_s - now - num_left * interval_s
    return slack if slack >= -num_left * interval_s * (1 - _MIN_LIMIT) else math.inf


class MixedStepBudget:
    """Keeps account of how far decode is ahead of one step in each interval, in seconds of any clock.

    Args:
        holds_back_decode: it may be left out of steps while it is ahead; else it is never ahead.
    """

    def __init__(self, holds_back_decode: bool = True) -> None:
        self._max_ahead = _MAX_AHEAD if holds_back_decode else 0.0
        self._due = 0.0  # when decode's next step should end
        self._interval_s = 0.0

    def limit_s(
        self, now: float, interval_s: float, min_slack_s: float, full_step_s: float, waits_for_more: bool
    ) -> float:
        """How long the next step may take with decode rows in it; infinite: leave them out of it.

        Args:
            interval_s: from one decode step to the next, mean, that TPOT's target allows.
            min_slack_s: of the sequences that decode, see `slack_s`.
            full_step_s: that a step of prompts only takes.
            waits_for_more: there are prompts for such a step.
        """
        self._interval_s = interval_s
        self._due = min(max(self._due, now - _MAX_AHEAD * interval_s), now + self._max_ahead * interval_s)
        if min_slack_s < 0:
            return max(_MIN_LIMIT * interval_s, interval_s + min_slack_s / _STEPS_TO_CATCH_UP)
        ahead_s = max(0.0, self._due - now)
        if ahead_s and waits_for_more and min_slack_s >= full_step_s:
            return math.inf
        return interval_s + min(ahead_s, min_slack_s)

    def on_decode_step(self, now: float, beside_prompts: bool) -> None:
        """A step with decode rows has been planned. Where no prompts wait, no decode step is late."""
        self._due = (self._due if beside_prompts else max(self._due, now)) + self._interval_s


class StepTimeBudget:
    """The time in one step, as prompts are put into it.

    Args:
        forecast: of the worker's steps.
        decode: the step's decode rows.
        limit_s: how long it may take.
    """

    def __init__(self, predictor: StepTimePredictor, decode: StepWork, limit_s: float) -> None:
        self._predictor, self._work, self._limit_s = predictor, decode, limit_s
        self.is_full = False

    def take(self, tokens: int, start: int) -> int:
        """How many of a prompt's next tokens fit, of at most ``tokens``; they are in the step then.

        Args:
            start: tokens of the prompt before them.
        """
        low, high = 0 if self._work.prompt_tokens else min(tokens, _MIN_TOKENS), tokens
        while low < high:
            middle = (low + high + 1) // 2
            if self._predictor.estimate_s(self._with(middle, start)) <= self._limit_s:
                low = middle
            else:
                high = middle - 1
        self._work = self._with(low, start)
        self.is_full = low < tokens
        return low

    def _with(self, tokens: int, start: int) -> StepWork:
        work = self._work
        pairs = tokens * (start + tokens / 2)
        return StepWork(work.decode_rows, work.decode_keys, work.prompt_tokens + tokens, work.prompt_keys + pairs)
