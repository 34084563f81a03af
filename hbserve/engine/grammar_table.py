"""The grammars of the slots: which slots have one, and how far its output has come."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from hbserve.grammar import Matcher, Vocabulary
from hbserve.messages.worker import PlanRow, SequenceState


class GrammarTable:
    """The matcher of each slot. It follows from the `SequenceState`s and the tokens in the plans.

    The scheduler plans a row with a grammar only when it knows the token before. So each token is in a plan's row
    before the matcher needs it.

    Args:
        tokenizer_folder: read at the first grammar.

    Attributes:
        has_grammar: bool ``[slots]``.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, tokenizer_folder: str | Path) -> None:
        self.has_grammar = np.zeros(max_num_seqs, np.bool_)
        self._vocab_size = vocab_size
        self._tokenizer_folder = tokenizer_folder
        self._vocabulary: Vocabulary | None = None
        self._matchers: dict[int, Matcher] = {}
        self._num_known: dict[int, int] = {}  # per slot, tokens of prompt and output that the matcher has seen

    def install(self, state: SequenceState) -> None:
        """Put a sequence into its slot, in place of the one before."""
        self._matchers.pop(state.slot, None)
        grammar = state.sampling.grammar
        self.has_grammar[state.slot] = grammar is not None
        if grammar is None:
            return
        assert state.history is not None, f"slot {state.slot}: a grammar needs the history"
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self._tokenizer_folder, self._vocab_size)
        matcher = self._vocabulary.follow(grammar, state.end_token_ids)
        matcher.advance(state.history[state.num_prompt_tokens :])
        self._matchers[state.slot] = matcher
        self._num_known[state.slot] = len(state.history)

    def advance(self, rows: list[PlanRow]) -> None:
        """Advance the matchers by the tokens in a plan's rows."""
        if not self._matchers:
            return
        for row in rows:
            matcher = self._matchers.get(row.slot)
            if matcher is None:
                continue
            assert row.token_ids is not None, f"slot {row.slot} has a grammar and a token that only the device knows"
            new = self._num_known[row.slot] - row.start
            assert new >= 0, f"slot {row.slot}: tokens before position {row.start} are missing"
            matcher.advance(row.token_ids[new:])
            self._num_known[row.slot] = max(self._num_known[row.slot], row.start + row.num_tokens)

    def masks(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Return the tokens that may come next, ``[slots, ceil(vocab / 32)]``, for slots that have a grammar."""
        return np.stack([self._matchers[slot].mask() for slot in slots.tolist()])
