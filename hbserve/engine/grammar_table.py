"""Which slots have a grammar, where their outputs are in it, and which tokens may come next.

A grammar comes from a client and may take any time. So a process of its own computes the masks
(`hbserve.grammar_process`). A step waits a few milliseconds for a mask, and then goes on without a token for that row.
The scheduler plans such a row again a little later.

    plan's tokens ──► Follower.feed ──► grammar process ──► mask ──► masks() of this step, or of a later one
"""

from __future__ import annotations

import time
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hbserve.grammar_process.parent import Follower, GrammarProcess
from hbserve.messages.worker import PlanRow, SequenceState
from hbserve.process.events import OnEvent

_MAX_WAIT_S = 0.02
"""Time that a step waits for the masks of all its rows."""
_LARGE_BYTES = 2**20
"""A tokenizer.json from this size on takes a good part of a second to read: its process starts with the worker."""


class GrammarTable:
    """Followers of the outputs by slot. All of it follows from the `SequenceState`s and the plans' own tokens.

    The scheduler plans a row with a grammar only when it knows the token before, so every token is in
    a plan's row before it matters here. Only the thread that launches steps calls the methods.

    Attributes:
        has_grammar: bool ``[slots]``.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, tokenizer_folder: str | Path) -> None:
        self.has_grammar = np.zeros(max_num_seqs, np.bool_)
        self._num_words = -(-vocab_size // 32)
        file = Path(tokenizer_folder) / "tokenizer.json"
        is_large = file.is_file() and file.stat().st_size >= _LARGE_BYTES
        self._process = GrammarProcess(Path(tokenizer_folder), vocab_size, starts_now=is_large)
        weakref.finalize(self, self._process.close)
        self._followers: dict[int, Follower] = {}
        self._num_known: dict[int, int] = {}  # per slot, tokens of prompt and output that the follower has
        self._drafts: dict[int, list[int]] = {}  # per slot, the guesses of the tokens after these
        self._missing: dict[int, str | None] = {}
        self._forced: dict[int, list[int]] = {}

    def set_on_event(self, on_event: OnEvent) -> None:
        """Have a function called, in another thread, when the grammar process is replaced; else that is logged."""
        self._process.on_event = on_event

    def install(self, state: SequenceState) -> None:
        """Take a sequence in, in place of whatever the slot had."""
        before = self._followers.pop(state.slot, None)
        if before is not None:
            before.close()
        grammar = state.sampling.grammar
        self.has_grammar[state.slot] = grammar is not None
        if grammar is None:
            return
        assert state.history is not None, f"slot {state.slot}: a grammar needs the history"
        output = state.history[state.num_prompt_tokens :]
        self._followers[state.slot] = self._process.follow(grammar, state.end_token_ids, output)
        self._num_known[state.slot] = len(state.history)
        self._drafts[state.slot] = []

    def advance(self, rows: list[PlanRow]) -> None:
        """Take note of the tokens that a plan's rows bring, and have the masks after them computed."""
        if not self._followers:
            return
        for row in rows:
            follower = self._followers.get(row.slot)
            if follower is None:
                continue
            assert row.token_ids is not None, f"slot {row.slot} has a grammar and a token that only the device knows"
            num_known, before = self._num_known[row.slot], self._drafts[row.slot]
            num_accepted = max(0, row.start - num_known)  # they are in no plan but that which guessed them
            assert num_accepted <= len(before), f"slot {row.slot}: tokens before position {row.start} are missing"
            end = row.num_tokens - row.num_drafts
            new = [*before[:num_accepted], *row.token_ids[max(0, num_known - row.start) : end]]
            draft = row.token_ids[end:]
            if new or draft or before:
                follower.feed(new, draft)
            self._num_known[row.slot] = num_known + len(new)
            self._drafts[row.slot] = draft

    def masks(
        self, slots: npt.NDArray[np.int64], samples: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.int32]:
        """Return the tokens that may come next, ``[slots, ceil(vocab / 32)]``, of slots that have a grammar.

        A sample whose mask is not there in time has all tokens here, and is among those that `take_missing` returns.

        Args:
            slots: the same slot again for each token of a draft.
            samples: the place of each among all samples of the step; None: they are all.
        """
        deadline = time.monotonic() + _MAX_WAIT_S
        masks = np.full((len(slots), self._num_words), -1, np.int32)
        places = range(len(slots)) if samples is None else samples.tolist()
        before, number = -1, 0
        for index, (slot, place) in enumerate(zip(slots.tolist(), places, strict=True)):
            follower = self._followers[slot]
            before, number = slot, number + 1 if slot == before else 0
            if number:
                num_looked_at, ahead = follower.wait_for_draft(deadline)
                if number > num_looked_at:
                    self._missing[place] = follower.error
                elif ahead is not None and number <= len(ahead):
                    masks[index] = ahead[number - 1]
            elif (mask := follower.wait(deadline)) is not None:
                masks[index] = mask
            else:
                self._missing[place] = follower.error
        for slot, place in dict(zip(slots.tolist(), places, strict=True)).items():  # the last sample of each slot
            if (forced := self._followers[slot].forced) and place not in self._missing:
                self._forced[place] = forced
        return masks

    def missing(self, num_samples: int) -> npt.NDArray[np.bool_]:
        """Return which samples of the step had no mask in the last `masks`."""
        missing = np.zeros(num_samples, np.bool_)
        missing[list(self._missing)] = True
        return missing

    def take_forced(self) -> dict[int, list[int]]:
        """Return by sample the tokens from its own on that are forced if the row's draft is right."""
        forced, self._forced = self._forced, {}
        return forced

    def take_missing(self) -> dict[int, str | None]:
        """Return the samples without a mask in this step, and why they can never get one; None: they can."""
        missing, self._missing = self._missing, {}
        return missing
