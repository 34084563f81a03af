"""The time between two tokens of a stream that prompts may take, if targets are a guess.

Runs in the scheduler's process, and on the simulator's clock. A step with decode rows beside prompts takes longer than
one with the prompts alone, so while prompts wait some steps have no decode rows. All sequences that decode then wait:
they have a *gap*, from the end of one step with decode rows to the end of the next.

If few prompts wait, the gap is at most the TPOT target: a longer one would hardly bring first tokens sooner. If many
wait, first tokens are late, and the gap may be several times as long.
"""

from __future__ import annotations

import math

LONGEST_GAP = 3.0
"""Longest gap, in TPOT targets."""
MANY_PROMPTS = 2.0
"""TPOT targets that prompts must take to count as many."""
_MIN_PROMPTS = 1.0
"""Time for prompts in the step that ends the longest gap, in TPOT targets, however long its decode rows take."""


class GapBudget:
    """Decides how long the next step may take, and whether it has decode rows; times in seconds of any clock."""

    def __init__(self) -> None:
        self._is_new = True  # no step was planned since the last one with decode rows
        self._ends_at = 0.0  # of the present gap
        self._is_long = False

    def limit_s(self, begins_at: float, tpot_s: float, prompts_s: float, alone_s: float, decode_s: float) -> float:
        """Compute how long the next step may take with decode rows in it; infinite: leave them out of it.

        Args:
            begins_at: when the step begins: the step before has ended then.
            tpot_s: a guess of the TPOT target.
            prompts_s: time that all waiting prompts take.
            alone_s: duration of a step with prompts alone.
            decode_s: duration of a step with the decode rows alone.
        """
        if self._is_new:
            self._is_new = False
            self._is_long = prompts_s > MANY_PROMPTS * tpot_s
            gap_s = LONGEST_GAP * tpot_s if self._is_long else tpot_s
            self._ends_at = begins_at + gap_s
        left_s = self._ends_at - begins_at
        if alone_s + decode_s <= left_s:
            return math.inf
        return max(left_s, decode_s + _MIN_PROMPTS * tpot_s) if self._is_long else left_s

    def on_decode_step(self) -> None:
        """A step with decode rows has been planned: its end is the begin of the next gap."""
        self._is_new = True
