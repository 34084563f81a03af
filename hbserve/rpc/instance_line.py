"""Line between the scheduler and an instance: typed messages over ZeroMQ, and the addresses of both.

The instance listens and the scheduler connects, so both may start in any order, and each may be restarted.
The scheduler speaks first (`Ping`); an instance answers the scheduler that it obeys.
`RpcClient` runs in the scheduler's event loop, `RpcServer` in that of the instance's rank 0. Clients of the scheduler
(`hbserve.frontend.engine_client`) use `RpcClient`, too.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from hbserve.config import Config, InstanceConfig
from hbserve.errors import StartupError
from hbserve.messages.supervisor import ReportEvent
from hbserve.messages.worker import InstanceCommand, InstanceReply
from hbserve.rpc.async_socket import LOGIN_TIMEOUT_MS, MAX_MESSAGE_BYTES, AsyncSocket, SocketClosed
from hbserve.rpc.cluster_key import ClusterKey, Doorkeeper
from hbserve.rpc.inbox import Inbox, OnDropped

T = TypeVar("T")

_MAX_SOCKET_PATH_BYTES = 107
"""Limit of Linux, see unix(7)."""


def instance_address(instance: InstanceConfig, run_dir: str | None) -> str:
    """Return where the scheduler finds an instance: host and port, or a socket file in the launcher's folder."""
    if instance.port is not None:
        return f"tcp://{instance.host}:{instance.port}"
    return _private_socket(f"gpu_instances: {instance.instance_id}: port", f"instance-{instance.instance_id}", run_dir)


def bind_address(instance: InstanceConfig, address: str) -> str:
    """Return where an instance listens, given the address under which the scheduler finds it."""
    if instance.bind is None or not address.startswith("tcp:"):
        return address
    return f"tcp://{instance.bind}:{instance.port}"


def scheduler_address(config: Config, run_dir: str | None) -> str:
    """Return where the scheduler listens for clients."""
    if config.rpc.port is not None:
        return f"tcp://{config.rpc.host}:{config.rpc.port}"
    return _private_socket("rpc.port", "scheduler", run_dir)


def _private_socket(key: str, name: str, run_dir: str | None) -> str:
    if run_dir is None:
        raise StartupError(f"{key}: parts that are started separately need a port to find each other; set one")
    path = f"{run_dir}/{name}.sock"
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
        raise StartupError(
            f"TMPDIR: the path of a socket has at most {_MAX_SOCKET_PATH_BYTES} bytes, and {path} has more; "
            f"name a shorter folder, or set {key}"
        )
    return f"ipc://{path}"


def bind(
    listener: AsyncSocket, address: str, what: str, key: ClusterKey | None, max_bytes: int = MAX_MESSAGE_BYTES
) -> Doorkeeper | None:
    """Bind a listener; over TCP it accepts only holders of ``key``, and no frame over ``max_bytes``.

    Returns:
        Authenticator to be closed after the socket; None without TCP or key.

    Raises:
        StartupError: naming the listening part (``what``) and the address.
    """
    listener.socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    listener.socket.setsockopt(zmq.HANDSHAKE_IVL, LOGIN_TIMEOUT_MS)
    doorkeeper = key.for_binding(listener.socket, address) if key is not None else None
    try:
        listener.socket.bind(_numeric(address))
        return doorkeeper
    except zmq.ZMQError as error:
        if doorkeeper is not None:
            doorkeeper.close()
        raise StartupError(f"{what} cannot listen on {address}: {error.strerror}") from None


def _numeric(address: str) -> str:
    """Resolve the host's name in an address: ZeroMQ listens only on addresses and interfaces."""
    scheme, _, rest = address.partition("://")
    host, colon, port = rest.rpartition(":")
    if scheme != "tcp" or host in [name for _, name in socket.if_nameindex()]:
        return address
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        what = f"{host} is neither an address, nor a network interface, nor a known host"
        raise StartupError(f"{what}: {error}") from None
    return f"tcp://{found[0][4][0]}{colon}{port}"


class RpcClient(Generic[T]):
    """Connecting end of a line: the scheduler's to an instance, or a client's to the scheduler.

    Each connection has a socket of its own, so that nothing that was sent on one arrives on the next.

    Args:
        receives: union of the types of the messages that arrive here.

    Attributes:
        on_connected: called when a connection is made.
        on_dropped: see `Inbox`.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        key: ClusterKey | None = None,
        receives: Any = InstanceReply,
    ) -> None:
        self.address = address
        self._receives = receives
        self._context = context
        self._key = key
        self._encoder = msgspec.msgpack.Encoder()
        self.on_connected: Callable[[], None] = lambda: None
        self.on_dropped: OnDropped = lambda sender, what: None
        self._open()

    def _open(self) -> None:
        """Open a socket for one connection. Until it is connected, `send` drops messages, so that none queue up.

        Not ``zmq.IMMEDIATE``: that discards messages of a lost connection that have arrived and are not read yet.
        """
        self._is_connected = False
        self._socket = AsyncSocket(self._context.socket(zmq.DEALER))
        self._inbox: Inbox[T] = Inbox(
            self._socket, self._receives, self.address, lambda *dropped: self.on_dropped(*dropped)
        )
        self._socket.socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
        if self._key is not None:
            self._key.for_connecting(self._socket.socket, self.address)
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        self._monitor = AsyncSocket(self._socket.socket.get_monitor_socket(events))
        self._socket.socket.connect(self.address)

    async def wait_disconnected(self) -> None:
        """Wait until the connection breaks, which reveals a dead process sooner than a missing heartbeat does.

        When this returns, `receive` has delivered all messages from before the end, which may tell the reason.
        The caller must await this in a loop: it also notices new connections.
        """
        while True:
            try:
                frames = await self._monitor.receive()
            except SocketClosed:
                continue  # `reconnect` has made another
            event = parse_monitor_message(frames)["event"]
            self._is_connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if not self._is_connected:
                break
            self.on_connected()
        self._socket.look()
        await asyncio.sleep(0)
        self.reconnect()

    def reconnect(self) -> None:
        """Give up the connection, if there is one, and connect anew. `wait_disconnected` does not return for that."""
        self.close()
        self._open()

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection, as far as is known here."""
        return self._is_connected

    def send(self, message: msgspec.Struct) -> bool:
        """Send without waiting; False if there is no connection."""
        return self._is_connected and self.send_encoded(self._encoder.encode(message))

    def send_encoded(self, payload: bytes) -> bool:
        """Send an encoded message, as `send`."""
        if self._is_connected:
            self._socket.send([payload])
        return self._is_connected

    async def receive(self) -> T:
        """Wait for the next reply."""
        while True:
            try:
                _, reply = await self._inbox.receive()
            except SocketClosed:
                continue  # the next connection has another socket
            return reply

    def close(self, linger_ms: int = 0) -> None:
        """Close; messages that were sent before may still leave for ``linger_ms``."""
        self._socket.socket.disable_monitor()
        self._monitor.close()
        self._socket.close(linger_ms)


class RpcServer:
    """Instance's end of the line to its scheduler, which needs ``key`` if it connects over TCP.

    Args:
        name: of the instance, for events.

    Raises:
        StartupError: if the address is not available.
    """

    def __init__(self, address: str, key: ClusterKey | None = None, name: str = "an instance") -> None:
        self._name = name
        self._encoder = msgspec.msgpack.Encoder()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = AsyncSocket(self._context.socket(zmq.ROUTER))
        self._doorkeeper = bind(self._socket, address, "the instance", key)
        self._inbox: Inbox[InstanceCommand] = Inbox(self._socket, InstanceCommand, "a scheduler", self._on_dropped)
        self._peer: bytes | None = None

    async def receive(self) -> tuple[bytes, InstanceCommand]:
        """Wait for the next command; returns its sender and the command."""
        return await self._inbox.receive()

    def _on_dropped(self, sender: str, what: str) -> None:
        self.send(ReportEvent(kind="message_dropped", subject=f"{sender} of {self._name}", text=what))

    def answer_to(self, peer: bytes) -> None:
        """Send replies to this scheduler from now on."""
        self._peer = peer

    def is_answering(self, peer: bytes) -> bool:
        """Whether replies go to this peer. Only its commands count: the scheduler pings before any other command."""
        return peer == self._peer

    def send(self, reply: InstanceReply) -> None:
        """Send a reply; dropped if no scheduler has spoken yet, or if it has disconnected."""
        if self._peer is not None:
            self.send_to(self._peer, reply)

    def send_to(self, peer: bytes, reply: InstanceReply) -> None:
        """Send a reply to a peer, whether replies go there or not."""
        self._socket.send([peer, self._encoder.encode(reply)])

    def close(self) -> None:
        """Close; replies that were just sent still leave."""
        self._socket.close(linger_ms=500)
        if self._doorkeeper is not None:
            self._doorkeeper.close()
        self._context.term()
