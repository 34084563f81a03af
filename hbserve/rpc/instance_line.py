"""The control plane between scheduler and instances: typed messages over ZeroMQ.

The instance listens, the scheduler connects, so both may start in any order and either may come
back. The scheduler speaks first (`Ping`); an instance answers whoever spoke to it last.
"""

from __future__ import annotations

import asyncio
import os
import socket

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from hbserve.config import Config, InstanceConfig
from hbserve.errors import StartupError
from hbserve.messages.worker import InstanceCommand, InstanceReply
from hbserve.rpc.async_socket import AsyncSocket, SocketClosed
from hbserve.rpc.cluster_key import ClusterKey, Doorkeeper

_MAX_SOCKET_PATH_BYTES = 107
"""Linux's, see unix(7)."""


def instance_address(instance: InstanceConfig, run_dir: str | None) -> str:
    """Where an instance listens: its host and port, or a socket file in the launcher's private folder."""
    if instance.port is not None:
        return f"tcp://{instance.host}:{instance.port}"
    return _private_socket(f"gpu_instances: {instance.instance_id}: port", f"instance-{instance.instance_id}", run_dir)


def bind_address(instance: InstanceConfig, address: str) -> str:
    """Where an instance really listens, given where it is to be found."""
    if instance.bind is None or not address.startswith("tcp:"):
        return address
    return f"tcp://{instance.bind}:{instance.port}"


def scheduler_address(config: Config, run_dir: str | None) -> str:
    """Where the scheduler listens for clients."""
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


def bind(listener: AsyncSocket, address: str, what: str, key: ClusterKey | None) -> Doorkeeper | None:
    """Bind, or say what could not listen where.

    Args:
        key: that clients over TCP must have.

    Returns:
        To be closed after the socket.

    Raises:
        StartupError
    """
    keeper = key.for_binding(listener.socket, address) if key is not None else None
    try:
        listener.socket.bind(_numeric(address))
        return keeper
    except zmq.ZMQError as error:
        if keeper is not None:
            keeper.close()
        raise StartupError(f"{what} cannot listen on {address}: {error.strerror}") from None


def _numeric(address: str) -> str:
    """ZeroMQ listens on addresses and interfaces, not on names."""
    scheme, _, rest = address.partition("://")
    host, colon, port = rest.rpartition(":")
    if scheme != "tcp" or host in [name for _, name in socket.if_nameindex()]:
        return address
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        raise StartupError(
            f"{host} is neither an address, nor a network interface, nor a known host: {error}"
        ) from None
    return f"tcp://{found[0][4][0]}{colon}{port}"


class RpcClient:
    """The scheduler's end of the line to one instance.

    Args:
        context: the scheduler's ZeroMQ context.
        address: where the instance listens.
        key: of the cluster, if there is one.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, key: ClusterKey | None = None) -> None:
        self.address = address
        self._context = context
        self._key = key
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(InstanceReply)
        self._open()

    def _open(self) -> None:
        """A socket for one connection; until it is there, nothing is sent: nothing queues up for who is away.

        Not ``zmq.IMMEDIATE``, which throws away what a lost connection brought and nobody has read yet.
        """
        self._is_connected = False
        self._socket = AsyncSocket(self._context.socket(zmq.DEALER))
        self._socket.socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        if self._key is not None:
            self._key.for_connecting(self._socket.socket, self.address)
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        self._monitor = AsyncSocket(self._socket.socket.get_monitor_socket(events))
        self._socket.socket.connect(self.address)

    async def wait_disconnected(self) -> None:
        """Wait for the connection to break: sooner than a missing heartbeat tells that a process has died.

        Whoever waits in `receive` has had what came before the end when this returns: it may say why.
        To be awaited again and again: it is what notices connections.
        """
        while True:
            frames = await self._monitor.receive()
            event = parse_monitor_message(frames)["event"]
            self._is_connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if not self._is_connected:
                break
        self._socket.look()
        await asyncio.sleep(0)
        self.close()
        self._open()

    def send(self, command: InstanceCommand) -> bool:
        """Send without waiting; False if the instance is not connected."""
        if self._is_connected:
            self._socket.send([self._encoder.encode(command)])
        return self._is_connected

    async def receive(self) -> InstanceReply:
        """The next reply.

        Raises:
            msgspec.DecodeError: if what came is not a reply.
        """
        while True:
            try:
                (payload,) = await self._socket.receive()
            except SocketClosed:
                continue  # there is another for the next connection
            reply: InstanceReply = self._decoder.decode(payload)
            return reply

    def close(self) -> None:
        """Close at once; what is queued is dropped."""
        self._socket.socket.disable_monitor()
        self._monitor.close()
        self._socket.close()


class RpcServer:
    """An instance's end of the line to its scheduler.

    Args:
        address: where to listen.
        key: that the scheduler must have, if it comes over TCP.

    Raises:
        StartupError: if the address cannot be had.
    """

    def __init__(self, address: str, key: ClusterKey | None = None) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(InstanceCommand)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = AsyncSocket(self._context.socket(zmq.ROUTER))
        self._keeper = bind(self._socket, address, "the instance", key)
        self._peer: bytes | None = None

    async def receive(self) -> tuple[bytes, InstanceCommand]:
        """The next command and who sent it.

        Raises:
            msgspec.DecodeError: if what came is not a command.
        """
        peer, payload = await self._socket.receive()
        return peer, self._decoder.decode(payload)

    def answer_to(self, peer: bytes) -> None:
        """From now on, replies go to this scheduler."""
        self._peer = peer

    def send(self, reply: InstanceReply) -> None:
        """Reply; dropped if no scheduler has spoken yet or it has gone."""
        if self._peer is not None:
            self._socket.send([self._peer, self._encoder.encode(reply)])

    def close(self) -> None:
        """Close; replies just sent still leave."""
        self._socket.close(linger_ms=500)
        if self._keeper is not None:
            self._keeper.close()
        self._context.term()
