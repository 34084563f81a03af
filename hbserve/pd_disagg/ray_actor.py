"""What runs in Ray's worker process on the host that Ray has chosen: the keeper of one instance's process.

The instance is a process of its own, as it is with every launcher, and joins the system by itself; the
actor starts it, and falls when it falls, so that Ray starts both again.
"""

from __future__ import annotations

import asyncio
import os
import time

from hbserve.errors import StartupError
from hbserve.pd_disagg.child import EXIT_DISMISSED
from hbserve.pd_disagg.child_process import ChildProcess

_RESTART_DELAY_S = 1.0


class InstanceActor:
    """One instance, through the life of a Ray actor.

    Args:
        name: of the instance.
        arguments: of ``python -m hbserve.join``.
        start_timeout_s: it must be ready within this time.
    """

    def __init__(self, name: str, arguments: list[str], start_timeout_s: float) -> None:
        self._child = ChildProcess(name, "hbserve.join", {}, arguments)
        self._start_timeout_s = start_timeout_s
        self._is_stopping = False
        self._started = asyncio.Event()
        self._error: str | None = None

    async def run(self, restarts: bool) -> str | None:
        """Keep the instance alive; returns when it is to stay away, with the reason if that is a failure.

        Args:
            restarts: whether a first start that fails is to be repeated as well.
        """
        await self._child.start()
        try:
            await self._child.wait_ready(time.monotonic() + self._start_timeout_s)
        except StartupError as error:
            self._error = str(error)
        self._started.set()
        if self._error is not None:
            await self._child.stop()
            return self._error
        assert self._child.process is not None
        code = await self._child.process.wait()
        if code == EXIT_DISMISSED or self._is_stopping:
            return None
        await asyncio.sleep(_RESTART_DELAY_S)
        os._exit(1)  # for Ray: an actor that has failed, which is started again

    async def wait_started(self) -> str | None:
        """Wait for the instance's first word: None for ready, or why it cannot start."""
        await self._started.wait()
        return self._error

    async def stop(self) -> None:
        """End the instance's process."""
        self._is_stopping = True
        await self._child.stop()
