"""The size of a step that does both phases: as many prompt tokens as the TPOT target leaves time for.

Runs in the scheduler's process, and on the simulator's clock. Every sequence that decodes waits for the prompts in its
step. A budget in tokens does not bound that time: the last tokens of a long prompt take several times as long as the
first tokens of a short one. A budget in time does.

An account says how far decode is ahead of its target. That lead is spent on larger steps. While more prompts wait than
one step holds, prompts are in danger of missing their target, and the lead is also spent on steps without decode rows.
At other times such steps make prompts hardly faster, and the lead would be missing when many prompts come.

The lead is that of the batch. Slack is tracked per sequence: a new sequence has none yet, and a short one has few
tokens left to recover a delay. A step therefore uses at most the smallest slack of all sequences.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence

from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork, num_pairs

_MAX_AHEAD = 8.0
"""Intervals that decode can be ahead or behind by the account; more is forgotten."""
_LEAD_KEPT = 0.95
"""Part of the largest lead that best-effort work does not touch: it is for prompts that come all at once."""
MIN_TOKENS = 128
"""Prompt tokens in a step beside decode rows with a target, however long they take: prompts must make progress."""
MIN_TOKENS_ALONE = 512
"""The same in other steps: smaller ones take hardly less time. One request's impossible target slows no others down."""
MIN_ROWS = 8
"""Decode rows of best-effort work in a step without other work, however long they take."""
_STEPS_TO_CATCH_UP = 4.0
"""Steps in which a late sequence recovers its delay."""
_KEPT, _KEPT_ONCE = 0.02, 0.2
"""Shares of the TPOT target that slack does not count on, for each token and for each sequence: steps take longer than
predicted, and what one step takes too long an answer of few tokens cannot make good. On an H200 with neither, sequences
of 16 tokens ended at 1.00 to 1.02 times the target; with 0.07 for each sequence, four answers of 3 to 5 tokens used 5
to 8 ms more than slack allowed, of a target of 42."""
_MIN_LIMIT = 0.5
"""Share of the interval that a step of a late sequence gets at least."""


def slack_s(
    now: float, first_token_time: float, num_tokens: int, num_left: int, target_s: float, interval_s: float
) -> float:
    """Compute the time that a sequence can lose and still end within its target, if it gets a token each interval.

    Args:
        num_tokens: tokens after the first one, at most.
        num_left: those of them that are in no step yet.
        target_s: the TPOT target.

    Returns:
        Seconds. Negative: the sequence must be faster than one token each interval. Infinite: it is too late even for
        that, so steps need not wait for it.
    """
    slack = first_token_time + (num_tokens * (1 - _KEPT) - _KEPT_ONCE) * target_s - now - num_left * interval_s
    return slack if slack >= -num_left * interval_s * (1 - _MIN_LIMIT) else math.inf


class MixedStepBudget:
    """Account of how far decode is ahead of one step in each interval, in seconds of any clock.

    Args:
        holds_back_decode: decode rows may be left out of steps while decode is ahead; else decode is never ahead.
    """

    def __init__(self, holds_back_decode: bool = True) -> None:
        self._max_ahead = _MAX_AHEAD if holds_back_decode else 0.0
        self._due = 0.0  # when decode's next step should end
        self._interval_s = 0.0

    def limit_s(
        self, now: float, interval_s: float, min_slack_s: float, prompts_s: float, waits_for_more: bool
    ) -> float:
        """Compute how long the next step may take with decode rows in it; infinite: leave them out of it.

        Args:
            interval_s: mean time from one decode step to the next that the TPOT target allows.
            min_slack_s: smallest slack of the sequences that decode, see `slack_s`.
            prompts_s: duration of a step with the waiting prompts and without decode rows.
            waits_for_more: the waiting prompts fill such a step.
        """
        self._interval_s = interval_s
        self._due = min(max(self._due, now - _MAX_AHEAD * interval_s), now + self._max_ahead * interval_s)
        if min_slack_s < 0:
            return max(_MIN_LIMIT * interval_s, interval_s + min_slack_s / _STEPS_TO_CATCH_UP)
        ahead_s = max(0.0, self._due - now)
        if ahead_s and waits_for_more and min_slack_s >= prompts_s:
            return math.inf
        return interval_s + min(ahead_s, min_slack_s)

    def is_ahead(self, now: float) -> bool:
        """Whether decode is so far ahead that time is left for best-effort work."""
        return self._due - now >= _LEAD_KEPT * self._max_ahead * self._interval_s

    def on_decode_step(self, now: float, beside_prompts: bool) -> None:
        """Count a planned step with decode rows. While no prompts wait, a decode step is never late."""
        self._due = (self._due if beside_prompts else max(self._due, now)) + self._interval_s


class StepTimeBudget:
    """Time left in one step while work is put into it.

    Args:
        predictor: of the worker's steps.
        work: what is in the step already.
        limit_s: how long the step may take.
        min_tokens: prompt tokens that go into it, if there are as many, however long that takes.
    """

    def __init__(
        self, predictor: StepTimePredictor, work: StepWork, limit_s: float, min_tokens: int = MIN_TOKENS
    ) -> None:
        self._predictor, self._work, self._limit_s, self._min_tokens = predictor, work, limit_s, min_tokens
        self.is_full = False

    def take(self, tokens: int, start: int) -> int:
        """Put as many of a prompt's next tokens into the step as fit, at most ``tokens``; returns how many.

        Args:
            start: tokens of the prompt before them.
        """
        work = self._work
        fits = max(self._min_tokens - work.prompt_tokens, self._predictor.tokens_within(work, start, self._limit_s))
        taken = tokens if fits >= tokens else int(fits)
        self.is_full = taken < tokens
        self._work = work._replace(
            prompt_tokens=work.prompt_tokens + taken, prompt_pairs=work.prompt_pairs + num_pairs(taken, start)
        )
        return taken

    def rows_within(self, positions: Sequence[int], min_rows: int) -> int:
        """Compute how many of some decode rows fit into the step, from the first on.

        Args:
            positions: tokens before each.
            min_rows: so many go into it, however long that takes.
        """
        keys = [0, *itertools.accumulate(positions)]

        def seconds(num_rows: int) -> float:
            work = self._work
            return self._predictor.estimate_s(
                work._replace(decode_rows=work.decode_rows + num_rows, decode_keys=work.decode_keys + keys[num_rows])
            )

        fits = bisect.bisect_right(range(len(keys)), self._limit_s, key=seconds) - 1
        return min(len(positions), max(fits, min_rows))
