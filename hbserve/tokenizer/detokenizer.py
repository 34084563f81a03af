"""Token ids to text deltas, with stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from hbserve.tokenizer.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of one output, as its tokens come.

    The concatenated deltas are the decoded text, or the part of it before the first stop string:
    the one that is complete first, whatever the token boundaries. Text that may be the beginning of
    a stop string is held back until it is decided.

    Args:
        skip_special_tokens: leave special tokens out of the text.
        stop: strings that end the text; they are not shown themselves.
        min_tokens: a stop string counts only if it begins in this token (counted from 1) or later.

    Attributes:
        stop_string: the one that ended the text, or None. Nothing may be pushed after it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
    ) -> None:
        self._decoder = tokenizer.text_decoder(skip_special_tokens)
        self._stop = stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""
        self.stop_string: str | None = None

    def push(self, token_id: int) -> str:
        """Add a token; the text that may be shown now, often empty."""
        assert self.stop_string is None, "the text has ended"
        self._num_tokens += 1
        text = self._decoder.feed(token_id)
        if not self._stop or not text or self._num_tokens < self._min_tokens:
            return text
        return self._release(self._held + text)

    def finish(self) -> str:
        """The tokens are at an end: the rest of the text."""
        assert self.stop_string is None, "the text has ended"
        text = self._held + self._decoder.flush()
        if self._num_tokens >= self._min_tokens:
            text = self._release(text)
        rest, self._held = text + self._held, ""
        return rest

    def _release(self, text: str) -> str:
        """Cut ``text`` before a stop string, or hold back its tail if one may begin there."""
        self._held = ""
        found = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.stop_string = min(found)
            return text[:start]
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        if num_held:
            text, self._held = text[:-num_held], text[-num_held:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest tail of ``text`` that is a beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
