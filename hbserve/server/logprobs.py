"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hbserve.messages.base import TokenLogprobs
from hbserve.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0  # OpenAI's number for "never"; JSON has no infinity


class CompletionLogprobs:
    """The ``logprobs`` of one completion choice. Its text offsets continue from chunk to chunk.

    Args:
        skip_special_tokens: as for the choice's text, to which the offsets refer.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.text_decoder(skip_special_tokens)
        self._offset = 0

    def add(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Return the object for these tokens, which follow those of earlier calls."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            self._offset += len(self._decoder.feed(token_id))
        return {
            "tokens": [self._name(token_id) for token_id in token_ids],
            "token_logprobs": [max(entry.token, MIN_LOGPROB) for entry in logprobs],
            "top_logprobs": [
                {
                    self._name(top_id): max(logprob, MIN_LOGPROB)
                    for top_id, logprob in [*zip(entry.top_ids, entry.top, strict=True), (token_id, entry.token)]
                }
                for token_id, entry in zip(token_ids, logprobs, strict=True)
            ],
            "text_offset": offsets,
        }

    def _name(self, token_id: int) -> str:
        """Return a token's text, or ``bytes:\\xe2\\x82`` as OpenAI does if the token is a part of a character."""
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Return the ``logprobs`` of a chat choice for these tokens."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(raw)}

    content = [
        entry(token_id, token.token)
        | {"top_logprobs": [entry(top_id, top) for top_id, top in zip(token.top_ids, token.top, strict=True)]}
        for token_id, token in zip(token_ids, logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}
