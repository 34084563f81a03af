"""Decoding of one output, token by token, with stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from hbserve.tokenizer.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of one output while its tokens arrive.

    The concatenated deltas are the decoded text, or its part before the first stop string. The first stop string is
    the one that is complete first, whatever the token boundaries. Text that may be the beginning of a stop string is
    held back until this is decided. A stop string that is the text of a special token also ends the text at that token,
    which is not shown.

    Args:
        skip_special_tokens: leave special tokens out of the text.
        stop: strings that end the text; they are part of it only with ``include_stop``.
        min_tokens: a stop string counts only if it begins in this token (counted from 1) or later.

    Attributes:
        stop_string: the stop string that ended the text, or None. No token may be pushed after it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        self._decoder = tokenizer.text_decoder(skip_special_tokens)
        self._stop = stop
        hidden = {tokenizer.hidden_token_id(text): text for text in stop} if skip_special_tokens else {}
        self._stop_tokens = {token_id: text for token_id, text in hidden.items() if token_id is not None}
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._num_tokens = 0
        self._held = ""
        self.stop_string: str | None = None

    def push(self, token_id: int) -> str:
        """Add a token; return the text that may be shown now, often an empty one."""
        assert self.stop_string is None, "the text has ended"
        self._num_tokens += 1
        if token_id in self._stop_tokens and self._num_tokens >= self._min_tokens:
            self.stop_string = self._stop_tokens[token_id]
            text, self._held = self._held + self._decoder.flush(), ""
            return text + self.stop_string if self._include_stop else text
        text = self._decoder.feed(token_id)
        if not self._stop or not text or self._num_tokens < self._min_tokens:
            return text
        return self._release(self._held + text)

    def finish(self) -> str:
        """End the output; return the rest of the text."""
        assert self.stop_string is None, "the text has ended"
        text = self._held + self._decoder.flush()
        if self._num_tokens >= self._min_tokens:
            text = self._release(text)
        rest, self._held = text + self._held, ""
        return rest

    def _release(self, text: str) -> str:
        """Cut ``text`` before a stop string, or hold back the end in which one may begin."""
        self._held = ""
        found = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            end, start, self.stop_string = min(found)
            return text[: end if self._include_stop else start]
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        if num_held:
            text, self._held = text[:-num_held], text[-num_held:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that is a beginning of ``stop``."""
    max_size = min(len(text), len(stop) - 1)
    return next((size for size in range(max_size, 0, -1) if text.endswith(stop[:size])), 0)
