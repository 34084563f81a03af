"""The client's end of the border to the CPU scheduler: token ids in, token ids out."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from hbserve import errors
from hbserve.config import InstanceRole
from hbserve.messages.admin import GetStats, InstanceChanged, RemoveInstance, SetRole, Stats
from hbserve.messages.client import (
    AbortRequest,
    AddRequest,
    ClientMessage,
    NotReady,
    OutputBatch,
    Ready,
    RequestOutput,
    SchedulerReply,
    SubscribeReady,
)
from hbserve.rpc.async_socket import AsyncSocket
from hbserve.rpc.cluster_key import ClusterKey

_ERROR_KINDS: dict[str, type[errors.HBServeError]] = {
    kind.__name__: kind
    for kind in (
        errors.InvalidRequestError,
        errors.OverloadedError,
        errors.RequestFailedError,
        errors.EngineDeadError,
    )
}


def error_of(output: RequestOutput) -> errors.HBServeError:
    """The typed error that an output with ``finish_reason == "error"`` stands for."""
    kind = _ERROR_KINDS.get(output.error_kind or "", errors.RequestFailedError)
    if kind is errors.InvalidRequestError:
        return errors.InvalidRequestError(output.error or "", output.error_param)
    if kind is errors.OverloadedError and output.retry_after_s is not None:
        return errors.OverloadedError(output.error or "", output.retry_after_s)
    return kind(output.error or "the request failed")


class EngineClient:
    """Sends requests to a scheduler and hands out what comes back.

    Must be used from the event loop in which `connect` was awaited.

    Args:
        address: ZeroMQ address of the scheduler's client socket.
        answer_timeout_s: a scheduler that is silent for so long while requests are open, and then does
            not answer a question for as long again, is declared dead.
        key: of the cluster, if there is one.
    """

    def __init__(self, address: str, answer_timeout_s: float = 15.0, key: ClusterKey | None = None) -> None:
        self._key = key
        self._address = address
        self._answer_timeout_s = answer_timeout_s
        self._last_heard = time.monotonic()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(SchedulerReply)
        self._streams: dict[str, Callable[[RequestOutput | errors.HBServeError], None]] = {}
        self._queries: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._query_ids = itertools.count(1)
        self._ready: asyncio.Future[Ready] | None = None
        self._dead: errors.EngineDeadError | None = None

    async def connect(self) -> None:
        """Open the socket. The scheduler may start later."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = AsyncSocket(self._context.socket(zmq.DEALER))
        if self._key is not None:
            self._key.for_connecting(self._socket.socket, self._address)
        self._socket.socket.connect(self._address)
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch_scheduler())]

    async def close(self) -> None:
        """Abort what is open and close the socket."""
        for request_id in list(self._streams):
            self.abort(request_id)
        self._fail_all(errors.EngineDeadError("the engine client was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close(linger_ms=200)  # the aborts above may still leave
        self._context.term()

    async def wait_ready(self, deadline_s: float) -> Ready:
        """Wait until every instance is registered.

        Raises:
            StartupError: at the deadline, naming who is missing, or when an instance has failed.
            EngineDeadError: if the engine was declared dead meanwhile.
        """
        self._ready = asyncio.get_running_loop().create_future()
        self._send(SubscribeReady(deadline_s=deadline_s))
        try:
            # The scheduler answers at the deadline itself; the margin is for one that does not exist.
            return await asyncio.wait_for(asyncio.shield(self._ready), deadline_s + 5.0)
        except TimeoutError:
            raise errors.StartupError(
                f"no scheduler answered at {self._address} within {deadline_s:g} s; is it running?"
            ) from None

    def open(self, request: AddRequest, sink: Callable[[RequestOutput | errors.HBServeError], None]) -> None:
        """Send a request; its outputs, and at most one error, go to ``sink`` until it ends or is closed.

        Raises:
            InvalidRequestError, EngineDeadError
        """
        if self._dead is not None:
            raise self._dead
        if request.request_id in self._streams:
            raise errors.InvalidRequestError(f"request id {request.request_id!r} is in use", "request_id")
        self._streams[request.request_id] = sink
        self._send(request)

    def close_request(self, request_id: str, finish_reason: str = "abort") -> None:
        """Nobody wants the rest of a request: end it, if it has not ended, and hear no more of it."""
        if self._streams.pop(request_id, None) is not None:
            self.abort(request_id, finish_reason)

    def abort(self, request_id: str, finish_reason: str = "abort") -> None:
        """End a request; its stream ends with ``finish_reason``. Unknown ids are ignored."""
        self._send(AbortRequest(request_id=request_id, finish_reason=finish_reason))

    async def stats(self, timeout_s: float = 10.0, recent: bool = False) -> dict[str, Any]:
        """The scheduler's view of the system.

        Args:
            recent: with ``recent``: the last requests and events, see `hbserve.scheduler.stats`.

        Raises:
            EngineDeadError: if the scheduler does not answer in time.
        """
        if self._dead is not None:
            raise self._dead
        query_id = next(self._query_ids)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._queries[query_id] = future
        try:
            self._send(GetStats(query_id=query_id, recent=recent))
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise errors.EngineDeadError(f"the scheduler did not answer within {timeout_s:g} s") from None
        finally:
            del self._queries[query_id]

    async def set_role(self, instance_id: str, role: InstanceRole, deadline_s: float = 120.0) -> None:
        """Have an instance change between prefill and decode; returns when it has.

        It gets no more requests, finishes those that it has, and then changes, with its weights and its
        prefix cache.

        Args:
            deadline_s: if it has not finished them by then, it goes on as it was.

        Raises:
            UnknownInstanceError: if there is none of that name.
            InvalidRequestError: if it cannot change, or has not finished in time; saying why.
            EngineDeadError: if the scheduler does not answer.
        """
        await self._change(
            SetRole(query_id=next(self._query_ids), instance_id=instance_id, role=role, deadline_s=deadline_s)
        )

    async def remove_instance(self, instance_id: str, deadline_s: float = 120.0) -> None:
        """Have an instance leave; returns when its process has ended, or is about to.

        It gets no more requests and finishes those that it has. It is not started again; under its name
        an instance can join later.

        Args:
            deadline_s: if it has not finished them by then, it stays.

        Raises:
            UnknownInstanceError: if there is none of that name.
            InvalidRequestError: if it cannot be spared, or has not finished in time; saying why.
            EngineDeadError: if the scheduler does not answer.
        """
        await self._change(
            RemoveInstance(query_id=next(self._query_ids), instance_id=instance_id, deadline_s=deadline_s)
        )

    async def _change(self, message: SetRole | RemoveInstance) -> None:
        if self._dead is not None:
            raise self._dead
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._queries[message.query_id] = future
        try:
            self._send(message)
            answer = await asyncio.wait_for(future, message.deadline_s + self._answer_timeout_s)
        except TimeoutError:
            raise errors.EngineDeadError("the scheduler did not answer") from None
        finally:
            del self._queries[message.query_id]
        if answer["is_unknown"]:
            raise errors.UnknownInstanceError(answer["error"], "instance_id")
        if answer["error"] is not None:
            raise errors.InvalidRequestError(answer["error"])

    def declare_dead(self, reason: str) -> None:
        """The scheduler process is gone: end every stream and query with `EngineDeadError`."""
        self._dead = errors.EngineDeadError(reason)
        self._fail_all(self._dead)

    @property
    def dead(self) -> errors.EngineDeadError | None:
        """Why no more requests are served, or None while they are."""
        return self._dead

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def _deliver(self, output: RequestOutput) -> None:
        ended = output.finish_reason is not None
        sink = self._streams.pop(output.request_id, None) if ended else self._streams.get(output.request_id)
        if sink is not None:
            sink(error_of(output) if output.finish_reason == "error" else output)

    def _fail_all(self, error: errors.EngineDeadError) -> None:
        streams, self._streams = self._streams, {}
        for sink in streams.values():
            sink(error)
        for query in self._queries.values():
            if not query.done():
                query.set_exception(error)
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)

    def _send(self, message: ClientMessage) -> None:
        self._socket.send([self._encoder.encode(message)])

    async def _watch_scheduler(self) -> None:
        """A scheduler that hangs does not close its connection; only asking finds out."""
        while self._dead is None:
            await asyncio.sleep(self._answer_timeout_s / 4)
            if not self._streams or time.monotonic() - self._last_heard < self._answer_timeout_s:
                continue
            try:
                await self.stats(self._answer_timeout_s)
            except errors.EngineDeadError as error:
                self.declare_dead(str(error))

    async def _receive(self) -> None:
        while True:
            await asyncio.sleep(0)  # messages that are there already must not keep the loop from its other work
            (payload,) = await self._socket.receive()
            self._last_heard = time.monotonic()
            reply = self._decoder.decode(payload)
            if isinstance(reply, OutputBatch):
                for output in reply.outputs:
                    self._deliver(output)
            elif isinstance(reply, Stats):
                query = self._queries.get(reply.query_id)
                if query is not None and not query.done():
                    query.set_result(reply.stats)
            elif isinstance(reply, InstanceChanged):
                query = self._queries.get(reply.query_id)
                if query is not None and not query.done():
                    query.set_result({"error": reply.error, "is_unknown": reply.is_unknown})
            elif self._ready is not None and not self._ready.done():
                if isinstance(reply, NotReady):
                    self._ready.set_exception(errors.StartupError(reply.reason))
                else:
                    self._ready.set_result(reply)
