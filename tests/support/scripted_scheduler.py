"""A scheduler that says what a test tells it to, on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Self

import msgspec
import zmq
import zmq.asyncio

from hbserve.messages.admin import GetStats, Stats
from hbserve.messages.base import TokenLogprobs
from hbserve.messages.client import (
    AbortRequest,
    AddRequest,
    Attach,
    Attached,
    ClientMessage,
    OutputBatch,
    Ready,
    RequestOutput,
    SchedulerReply,
    SubscribeReady,
)
from hbserve.messages.supervisor import ReportEvent

DEADLINE_S = 20.0

Script = Callable[[AddRequest], AsyncIterator[RequestOutput]]


def tokens(*token_ids: int, end: str | None = "length") -> Script:
    """Answer each request with these tokens, one by one, within its ``max_tokens``."""

    async def script(request: AddRequest) -> AsyncIterator[RequestOutput]:
        limit = request.sampling.max_tokens
        assert limit is not None
        chosen = token_ids[:limit]
        for position, token_id in enumerate(chosen):
            finish_reason = end if position == len(chosen) - 1 else None
            if token_id in request.end_token_ids:
                finish_reason = "stop"
            yield output(request, token_id, finish_reason=finish_reason, num_cached_tokens=0 if position else 2)
            if finish_reason is not None:
                return

    return script


def fails(kind: str, message: str, after: int = 0) -> Script:
    """Answer with some tokens, then an error of that kind."""

    async def script(request: AddRequest) -> AsyncIterator[RequestOutput]:
        for _ in range(after):
            yield output(request, 50)
        yield RequestOutput(
            request_id=request.request_id, token_ids=[], finish_reason="error", error=message, error_kind=kind
        )

    return script


def output(request: AddRequest, *token_ids: int, finish_reason: str | None = None, **more: Any) -> RequestOutput:
    """One output; log-probabilities, if asked for, are made up but tell tokens and ranks apart."""
    logprobs = None
    if request.sampling.logprobs is not None:
        ranks = range(request.sampling.logprobs)
        logprobs = [
            TokenLogprobs(token=-0.5, top_ids=[token_id + rank for rank in ranks], top=[-0.5 - rank for rank in ranks])
            for token_id in token_ids
        ]
    return RequestOutput(
        request_id=request.request_id,
        token_ids=list(token_ids),
        logprobs=logprobs,
        finish_reason=finish_reason,
        **more,
    )


class ScriptedScheduler:
    """Speaks `hbserve.messages` on a ROUTER socket.

    Attributes:
        script: what becomes of new requests; a test sets it.
        requests, aborts: what came in, in order.
        stats: the answer to `GetStats`; None: no answer.
        events: reports that came in.
        num_messages: all that came in.
        is_silent: answers nothing.
    """

    def __init__(
        self,
        folder: Path,
        max_model_len: int = 64,
        vocab_size: int = 400,
        epoch: int = 1,
        takes_requests: bool = True,
    ) -> None:
        self.address = f"ipc://{folder}/scheduler"
        self.script: Script = tokens(50, 51, 52)
        self.requests: list[AddRequest] = []
        self.aborts: list[AbortRequest] = []
        self.events: list[ReportEvent] = []
        self.num_messages = 0
        self.is_silent = False
        self._attached = Attached(scheduler_epoch=epoch, takes_requests=takes_requests)
        self.stats: dict[str, Any] | None = {"gpu_instances": {"unified-0": {"status": "ready", "role": "unified"}}}
        self._ready = Ready(max_model_len=max_model_len, vocab_size=vocab_size)
        self._came = asyncio.Condition()
        self._running: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        # As the real one: a burst is queued. A ROUTER drops what exceeds its limit.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(self.address)
        self._receiver = asyncio.create_task(self._receive())
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [self._receiver, *self._running.values()]
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        self._socket.close(linger=0)
        self._context.term()
        bugs = [r for r in results if isinstance(r, Exception)]
        assert not bugs, bugs

    async def wait_for(self, holds: Callable[[], bool]) -> None:
        """Until something that has come in makes it true."""
        async with asyncio.timeout(DEADLINE_S), self._came:
            await self._came.wait_for(holds)

    async def wait_for_aborts(self, number: int) -> None:
        """Until that many requests have been aborted."""
        await self.wait_for(lambda: len({abort.request_id for abort in self.aborts}) >= number)

    async def _receive(self) -> None:
        decoder = msgspec.msgpack.Decoder(ClientMessage)
        while True:
            client, frame = await self._socket.recv_multipart()
            message = decoder.decode(frame)
            self.num_messages += 1
            match message:
                case AddRequest():
                    self.requests.append(message)
                    self._running[message.request_id] = asyncio.create_task(self._run(client, message))
                case AbortRequest():
                    self.aborts.append(message)
                    task = self._running.pop(message.request_id, None)
                    if task is not None:
                        task.cancel()
                        end = RequestOutput(
                            request_id=message.request_id, token_ids=[], finish_reason=message.finish_reason
                        )
                        await self._send(client, OutputBatch(outputs=[end]))
                case GetStats():
                    if self.stats is not None:
                        await self._send(client, Stats(query_id=message.query_id, stats=self.stats))
                case Attach():
                    await self._send(client, self._attached)
                case ReportEvent():
                    self.events.append(message)
                case SubscribeReady():
                    await self._send(client, self._ready)
            async with self._came:
                self._came.notify_all()

    async def _run(self, client: bytes, request: AddRequest) -> None:
        async for one in self.script(request):
            await self._send(client, OutputBatch(outputs=[one]))
        self._running.pop(request.request_id, None)

    async def _send(self, client: bytes, reply: SchedulerReply) -> None:
        if not self.is_silent:
            await self._socket.send_multipart([client, msgspec.msgpack.encode(reply)])
