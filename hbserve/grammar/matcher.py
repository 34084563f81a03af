"""Matchers: where an output is in its grammar, and which tokens may come next."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from llguidance import LLParserLimits

DEAD_END = "it leads into a dead end, from which no output can be finished"

_STACK_BYTES = 256 << 20  # reserved, not used: enough for the recursion of the largest grammar that is accepted


class Matcher:
    """Position of an output in its grammar.

    A grammar that becomes too complex during the output stays in an error: `error` says why. At a dead end only the end
    is allowed.
    """

    def __init__(
        self,
        matcher: Any,
        vocab_size: int,
        end_token_ids: Sequence[int] | npt.NDArray[np.int64],
        tokenizer_ends: Iterable[int],
    ) -> None:
        self._matcher = matcher
        self._num_words = -(-vocab_size // 32)
        self._end_token_ids = np.asarray(end_token_ids, np.int64)
        self._tokenizer_ends = np.asarray([token for token in tokenizer_ends if token < vocab_size], np.int64)

    def advance(self, token_ids: Sequence[int]) -> None:
        """Move on past these sampled tokens."""
        self._matcher.consume_tokens(list(token_ids))

    def masks_along(self, token_ids: Sequence[int], first: npt.NDArray[np.int32]) -> Iterator[npt.NDArray[np.int32]]:
        """Yield the mask behind each of these tokens, up to one that is forbidden or ends the output.

        The matcher itself does not move. ``first``: its `mask`.
        """
        probe = Matcher(self._matcher.deep_copy(), 32 * self._num_words, self._end_token_ids, self._tokenizer_ends)
        mask = first
        for token in token_ids:
            if not mask[token // 32] >> token % 32 & 1 or token in self._end_token_ids:
                return
            probe.advance([token])
            mask = probe.mask()
            if probe.error is not None:
                return
            yield mask

    def captures(self) -> list[tuple[str, bytes]]:
        """Return the parts of the output that the grammar names, in their order."""
        captures: list[tuple[str, bytes]] = self._matcher.get_captures()
        return captures

    def mask(self) -> npt.NDArray[np.int32]:
        """Return the tokens that may come next, ``[ceil(vocab / 32)]``: bit i of word w is token ``32 * w + i``."""
        words = np.zeros(self._num_words, np.int32)
        if not self._matcher.is_stopped():  # stopped: complete, or in error
            raw = self._matcher.compute_bitmask()
            words[:] = np.frombuffer(raw, np.int32, count=self._num_words)
        # The request names the end tokens of an output, not the tokenizer.
        _set(words, self._tokenizer_ends, False)
        if self._matcher.is_accepting() or not words.any():
            _set(words, self._end_token_ids, True)
        return words

    def forced(self, token_ids: Sequence[int]) -> list[int]:
        """Return the only tokens that may follow these next ones, as far as there is no choice; the matcher stays."""
        matcher = self._matcher
        if token_ids:
            matcher = matcher.deep_copy()
            if matcher.try_consume_tokens(list(token_ids)) < len(token_ids):
                return []
        if matcher.is_stopped():
            return []
        forced: list[int] = matcher.compute_ff_tokens()
        ends = {*self._tokenizer_ends.tolist(), *self._end_token_ids.tolist()}
        return list(itertools.takewhile(lambda token: token not in ends, forced))

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any more; None if it can, or if its end, or a dead end, has come."""
        return self.problem if self._matcher.is_error() and self.problem != DEAD_END else None

    @property
    def problem(self) -> str | None:
        """Why the output would not match the grammar if it ended here; None if it would; `DEAD_END` if nothing does."""
        if self._matcher.is_accepting():
            return None
        if not self._matcher.is_error():
            probe = self._matcher.deep_copy()  # llguidance finds a dead end where it looks for the next token
            probe.compute_bitmask()
            return reason_of(probe.get_error()) if probe.is_error() else "the output ends before the grammar does"
        reason = reason_of(self._matcher.get_error())
        return reason if reason == DEAD_END else f"the grammar could not be followed to the end: {reason}"


def reason_of(error: str) -> str:
    """Say in words what llguidance found."""
    if error.startswith("NoExtensionBias"):
        return DEAD_END
    first = error.strip().splitlines()[0]
    return f"it is too complex: {first}" if re.search("Too many items|too many|row has|fuel", first) else first


@cache
def parser_limits() -> LLParserLimits:
    """Return the limits of the work for one token: within them it takes up to some tenths of a second."""
    from llguidance import LLParserLimits

    return LLParserLimits(step_max_items=10_000, max_lexer_states=50_000, max_grammar_size=50_000, verbose_errors=False)


def start_thread(target: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread in which grammars of any depth can be compiled and followed."""
    before = threading.stack_size(_STACK_BYTES)
    try:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
    finally:
        threading.stack_size(before)
    return thread


def _set(words: npt.NDArray[np.int32], tokens: npt.NDArray[np.int64], allowed: bool) -> None:
    for token in tokens.tolist():
        bit = np.uint32(1 << (token % 32)).view(np.int32)
        words[token // 32] = words[token // 32] | bit if allowed else words[token // 32] & ~bit
