"""What runs in Ray's worker process, on the host that Ray has chosen: the keeper of one instance.

The instance is a process of its own, as with every launcher, and joins the system by itself. The actor
starts it and falls when it falls, so that Ray starts both again, there or elsewhere.
"""

from __future__ import annotations

import asyncio
import os
import time

from hbserve.errors import StartupError
from hbserve.process.child import EXIT_DISMISSED
from hbserve.process.parent import ChildProcess

_RESTART_DELAY_S = 1.0
_EXIT_FALLEN = 70


class InstanceActor:
    """One instance through the life of a Ray actor, which has an event loop.

    Args:
        name: of the instance.
        arguments: of ``python -m hbserve.join``.
        start_timeout_s: it must be ready within this time.
    """

    def __init__(self, name: str, arguments: list[str], start_timeout_s: float) -> None:
        self._process = ChildProcess(name, "hbserve.join", {}, arguments)
        self._start_timeout_s = start_timeout_s
        self._is_stopping = False
        self._started = asyncio.Event()
        self._error: str | None = None

    async def run(self) -> None:
        """Keep the instance running; returns when it shall not run any more. Ray calls it again in a new actor."""
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
            await asyncio.sleep(_RESTART_DELAY_S)  # in which whoever waits for the start hears of it
            if not self._is_stopping:
                os._exit(_EXIT_FALLEN)  # an actor that has failed

    async def wait_started(self) -> str | None:
        """Wait until it is ready, None, or has said why it cannot be."""
        await self._started.wait()
        return self._error

    async def stop(self) -> None:
        """End the instance."""
        self._is_stopping = True
        await self._process.stop()
        self._started.set()
