"""Outputs of a text request: deltas while it runs, the stream that carries them, and the result."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TypedDict

import msgspec

from hbserve.errors import HBServeError
from hbserve.messages.base import TokenLogprobs

AT_DEAD_END = "grammar_dead_end"
"""The ``stop_reason`` of an output whose grammar allows no further token, and no end either."""


_MAX_DELTAS_PER_READ = 256
"""Samples with news that a reader gets at once; handling them takes less than a millisecond."""


class SampleDelta(msgspec.Struct, frozen=True, kw_only=True):
    """Growth of one sample.

    Attributes:
        index: number of the sample.
        text: new text; empty while the tokens may be the beginning of a stop string or half a character.
        token_ids: new tokens, including the end token or the tokens of a stop string.
        logprobs: one per token, if the request asks for them.
        finish_reason: ``stop``, ``length``, ``abort``, or None while the sample is not finished.
        stop_reason: stop string or stop token of the request that ended it, or `AT_DEAD_END`; None if the model's
            own end token did.
        num_cached_tokens: prompt tokens whose KV was in the prefix cache (first delta only).
        prompt_logprobs: of the next prompt tokens, from the second on, if the request asks for them.
        num_accepted, num_rejected: tokens of the request's prediction that were right, and that were wrong.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: str | None
    stop_reason: str | int | None
    num_prompt_tokens: int
    num_cached_tokens: int
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_accepted: int = 0
    num_rejected: int = 0


class SampleOutput(TypedDict):
    """Sample of a finished request, for Python users.

    ``logprobs`` has one dict per token: log-probabilities by token id, of the chosen token and of the
    requested number of most likely tokens; None without a request for them.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None
    logprobs: list[dict[int, float]] | None


class GenerationOutput(TypedDict):
    """Finished request, for Python users: the first sample's values, and all ``samples``.

    ``prompt_logprobs`` has one entry per prompt token, as ``logprobs`` has; the first token's is None.
    """

    request_id: str
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None
    logprobs: list[dict[int, float]] | None
    num_prompt_tokens: int
    num_cached_tokens: int
    prompt_logprobs: list[dict[int, float] | None] | None
    samples: list[SampleOutput]


class Sample(msgspec.Struct, kw_only=True):
    """Sum of all deltas of one sample; the fields are those of `SampleDelta`."""

    index: int
    text: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str = ""
    stop_reason: str | int | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None

    def add(self, delta: SampleDelta) -> None:
        """Append a delta."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = self.prompt_logprobs or []
            self.prompt_logprobs += delta.prompt_logprobs
        self.finish_reason = delta.finish_reason or ""
        self.stop_reason = delta.stop_reason

    def to_output(self) -> SampleOutput:
        """Return the sample as plain data, for Python users."""
        logprobs = None
        if self.logprobs is not None:
            logprobs = logprobs_by_id(self.token_ids, self.logprobs)
        return {
            "index": self.index,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
            "logprobs": logprobs,
        }


def logprobs_by_id(token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> list[dict[int, float]]:
    """Return, for each token, the log-probabilities by token id: of the most likely tokens and of the token itself."""
    return [
        {**dict(zip(entry.top_ids, entry.top, strict=True)), token_id: entry.token}
        for token_id, entry in zip(token_ids, logprobs, strict=True)
    ]


class TextStream:
    """Stream of the deltas of all samples of one request; producer and reader share one event loop.

    Deltas of a sample that are not read yet are merged, for a slow reader or a burst of tokens. The output itself
    therefore bounds what waits.

    Args:
        num_samples: number of samples; the stream ends when all have a finish reason.
        on_close: called once, when the stream is closed.
        on_end: called with the index of a sample that its reader ends.

    Attributes:
        prompt_token_ids: one list per prompt.
    """

    def __init__(
        self, num_samples: int, on_close: Callable[[], None], on_end: Callable[[int], None] = lambda index: None
    ) -> None:
        self.prompt_token_ids: list[list[int]] = []
        self._num_open = num_samples
        self._on_close, self._on_end = on_close, on_end
        self._ended: set[int] = set()
        self._unread: dict[int, SampleDelta] = {}
        self._error: HBServeError | None = None
        self._reader: asyncio.Future[None] | None = None
        self._closed = False

    def push(self, delta: SampleDelta) -> None:
        """Add a delta."""
        if delta.index in self._ended:
            return
        before = self._unread.get(delta.index)
        self._unread[delta.index] = delta if before is None else _merge(before, delta)
        if delta.finish_reason is not None:
            self._num_open -= 1
            self._ended.add(delta.index)
        self._wake()

    def end_sample(self, index: int) -> None:
        """End a sample whose output so far is all that the reader needs; it gets no more deltas of it."""
        if index not in self._ended:
            self._ended.add(index)
            self._num_open -= 1
            self._on_end(index)
        self._unread.pop(index, None)

    def fail(self, error: HBServeError) -> None:
        """End the stream with an error, which the reader gets after all earlier deltas."""
        self._error = self._error or error
        self._wake()

    async def read(self) -> list[SampleDelta]:
        """Wait for new deltas, at most one per sample; returns an empty list when all samples are finished.

        If there are many samples, it returns a part of them, and the next call returns more without a turn of the loop.

        Raises:
            InvalidRequestError, OverloadedError, RequestFailedError, EngineDeadError: the error given to `fail`.
        """
        while True:
            if self._unread:
                if len(self._unread) <= _MAX_DELTAS_PER_READ:
                    deltas = list(self._unread.values())
                    self._unread.clear()
                    return deltas
                first = list(itertools.islice(self._unread, _MAX_DELTAS_PER_READ))
                return [self._unread.pop(index) for index in first]
            if self._error is not None:
                raise self._error
            if self._num_open <= 0:
                return []
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None

    async def deltas(self) -> AsyncGenerator[SampleDelta]:
        """Yield all deltas to the end; closing the iteration closes the stream. Errors as in `read`."""
        try:
            while deltas := await self.read():
                for delta in deltas:
                    yield delta
        finally:
            self.close()

    def close(self) -> None:
        """End the reading: samples that are not finished are aborted. May be called twice."""
        if not self._closed:
            self._closed = True
            self._on_close()
            # They refer to the samples, which refer to this stream: no cycle may be left to the garbage collector.
            self._on_close, self._on_end = _nothing, _nothing

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _nothing(index: int = 0) -> None:
    pass


def _merge(first: SampleDelta, second: SampleDelta) -> SampleDelta:
    logprobs = first.logprobs
    if second.logprobs is not None:
        logprobs = [*(first.logprobs or []), *second.logprobs]
    prompt_logprobs = first.prompt_logprobs
    if second.prompt_logprobs is not None:
        prompt_logprobs = [*(first.prompt_logprobs or []), *second.prompt_logprobs]
    return msgspec.structs.replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=logprobs,
        num_cached_tokens=first.num_cached_tokens + second.num_cached_tokens,
        prompt_logprobs=prompt_logprobs,
        num_accepted=first.num_accepted + second.num_accepted,
        num_rejected=first.num_rejected + second.num_rejected,
    )
