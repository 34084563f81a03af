"""Ray actor that keeps one instance running; runs in Ray's worker process, on the host that Ray has chosen.

The instance is a separate process, as with every launcher, and joins the system by itself. The actor starts the
instance and fails when the instance fails, so that Ray starts both again, on this host or another.
"""

from __future__ import annotations

import asyncio
import os
import time

from hbserve.errors import StartupError
from hbserve.process.child import EXIT_DISMISSED
from hbserve.process.parent import ChildProcess

_RESTART_DELAY_S = 1.0
_EXIT_FAILED = 70


class InstanceActor:
    """Keeper of one instance during the life of a Ray actor; its coroutines run in the actor's event loop.

    Args:
        arguments: command line of ``python -m hbserve.join``.
    """

    def __init__(self, name: str, arguments: list[str], start_timeout_s: float) -> None:
        self._process = ChildProcess(name, "hbserve.join", {}, arguments)
        self._start_timeout_s = start_timeout_s
        self._is_stopping = False
        self._started = asyncio.Event()
        self._error: str | None = None

    async def run(self) -> None:
        """Run the instance; returns when it must not run any more. Ray calls this again in a new actor."""
        self._process.start()
        code = None
        try:
            await self._process.wait_ready(time.monotonic() + self._start_timeout_s)
            self._started.set()
            code = await self._process.wait()
        except StartupError as error:
            self._error = str(error)
            self._started.set()
            await self._process.stop()
        if code != EXIT_DISMISSED:
            await asyncio.sleep(_RESTART_DELAY_S)  # time in which `wait_started` returns the error
            if not self._is_stopping:
                os._exit(_EXIT_FAILED)  # Ray then starts the actor again

    async def wait_started(self) -> str | None:
        """Wait until the start is over; returns None if the instance is ready, else the error."""
        await self._started.wait()
        return self._error

    async def stop(self) -> None:
        """End the instance."""
        self._is_stopping = True
        await self._process.stop()
        self._started.set()
