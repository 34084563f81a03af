"""The scheduler's shell: sockets, clock, timer and log around the core, which decides everything.

    clients ── ROUTER ──┐                                   ┌── ROUTER ──► clients
    workers ── DEALER ──┼─► inbox ─► CpuScheduler.step ─► outbox ── DEALER ──► workers
    timer ──────────────┘                                   └──► timer, log, traces

It runs in the scheduler's process, in its one thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import zmq

from hbserve.config import Config
from hbserve.messages.client import ClientMessage, SchedulerReply
from hbserve.messages.supervisor import ReportEvent
from hbserve.messages.worker import InstanceReply
from hbserve.metrics.tracing import RequestTracer
from hbserve.policy.step_profile import StepProfile
from hbserve.rpc.async_socket import MAX_REQUEST_BYTES, AsyncSocket
from hbserve.rpc.cluster_key import ClusterKey
from hbserve.rpc.inbox import Inbox
from hbserve.rpc.instance_line import RpcClient, bind
from hbserve.scheduler.core_io import (
    ClientGone,
    ConnectionBroke,
    ConnectionMade,
    FromClient,
    FromWorker,
    InboxEvent,
    Outbox,
)
from hbserve.scheduler.scheduler import CpuScheduler

logger = logging.getLogger(__name__)

_FULL_INBOX = 256
"""Events after which a step comes first, although more messages may be there."""


class _Line(NamedTuple):
    """The line to one worker, and the tasks that listen to it."""

    rpc: RpcClient[InstanceReply]
    tasks: tuple[asyncio.Task[None], asyncio.Task[None]]


class SchedulerShell:
    """Runs a scheduler: fills its inbox, calls it, and does what its outbox says.

    Args:
        client_address: where clients connect.
        on_learnt: called, in a thread, with step times that have been learnt.

    Raises:
        StartupError: if the client address cannot be had.
    """

    def __init__(
        self,
        scheduler: CpuScheduler,
        config: Config,
        client_address: str,
        on_learnt: Callable[[StepProfile], None] | None = None,
    ) -> None:
        self._on_learnt = on_learnt
        self._scheduler = scheduler
        self._key = ClusterKey.of(config)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._clients = AsyncSocket(self._context.socket(zmq.ROUTER))
        self._clients.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a client that left raises an error
        self._doorkeeper = bind(self._clients, client_address, "the scheduler", self._key, MAX_REQUEST_BYTES)
        self._encoder = msgspec.msgpack.Encoder()
        endpoint = config.telemetry.otlp_endpoint
        self._tracer = None if endpoint is None else RequestTracer(endpoint, time.monotonic)
        self._lines: dict[int, _Line] = {}
        self._inbox: list[InboxEvent] = []
        self._wake = asyncio.Event()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Serve until `stop`.

        Raises:
            SupersededError: workers obey a scheduler that was started later.
        """
        try:
            async with asyncio.TaskGroup() as self._tasks:  # no task ends on its own: an error in one ends all
                tasks = [self._tasks.create_task(work) for work in (self._receive_from_clients(), self._run_steps())]
                await self._stop.wait()
                for task in (*tasks, *(task for line in self._lines.values() for task in line.tasks)):
                    task.cancel()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the first one has cancelled the other tasks
        finally:
            for line in self._lines.values():
                line.rpc.close()
            self._clients.close(linger_ms=200)  # what was just sent may still leave
            if self._doorkeeper is not None:
                self._doorkeeper.close()
            self._context.term()
            if self._tracer is not None:
                self._tracer.close()

    def stop(self) -> None:
        """Make `run` return."""
        self._stop.set()

    async def _run_steps(self) -> None:
        """Do a step whenever something has happened, or when the last step asked for one."""
        loop = asyncio.get_running_loop()
        while True:
            inbox, self._inbox = self._inbox, []
            self._wake.clear()
            outbox = await self._scheduler.step_async(time.monotonic(), inbox)
            self._send(outbox)
            alarm = loop.call_later(max(0.0, outbox.call_at - time.monotonic()), self._wake.set)
            try:
                await self._wake.wait()
            finally:
                alarm.cancel()

    # --- in --------------------------------------------------------------------------------------

    async def _receive_from_clients(self) -> None:
        inbox: Inbox[ClientMessage] = Inbox(self._clients, ClientMessage, "a client", self._on_dropped)
        while True:
            await self._put(FromClient(*await inbox.receive()))

    async def _receive_from_worker(self, connection: int, rpc: RpcClient[InstanceReply]) -> None:
        while True:
            await self._put(FromWorker(connection, await rpc.receive()))

    async def _watch_connection(self, connection: int, rpc: RpcClient[InstanceReply]) -> None:
        while True:
            await rpc.wait_disconnected()
            await self._put(ConnectionBroke(connection))

    def _on_dropped(self, sender: str, what: str) -> None:
        self._note(FromClient(b"", ReportEvent(kind="message_dropped", subject=sender, text=what)))

    def _note(self, event: InboxEvent) -> None:
        self._inbox.append(event)
        self._wake.set()

    async def _put(self, event: InboxEvent) -> None:
        self._note(event)
        if len(self._inbox) >= _FULL_INBOX:
            await asyncio.sleep(0)

    # --- out -------------------------------------------------------------------------------------

    def _send(self, outbox: Outbox) -> None:
        for connection, address in outbox.connects:
            self._connect(connection, address)
        for connection, command in outbox.to_workers:
            if connection in self._lines:
                self._lines[connection].rpc.send(command)  # if it does not arrive, the worker's silence shows that
        for client, reply in outbox.to_clients:
            self._reply(client, reply)
        for connection in outbox.disconnects:
            self._disconnect(connection)
        for level, text in outbox.log:
            logger.log(level, text)
        if outbox.learnt is not None and self._on_learnt is not None:
            self._tasks.create_task(asyncio.to_thread(self._on_learnt, outbox.learnt))
        if self._tracer is not None:
            for request in outbox.ended:
                self._tracer.record(*request)

    def _connect(self, connection: int, address: str) -> None:
        rpc: RpcClient[InstanceReply] = RpcClient(self._context, address, self._key)
        rpc.on_connected = lambda: self._note(ConnectionMade(connection))
        rpc.on_dropped = self._on_dropped
        work = self._receive_from_worker(connection, rpc), self._watch_connection(connection, rpc)
        receiving, watching = (self._tasks.create_task(listening) for listening in work)
        self._lines[connection] = _Line(rpc, (receiving, watching))

    def _disconnect(self, connection: int) -> None:
        line = self._lines.pop(connection)
        for task in line.tasks:
            task.cancel()
        line.rpc.close()

    def _reply(self, client: bytes, reply: SchedulerReply) -> None:
        try:
            self._clients.send([client, self._encoder.encode(reply)])
        except zmq.ZMQError:  # EHOSTUNREACH
            self._note(ClientGone(client))
