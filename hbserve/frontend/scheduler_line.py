"""A client's line to the scheduler, which may end, hang, and be started again. Runs in the client's event loop.

The states of the line, and what leads from one to another::

    connecting ──► connected ──► attached        Attached(takes_requests=False), then True
        ▲   │          │             │
        │   └──────────┴─────────────┤           the connection breaks, or the scheduler is silent
        └────────────────────────────┘
    every state ──► dead                         the scheduler does not come back
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from enum import StrEnum
from typing import Any

import zmq

from hbserve.config import RpcConfig
from hbserve.messages.client import Attach, Attached, ClientMessage, SchedulerReply
from hbserve.rpc.cluster_key import ClusterKey
from hbserve.rpc.instance_line import RpcClient

_RECONNECT_DELAY_S = 0.05


class LineState(StrEnum):
    """State of a line; `NEXT_STATES` has the legal transitions."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    ATTACHED = "attached"
    DEAD = "dead"


NEXT_STATES = {
    LineState.CONNECTING: {LineState.CONNECTING, LineState.CONNECTED, LineState.DEAD},
    LineState.CONNECTED: {LineState.CONNECTING, LineState.ATTACHED, LineState.DEAD},
    LineState.ATTACHED: {LineState.CONNECTING, LineState.DEAD},
    LineState.DEAD: {LineState.DEAD},
}


class SchedulerLine:
    """Connects to one scheduler after the other, and notices when a scheduler ends or is silent.

    Args:
        address: ZeroMQ address of the scheduler's client socket.
        rpc: a scheduler that is silent for ``heartbeat_timeout_s`` is given up; one that has not come back after
            ``recovery_timeout_s`` is overdue.
        key: cluster key, if the system has one.
        client_id: name under which the client attaches.
        on_connection: called when there is a connection.
        on_lost: called when the scheduler has ended or was given up, with the reason, and with whether a scheduler is
            awaited from now on.
        on_silent: called after ``on_lost`` if the scheduler was given up for its silence, with what it did, in words
            that follow its name. It may still run.
        on_overdue: called at each heartbeat while the scheduler is overdue.

    Attributes:
        state: of the line; only `enter` changes it.
        last_heard: when the scheduler's last message came, on the monotonic clock.
        num_losses: how often a scheduler was lost.
        lost_since: since when a scheduler is awaited, likewise; None: there is one, or there never was.
        why_lost: the reason of the latest loss.
    """

    def __init__(
        self,
        address: str,
        rpc: RpcConfig,
        key: ClusterKey | None,
        client_id: str,
        on_connection: Callable[[], None],
        on_lost: Callable[[str, bool], None],
        on_silent: Callable[[str], None],
        on_overdue: Callable[[], None],
    ) -> None:
        self.address = address
        self._rpc, self._key, self._client_id = rpc, key, client_id
        self._on_connection, self._on_lost = on_connection, on_lost
        self._on_silent, self._on_overdue = on_silent, on_overdue
        self.state = LineState.CONNECTING
        self.last_heard = time.monotonic()
        self.num_losses = 0
        self.lost_since: float | None = None
        self.why_lost = ""
        self._scheduler_epoch: int | None = None  # of the scheduler that was attached last

    def open(self) -> None:
        """Open the line. The scheduler may start later."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._client: RpcClient[SchedulerReply] = RpcClient(self._context, self.address, self._key, SchedulerReply)
        self._client.on_connected = self._on_connected

    def close(self, linger_ms: int) -> None:
        """Close the line; messages that were sent have ``linger_ms`` to leave."""
        self._client.close(linger_ms=linger_ms)
        self._context.term()

    def enter(self, state: LineState) -> None:
        """Change the state."""
        assert state in NEXT_STATES[self.state], f"{self.state} -> {state}"
        self.state = state

    @property
    def is_connected(self) -> bool:
        """Whether a scheduler has answered on this connection."""
        return self.state in (LineState.CONNECTED, LineState.ATTACHED)

    @property
    def is_attached(self) -> bool:
        """Whether the scheduler takes requests."""
        return self.state is LineState.ATTACHED

    def send(self, message: ClientMessage) -> bool:
        """Send a message; returns False if there is no connection."""
        return self._client.send(message)

    def send_encoded(self, message: bytes) -> bool:
        """Send an encoded message; returns False if there is no connection."""
        return self._client.send_encoded(message)

    async def receive(self) -> SchedulerReply:
        """Return the next message."""
        reply = await self._client.receive()
        self.last_heard = time.monotonic()
        return reply

    def on_attached(self, attached: Attached) -> bool:
        """The scheduler takes requests now; returns whether it is another one than the one before."""
        is_another = self._scheduler_epoch not in (None, attached.scheduler_epoch)
        self._scheduler_epoch = attached.scheduler_epoch
        self.enter(LineState.ATTACHED)
        self.lost_since = None
        return is_another

    def give_up(self) -> None:
        """Wait for no scheduler any more."""
        self.enter(LineState.DEAD)
        self.lost_since = None

    # --- what happens to the connection ----------------------------------------------------------

    def watch(self) -> list[Coroutine[Any, Any, None]]:
        """Return the work that notices losses, for tasks of the client."""
        return [self._watch_connection(), self._watch_scheduler()]

    def _on_connected(self) -> None:
        """There is a connection: find out whether a scheduler answers, and whether it takes requests."""
        self.last_heard = time.monotonic()
        self.send(Attach(client_id=self._client_id))
        self._on_connection()

    def _lose(self, reason: str) -> None:
        """Note that the connection is broken. The next one leads to the next scheduler, or to the same one."""
        self.num_losses += 1
        if self.state is LineState.DEAD:
            return
        self.enter(LineState.CONNECTING)
        is_first = self.lost_since is None and self._scheduler_epoch is not None
        if is_first:
            self.lost_since, self.why_lost = time.monotonic(), reason
        self._on_lost(reason, is_first)

    async def _watch_connection(self) -> None:
        while True:
            await self._client.wait_disconnected()
            self._lose("the scheduler has ended")
            await asyncio.sleep(_RECONNECT_DELAY_S)

    async def _watch_scheduler(self) -> None:
        """Give up a silent scheduler: one that hangs does not close its connection. Give up waiting for one, too."""
        interval_s, timeout_s = self._rpc.heartbeat_interval_s, self._rpc.heartbeat_timeout_s
        last = time.monotonic()
        while self.state is not LineState.DEAD:
            await asyncio.sleep(interval_s)
            now = time.monotonic()
            if now - last > 4 * interval_s + 1.0:  # this process was suspended, and has not read what has come
                self.last_heard = now
            last = now
            silence_s = now - self.last_heard
            if self._client.is_connected and silence_s > timeout_s:
                what = f"gave no sign of life for {silence_s:.1f} s"
                self._client.reconnect()
                self._lose(f"the scheduler {what}")
                self._on_silent(what)
            elif self._client.is_connected:
                self.send(Attach(client_id=self._client_id))
            if self.lost_since is not None and now - self.lost_since > self._rpc.recovery_timeout_s:
                self._on_overdue()
