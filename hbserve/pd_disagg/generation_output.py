"""What a text request yields: deltas while it runs, and its result."""

from __future__ import annotations

from typing import TypedDict

import msgspec

from hbserve.messages.base import TokenLogprobs


class SampleDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What one sample has grown by.

    Attributes:
        index: which of the n samples.
        text: new text; empty while it may be the beginning of a stop string or half a character.
        token_ids: new tokens, the end token or the stop string's included.
        logprobs: one per token, if asked for.
        finish_reason: ``stop``, ``length``, ``abort``, or None while it goes on.
        stop_reason: the stop string or the request's stop token that ended it; None if the model's
            own end token did.
        num_cached_tokens: prompt tokens whose KV was in the prefix cache (first delta only).
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: str | None
    stop_reason: str | int | None
    num_prompt_tokens: int
    num_cached_tokens: int


class SampleOutput(TypedDict):
    """One sample of a finished request, for Python users.

    ``logprobs`` has one dict per token: log-probabilities by token id, of the chosen token and of as
    many most likely ones as were asked for; None if none were.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None
    logprobs: list[dict[int, float]] | None


class GenerationOutput(TypedDict):
    """A finished request, for Python users: the first sample's values, and all ``samples``."""

    request_id: str
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None
    logprobs: list[dict[int, float]] | None
    num_prompt_tokens: int
    num_cached_tokens: int
    samples: list[SampleOutput]


class Sample(msgspec.Struct, kw_only=True):
    """All deltas of one sample together; the same fields."""

    index: int
    text: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str = ""
    stop_reason: str | int | None = None

    def add(self, delta: SampleDelta) -> None:
        """Append what is new."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason or ""
        self.stop_reason = delta.stop_reason

    def to_output(self) -> SampleOutput:
        """The plain form for Python users."""
        logprobs = None
        if self.logprobs is not None:
            logprobs = [
                {**dict(zip(entry.top_ids, entry.top, strict=True)), token_id: entry.token}
                for token_id, entry in zip(self.token_ids, self.logprobs, strict=True)
            ]
        return {
            "index": self.index,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
            "logprobs": logprobs,
        }
