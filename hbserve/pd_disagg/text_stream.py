"""What one request's samples have grown by, from where it is found out to where it is read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import msgspec

from hbserve.errors import HBServeError
from hbserve.pd_disagg.generation_output import SampleDelta


class TextStream:
    """The deltas of all samples of one request, as they come.

    A reader that is slow, or a burst of tokens, finds several deltas of a sample merged into one: what
    waits to be read is bounded by the output itself.

    Args:
        num_samples: the stream is over when so many have a finish reason.
        on_close: called once, when it is closed.

    Attributes:
        prompt_token_ids: one list per prompt.
    """

    def __init__(self, num_samples: int, on_close: Callable[[], None]) -> None:
        self.prompt_token_ids: list[list[int]] = []
        self._num_open = num_samples
        self._on_close = on_close
        self._waiting: dict[int, SampleDelta] = {}
        self._error: HBServeError | None = None
        self._reader: asyncio.Future[None] | None = None
        self._closed = False

    def push(self, delta: SampleDelta) -> None:
        """Add what a sample has grown by."""
        before = self._waiting.get(delta.index)
        self._waiting[delta.index] = delta if before is None else _merge(before, delta)
        if delta.finish_reason is not None:
            self._num_open -= 1
        self._wake()

    def fail(self, error: HBServeError) -> None:
        """End the stream with an error, once what has come before has been read."""
        self._error = self._error or error
        self._wake()

    async def read(self) -> list[SampleDelta]:
        """Everything new, at most one delta per sample; empty when all samples are finished.

        Raises:
            InvalidRequestError, OverloadedError, RequestFailedError, EngineDeadError: when it happened.
        """
        while True:
            if self._waiting:
                deltas = list(self._waiting.values())
                self._waiting.clear()
                return deltas
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
        """All deltas to the end; closing the iteration closes the stream. Errors as in `read`."""
        try:
            while deltas := await self.read():
                for delta in deltas:
                    yield delta
        finally:
            self.close()

    def close(self) -> None:
        """Nobody reads any more: what is still open is aborted. May be called twice."""
        if not self._closed:
            self._closed = True
            self._on_close()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _merge(first: SampleDelta, second: SampleDelta) -> SampleDelta:
    logprobs = first.logprobs
    if second.logprobs is not None:
        logprobs = [*(first.logprobs or []), *second.logprobs]
    return msgspec.structs.replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=logprobs,
        num_cached_tokens=first.num_cached_tokens + second.num_cached_tokens,
    )
