"""A parent's side of a child process; `hbserve.process.child` is the other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from hbserve.errors import StartupError
from hbserve.process.child import environment as child_environment

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 20.0
_ABORT_TIMEOUT_S = 5.0


class ChildProcess:
    """One process started from orders.

    Args:
        name: for messages.
        module: what it runs, as ``python -m``.
        orders: JSON-serialisable, sent on its standard input.
        arguments: of its command line.
    """

    def __init__(self, name: str, module: str, orders: dict[str, Any], arguments: Sequence[str] = ()) -> None:
        self.name = name
        self._module = module
        self._orders = orders
        self._arguments = arguments
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process; it becomes ready later."""
        # Not a pipe: uvloop closes the descriptor of what is no socket twice, and by the second time it may be that of
        # a socket which a thread of ZeroMQ has just made.
        ours, theirs = socket.socketpair()
        try:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self._module,
                *self._arguments,
                stdin=asyncio.subprocess.PIPE,
                env=child_environment(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the launcher, which then ends its children in order
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._status = ours
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(self._orders).encode() + b"\n")
        with contextlib.suppress(ConnectionError):
            await self.process.stdin.drain()

    async def wait_ready(self, deadline: float) -> None:
        """Wait for its word that it is ready.

        Args:
            deadline: on the monotonic clock.

        Raises:
            StartupError: with its own reason, its exit code, or at the deadline.
        """
        reader, writer = await asyncio.open_unix_connection(sock=self._status)
        try:
            line = await asyncio.wait_for(reader.readline(), max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise StartupError(f"{self.name} was not ready in time (rpc.start_timeout_s)") from None
        finally:
            writer.close()
        status = json.loads(line) if line else {}
        if "error" in status:
            raise StartupError(f"{self.name}: {status['error']}")
        if "ready" not in status:
            assert self.process is not None
            raise StartupError(f"{self.name} ended at start with exit code {await self.process.wait()}; see its log")

    async def stop(self) -> None:
        """Ask it to end, wait, and only then kill."""
        if self.process is None:
            return
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            try:
                await asyncio.wait_for(self.process.wait(), _STOP_TIMEOUT_S)
            except TimeoutError:
                logger.error("%s did not end within %g s; killing it", self.name, _STOP_TIMEOUT_S)
                await self._kill()
        if self.process.stdin is not None:
            self.process.stdin.close()

    async def _kill(self) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGABRT)  # it says first what each of its threads is at
        try:
            await asyncio.wait_for(self.process.wait(), _ABORT_TIMEOUT_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
