"""Which slots have a grammar, where their outputs are in it, and which tokens may come next.

A process of its own computes the masks (`hbserve.grammar_process`), because a grammar is a stranger's program: a step
waits for a mask for a few milliseconds, and then goes on without a token for that row. The scheduler plans such a row
again a little later.

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
        self._missing: dict[int, str | None] = {}

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

    def advance(self, rows: list[PlanRow]) -> None:
        """Take note of the tokens that a plan's rows bring, and have the masks after them computed."""
        if not self._followers:
            return
        for row in rows:
            follower = self._followers.get(row.slot)
            if follower is None:
                continue
            assert row.token_ids is not None, f"slot {row.slot} has a grammar and a token that only the device knows"
            new = self._num_known[row.slot] - row.start
            assert new >= 0, f"slot {row.slot}: tokens before position {row.start} are missing"
            if row.token_ids[new:]:
                follower.feed(row.token_ids[new:])
            self._num_known[row.slot] = max(self._num_known[row.slot], row.start + row.num_tokens)

    def masks(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Return the tokens that may come next, ``[slots, ceil(vocab / 32)]``, of slots that have a grammar.

        A slot whose mask is not there in time has all tokens here, and is among those that `take_missing` returns.
        """
        deadline = time.monotonic() + _MAX_WAIT_S
        masks = np.full((len(slots), self._num_words), -1, np.int32)
        for index, slot in enumerate(slots.tolist()):
            follower = self._followers[slot]
            mask = follower.wait(deadline)
            if mask is None:
                self._missing[slot] = follower.error
            else:
                masks[index] = mask
        return masks

    def missing(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which of these slots had no mask in the last `masks`."""
        if not self._missing:
            return np.zeros(len(slots), np.bool_)
        return np.array([slot in self._missing for slot in slots.tolist()], np.bool_)

    def take_missing(self) -> dict[int, str | None]:
        """Return the slots without a mask in this step, and why they can never get one; None: they can."""
        missing, self._missing = self._missing, {}
        return missing
