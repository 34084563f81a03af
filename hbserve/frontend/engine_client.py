"""Client of the CPU scheduler: token ids in, token ids out. Runs in the event loop of the API server or the program."""

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
from hbserve.messages.supervisor import EventKind, ReportEvent
from hbserve.rpc.async_socket import MAX_MESSAGE_BYTES, AsyncSocket
from hbserve.rpc.cluster_key import ClusterKey
from hbserve.rpc.inbox import Inbox

_OUTPUTS_PER_TURN = 256
"""Outputs that are handled in one turn of the event loop: one request may have thousands of samples."""

OutputSink = Callable[[RequestOutput | errors.HBServeError], None]


def error_of(output: RequestOutput) -> errors.HBServeError:
    """Return the typed error of an output with ``finish_reason == "error"``."""
    if output.error_kind == "InvalidRequestError":
        return errors.InvalidRequestError(output.error or "", output.error_param)
    if output.error_kind == "OverloadedError" and output.retry_after_s is not None:
        return errors.OverloadedError(output.error or "", output.retry_after_s)
    kinds: dict[str | None, type[errors.HBServeError]] = {
        "OverloadedError": errors.OverloadedError,
        "EngineDeadError": errors.EngineDeadError,
    }
    return kinds.get(output.error_kind, errors.RequestFailedError)(output.error or "the request failed")


class EngineClient:
    """Client that sends requests to a scheduler and delivers their outputs.

    Must be used from the event loop in which `connect` was awaited.

    Args:
        address: ZeroMQ address of the scheduler's client socket.
        answer_timeout_s: a scheduler that is silent for so long while requests are open, and then does
            not answer a query for as long again, is declared dead.
        key: cluster key, if the system has one.
    """

    def __init__(self, address: str, answer_timeout_s: float = 15.0, key: ClusterKey | None = None) -> None:
        self._key = key
        self._address = address
        self._answer_timeout_s = answer_timeout_s
        self._last_heard = time.monotonic()
        self._encoder = msgspec.msgpack.Encoder()
        self._sinks: dict[str, OutputSink] = {}
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
        self._inbox: Inbox[SchedulerReply] = Inbox(self._socket, SchedulerReply, "the scheduler")
        self._socket.socket.connect(self._address)
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch_scheduler())]

    async def close(self) -> None:
        """Abort the open requests and close the socket."""
        for request_id in list(self._sinks):
            self.abort(request_id)
        self._fail_all(errors.EngineDeadError("the engine client was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close(linger_ms=200)  # the aborts above must still leave
        self._context.term()

    async def wait_ready(self, deadline_s: float) -> Ready:
        """Wait until every instance is registered.

        Raises:
            StartupError: at the deadline, naming the missing instances, or when an instance has failed.
            EngineDeadError: if the engine was declared dead meanwhile.
        """
        self._ready = asyncio.get_running_loop().create_future()
        self._send(SubscribeReady(deadline_s=deadline_s))
        try:
            # The scheduler answers at the deadline; this later one is for a scheduler that does not exist.
            return await asyncio.wait_for(asyncio.shield(self._ready), deadline_s + 5.0)
        except TimeoutError:
            raise errors.StartupError(
                f"no scheduler answered at {self._address} within {deadline_s:g} s; is it running?"
            ) from None

    def give_up_waiting(self, reason: str) -> None:
        """Make `wait_ready` raise `StartupError`, because a process that it waits for does not come any more."""
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(errors.StartupError(reason))

    def open(self, request: AddRequest, sink: OutputSink) -> None:
        """Send a request; its outputs, and at most one error, go to ``sink`` until the request ends or is closed.

        Raises:
            InvalidRequestError, EngineDeadError
        """
        if self._dead is not None:
            raise self._dead
        if request.request_id in self._sinks:
            raise errors.InvalidRequestError(f"request id {request.request_id!r} is in use", "request_id")
        encoded = self._encoder.encode(request)
        if len(encoded) > MAX_MESSAGE_BYTES:  # the scheduler's socket would close the connection
            what = f"the request has {len(encoded)} bytes; the scheduler takes at most {MAX_MESSAGE_BYTES}"
            raise errors.InvalidRequestError(what, "prompt")
        self._sinks[request.request_id] = sink
        self._socket.send([encoded])

    def close_request(self, request_id: str, finish_reason: str = "abort") -> None:
        """End a request, if it has not ended, and discard its further outputs."""
        if self._sinks.pop(request_id, None) is not None:
            self.abort(request_id, finish_reason)

    def abort(self, request_id: str, finish_reason: str = "abort") -> None:
        """End a request; its last output has ``finish_reason``. Unknown ids are ignored."""
        self._send(AbortRequest(request_id=request_id, finish_reason=finish_reason))

    async def stats(self, timeout_s: float = 10.0, recent: bool = False) -> dict[str, Any]:
        """Ask the scheduler for the state of the system.

        Args:
            recent: include ``recent``, the last requests and events; see `hbserve.scheduler.stats`.

        Raises:
            EngineDeadError: if the scheduler does not answer in time.
        """
        return await self._query(GetStats(query_id=next(self._query_ids), recent=recent), timeout_s)

    async def set_role(self, instance_id: str, role: InstanceRole, deadline_s: float = 120.0) -> None:
        """Change an instance between prefill and decode; returns when it has changed.

        The instance gets no more requests, finishes those that it has, and then changes. It keeps its weights and its
        prefix cache. An instance that has not finished its requests by the deadline keeps its role.

        Raises:
            UnknownInstanceError: if no instance has that name.
            InvalidRequestError: if the instance cannot change, or has not finished in time; saying why.
            EngineDeadError: if the scheduler does not answer.
        """
        query_id = next(self._query_ids)
        await self._change(SetRole(query_id=query_id, instance_id=instance_id, role=role, deadline_s=deadline_s))

    async def remove_instance(self, instance_id: str, deadline_s: float = 120.0) -> None:
        """Remove an instance; returns when its process has ended, or is about to.

        The instance gets no more requests and finishes those that it has. It is not started again; another instance
        can join later under its name. An instance that has not finished its requests by the deadline stays.
        Errors as in `set_role`.
        """
        query_id = next(self._query_ids)
        await self._change(RemoveInstance(query_id=query_id, instance_id=instance_id, deadline_s=deadline_s))

    async def _change(self, message: SetRole | RemoveInstance) -> None:
        answer = await self._query(message, message.deadline_s + self._answer_timeout_s)
        if answer["is_unknown"]:
            raise errors.UnknownInstanceError(answer["error"], "instance_id")
        if answer["error"] is not None:
            raise errors.InvalidRequestError(answer["error"])

    async def _query(self, message: GetStats | SetRole | RemoveInstance, timeout_s: float) -> dict[str, Any]:
        if self._dead is not None:
            raise self._dead
        future = self._queries[message.query_id] = asyncio.get_running_loop().create_future()
        try:
            self._send(message)
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise errors.EngineDeadError(f"the scheduler did not answer within {timeout_s:g} s") from None
        finally:
            del self._queries[message.query_id]

    def report_event(self, kind: EventKind, subject: str, text: str) -> None:
        """Add an event of this process to the system's events; see `hbserve.messages.supervisor.ReportEvent`."""
        self._send(ReportEvent(kind=kind, subject=subject, text=text))

    def declare_dead(self, reason: str) -> None:
        """End every request and query with `EngineDeadError`, because the scheduler has ended or does not answer."""
        self._dead = errors.EngineDeadError(reason)
        self._fail_all(self._dead)

    @property
    def dead(self) -> errors.EngineDeadError | None:
        """Reason why no more requests are served; None while the scheduler lives."""
        return self._dead

    @property
    def num_open(self) -> int:
        """Number of requests that have not ended."""
        return len(self._sinks)

    def _fail_all(self, error: errors.EngineDeadError) -> None:
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink(error)
        for query in self._queries.values():
            if not query.done():
                query.set_exception(error)
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)

    def _send(self, message: ClientMessage) -> None:
        self._socket.send([self._encoder.encode(message)])

    async def _watch_scheduler(self) -> None:
        """Query a silent scheduler: one that hangs does not close its connection."""
        while self._dead is None:
            await asyncio.sleep(self._answer_timeout_s / 4)
            if not self._sinks or time.monotonic() - self._last_heard < self._answer_timeout_s:
                continue
            try:
                await self.stats(self._answer_timeout_s)
            except errors.EngineDeadError as error:
                self.declare_dead(str(error))

    async def _receive(self) -> None:
        while True:
            await asyncio.sleep(0)  # a queue of messages must not block the loop's other work
            _, reply = await self._inbox.receive()
            self._last_heard = time.monotonic()
            match reply:
                case OutputBatch(outputs=outputs):
                    for number, output in enumerate(outputs, start=1):
                        self._on_output(output)
                        if number % _OUTPUTS_PER_TURN == 0:
                            await asyncio.sleep(0)
                case Stats(query_id=query_id, stats=stats):
                    self._on_answer(query_id, stats)
                case InstanceChanged() as changed:
                    self._on_answer(changed.query_id, {"error": changed.error, "is_unknown": changed.is_unknown})
                case NotReady(reason=reason):
                    self.give_up_waiting(reason)
                case Ready() as ready:
                    if self._ready is not None and not self._ready.done():
                        self._ready.set_result(ready)

    def _on_output(self, output: RequestOutput) -> None:
        has_ended = output.finish_reason is not None
        sink = self._sinks.pop(output.request_id, None) if has_ended else self._sinks.get(output.request_id)
        if sink is not None:
            sink(error_of(output) if output.finish_reason == "error" else output)

    def _on_answer(self, query_id: int, answer: dict[str, Any]) -> None:
        query = self._queries.get(query_id)
        if query is not None and not query.done():
            query.set_result(answer)
