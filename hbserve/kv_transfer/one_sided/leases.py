"""Leases: which senders have this rank's arena mapped, and when they can write no more.

A mapping (shared memory, CUDA IPC) cannot be taken away from a process. So the receiver holds a *lease* with each
sender of a link: a connection to a socket of the sender. The sender sends one byte on it when its writes on the link
have ended and none will start. A sender that has died sends nothing, so the receiver also waits for the end of its
process. A sender that is stopped (SIGSTOP) sends nothing either, and may write when it continues: until then, what it
may write to stays out of use.

Everything here runs in the event loop of a rank process, except `MappingLeases.end_lease`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hbserve.errors import KVTransferError, StartupError
from hbserve.kv_transfer.base import KVTransferContext
from hbserve.messages.transfer import LinkKey, Peer

_END_BYTE = b"."
_MAX_KEY_BYTES = 100


class MappingLeases:
    """Leases of one rank in an epoch: those that it has taken as a sender, and those that it has given as a receiver.

    Args:
        backend: name of the backend in the configuration, for errors.
    """

    def __init__(self, backend: str, context: KVTransferContext) -> None:
        self._backend, self._context = backend, context
        self._name = secrets.token_hex(16)
        self._given: dict[LinkKey, _Lease] = {}
        self._taken: dict[LinkKey, socket.socket] = {}
        self._unidentified: dict[socket.socket, asyncio.Task[None]] = {}  # connections whose link is not known yet
        self._ended: set[LinkKey] = set()  # before their receiver has connected

    @property
    def endpoint(self) -> str:
        """``socket host``: name of this sender's socket, and the host and network where that name is valid."""
        return f"{self._name} {_host()}"

    async def start(self) -> None:
        """Listen for receivers; called before the endpoint is announced."""
        self._loop = asyncio.get_running_loop()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.setblocking(False)
        self._listener.bind(f"\0{self._name}")  # abstract: it ends with the process
        self._listener.listen(64)
        self._loop.add_reader(self._listener, self._accept)

    # --- sender ------------------------------------------------------------------------------------

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # no more connections
            while True:
                connection, _ = self._listener.accept()
                if _peer_of(connection)[1] != os.geteuid():
                    connection.close()
                    continue
                connection.setblocking(False)
                self._unidentified[connection] = self._loop.create_task(self._identify(connection))

    async def _identify(self, connection: socket.socket) -> None:
        try:
            rank, epoch, link_epoch = map(int, (await self._loop.sock_recv(connection, _MAX_KEY_BYTES)).split())
        except (ValueError, OSError):
            connection.close()
            return
        finally:
            del self._unidentified[connection]
        key = rank, epoch, link_epoch
        self._taken[key] = connection
        if key in self._ended:
            self._ended.remove(key)
            self._end(key)

    def end_lease(self, target: Peer) -> None:
        """Tell the receiver that this side writes no more on a link. Callable from any thread."""
        self._loop.call_soon_threadsafe(self._end, target.link_key)

    def _end(self, key: LinkKey) -> None:
        connection = self._taken.pop(key, None)
        if connection is None:
            self._ended.add(key)
        else:
            _send_end(connection)

    # --- receiver ----------------------------------------------------------------------------------

    async def open_leases(self, sources: list[Peer]) -> None:
        """Connect to a link's senders; called before they learn how to map the arena.

        Raises:
            StartupError: if the end of a sender could not be seen from here.
        """
        for source in sources:
            name, _, host = source.endpoint.partition(" ")
            if host != _host():
                raise StartupError(self._explain("an instance is on another host, or has a network of its own"))
            connection = socket.socket(socket.AF_UNIX)
            connection.setblocking(False)
            try:
                await self._loop.sock_connect(connection, f"\0{name}")
                pid, _ = _peer_of(connection)
                if pid == 0:
                    raise StartupError(self._explain("an instance is in another container (PID namespace)"))
                process = os.pidfd_open(pid)
            except (ConnectionError, ProcessLookupError):  # the sender is dead or in another epoch: it will not write
                connection.close()
                continue
            except BaseException:
                connection.close()
                raise
            self._given[source.link_key] = _Lease(connection, process)
            with contextlib.suppress(ConnectionError):  # the sender has just died
                connection.send(f"{self._context.rank} {self._context.epoch} {source.link_epoch}".encode())

    def _explain(self, reason: str) -> str:
        return f"kv_transfer.backend {self._backend}: {reason}; use nccl, or mooncake over tcp or rdma"

    async def wait_until_over(self, sources: list[Peer], senders_done: bool) -> None:
        """Return when none of a link's senders can write any more.

        Args:
            senders_done: whether the senders have confirmed that already.
        """
        for key in (source.link_key for source in sources):
            if key in self._given:
                if not senders_done:
                    await self._given[key].wait_until_over()
                self._given.pop(key).close()

    # --- both --------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Return when no write of another rank can come any more; called when this side's writes have ended.

        Raises:
            KVTransferError: if a write may still come. The arena must then not be used again.
        """
        self._loop.remove_reader(self._listener)
        self._listener.shutdown(socket.SHUT_RD)  # from here on, connections are refused
        self._accept()
        self._listener.close()
        for connection, task in list(self._unidentified.items()):
            task.cancel()
            await asyncio.wait([task])
            _send_end(connection)
        for key in list(self._taken):
            self._end(key)
        try:
            async with asyncio.timeout(self._context.timeout_s):
                for key in list(self._given):
                    await self._given[key].wait_until_over()
                    self._given.pop(key).close()
        except TimeoutError:
            raise KVTransferError(
                f"kv_transfer.backend {self._backend}: a sender has not ended what it may write here "
                f"within {self._context.timeout_s:g} s; has it been stopped?"
            ) from None


@dataclass(frozen=True)
class _Lease:
    """The receiver's end of a lease; ``process`` is a file descriptor of the sender's process."""

    connection: socket.socket
    process: int

    async def wait_until_over(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            if await loop.sock_recv(self.connection, 1):
                return
        exited = asyncio.Event()
        # Readable when the process has no threads and no open files any more; the connection may be closed long before.
        loop.add_reader(self.process, exited.set)
        try:
            await exited.wait()
        finally:
            loop.remove_reader(self.process)

    def close(self) -> None:
        self.connection.close()
        os.close(self.process)


def _peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return process and user at the other end; process 0 is one without a number in this PID namespace."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def _send_end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the receiver has gone
        connection.send(_END_BYTE)
    connection.close()


@cache
def _host() -> str:
    """Name the host and network namespace, in which the names of abstract sockets are valid."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"
