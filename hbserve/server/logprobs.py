"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

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

    def add(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """Return the object for these tokens, which follow those of earlier calls. None: a prompt's first token."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            self._offset += len(self._decoder.feed(token_id))
        return {
            "tokens": [self._name(token_id) for token_id in token_ids],
            "token_logprobs": [None if entry is None else max(entry.token, MIN_LOGPROB) for entry in logprobs],
            "top_logprobs": [
                None if entry is None else self._top(token_id, entry)
                for token_id, entry in zip(token_ids, logprobs, strict=True)
            ],
            "text_offset": offsets,
        }

    def _top(self, token_id: int, entry: TokenLogprobs) -> dict[str, float]:
        named: dict[str, float] = {}
        for top_id, logprob in [*zip(entry.top_ids, entry.top, strict=True), (token_id, entry.token)]:
            named.setdefault(self._name(top_id), max(logprob, MIN_LOGPROB))  # of tokens with one text, the likeliest
        return named

    def _name(self, token_id: int) -> str:
        """Return a token's text, or ``bytes:\\xe2\\x82`` as OpenAI does if the token is a part of a character."""
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def with_top(logprobs: Sequence[TokenLogprobs], num_top: int) -> list[TokenLogprobs]:
    """Return the entries with at most so many most likely tokens."""
    return [replace(entry, top_ids=entry.top_ids[:num_top], top=entry.top[:num_top]) for entry in logprobs]


def prompt_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> list[dict[str, dict[str, Any]] | None]:
    """Return vLLM's ``prompt_logprobs``: an object by token id for each token of a prompt, None for the first.

    An aborted request may have fewer ``logprobs`` than its prompt has tokens.
    """

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        text = tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        return {"logprob": max(logprob, MIN_LOGPROB), "rank": rank, "decoded_token": text}

    answer: list[dict[str, dict[str, Any]] | None] = [None]
    for token_id, token in zip(token_ids[1 : 1 + len(logprobs)], logprobs, strict=True):
        top = enumerate(zip(token.top_ids, token.top, strict=True), start=1)
        ranked = {str(top_id): entry(top_id, logprob, rank) for rank, (top_id, logprob) in top}
        answer.append({str(token_id): entry(token_id, token.token, token.rank)} | ranked)
    return answer


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
