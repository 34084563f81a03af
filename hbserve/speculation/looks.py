"""When the scheduler looks at the guesses of a batch that drafts nothing, and at how many of them.

To look at all guesses of a large batch takes longer than to plan its step. So while a batch drafts nothing, the
scheduler looks now and then at those of a few sequences in turn. Where these promise something, it looks at all. If
that brings no drafts, it looks at all less often.
Runs in the scheduler's process.
"""

from __future__ import annotations

from typing import TypeVar

_SAMPLE = 32
"""Sequences of a look, while there are no drafts."""
_SEQUENCES_PER_LOOK, _MAX_STEPS_PER_LOOK = 4, 8
"""One step in so many has a look: a step for each four sequences, and a limit."""
_LOOKS_PER_SLOWDOWN, _MAX_SLOWDOWN, _MAX_SLOWDOWN_OF_FEW = 4, 8, 4
"""After so many looks at guesses that promised nothing the next ones come at half the rate, down to these parts: a
look at 32 sequences takes 0.6 ms, which steps of a small model must wait for."""
_MAX_LOOKS_PER_FULL_LOOK = 64
"""Looks for one at all sequences, at most: twice as many after each that has brought no drafts."""

T = TypeVar("T")


class Looks:
    """Looks at the guesses of one worker's sequences.

    What it answers changes with plans only.

    Attributes:
        num_undrafted: plans in a row in which no sequence got a draft or waited for one.
    """

    def __init__(self) -> None:
        self.num_undrafted = 0
        self._num_looks = 0  # in a row at guesses that promised nothing
        self._num_sequences = self._next = self._begin = 0
        self._wait = 1  # looks from one at all sequences to the next
        self._num_until_all = 0
        self._has_seen_all = False

    def is_due(self, num_sequences: int) -> bool:
        """Whether the next step looks at guesses; new sequences are looked at soon."""
        if num_sequences > self._num_sequences or not self.num_undrafted:
            self._num_looks = self._next = 0
        self._num_sequences = num_sequences
        return self.num_undrafted >= self._next

    def sample(self, sequences: list[T]) -> list[T]:
        """Return the sequences to look at first: all while there are drafts, else some of them in turn."""
        if not self.num_undrafted or len(sequences) <= _SAMPLE:
            return sequences
        begin = self._begin % len(sequences)
        return (sequences[begin:] + sequences[:begin])[:_SAMPLE]

    def may_see_all(self) -> bool:
        """Whether all may be looked at, if some of them promise something; notes that they are."""
        self._has_seen_all = not self._num_until_all
        return self._has_seen_all

    def on_planned(self, has_looked: bool, has_drafts: bool, are_promising: bool) -> None:
        """Note a plan with decoding sequences; ``are_promising``: the guesses are, even if there are no drafts."""
        self.num_undrafted = 0 if has_drafts else self.num_undrafted + 1
        if has_drafts:
            self._num_looks, self._wait, self._num_until_all = 0, 1, 0
        elif has_looked:
            self._num_looks = 0 if are_promising else self._num_looks + 1
            self._begin += _SAMPLE
            steps = min(max(1, self._num_sequences // _SEQUENCES_PER_LOOK), _MAX_STEPS_PER_LOOK)
            max_slowdown = _MAX_SLOWDOWN_OF_FEW if steps == 1 else _MAX_SLOWDOWN
            self._next = self.num_undrafted + steps * min(2 ** (self._num_looks // _LOOKS_PER_SLOWDOWN), max_slowdown)
            self._num_until_all = max(self._num_until_all - 1, 0)
            if self._has_seen_all:
                self._num_until_all, self._wait = self._wait, min(2 * self._wait, _MAX_LOOKS_PER_FULL_LOOK)
        self._has_seen_all = False
