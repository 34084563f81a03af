"""Instances of several processes, which somebody else than the launcher starts, watches and ends."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod

from hbserve.config import Config, InstanceConfig


class InstanceSupervisor(ABC):
    """Starts, watches and ends the processes of an instance that has several.

    Args:
        config: of the system.
        instance: which of its instances.
        run_dir: private folder for sockets.
        scheduler_address: where to announce the workers, as `hbserve.messages.supervisor.SetWorkers`.
    """

    @classmethod
    @abstractmethod
    def supervise(
        cls, config: Config, instance: InstanceConfig, run_dir: str, scheduler_address: str
    ) -> InstanceSupervisor:
        """One for an instance of a system; nothing is started yet."""

    @abstractmethod
    def start_or_raise(self, deadline: float) -> None:
        """Start everything and return when it is ready; may block.

        Args:
            deadline: on the monotonic clock.

        Raises:
            StartupError: naming what failed and why.
        """

    @abstractmethod
    def tell_to_stop(self) -> None:
        """Make a `start_or_raise` that is running give up; does not block. Callable from any thread."""

    @abstractmethod
    def stop(self) -> None:
        """End everything; may block. Callable in every state."""


class Supervision:
    """A supervisor in a thread of its own, which starts and in the end stops it: both may block.

    One thread for both, because none can be started any more when an interpreter is ending. A daemon,
    because interpreters join other threads before that.

    Args:
        supervisor: nothing of it is started yet.
        deadline: for its start, on the monotonic clock.

    Attributes:
        ready: done when it has started; raises what its start has raised.
    """

    def __init__(self, supervisor: InstanceSupervisor, deadline: float) -> None:
        self.supervisor = supervisor
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._stop = threading.Event()
        threading.Thread(target=self._run, name="supervision", daemon=True).start()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self.supervisor.start_or_raise(self._deadline)
        except BaseException as raised:
            error = raised
        self._loop.call_soon_threadsafe(_settle, self.ready, error)
        self._stop.wait()
        self.supervisor.stop()
        self._loop.call_soon_threadsafe(_settle, self._ended, None)

    async def stop(self) -> None:
        """End everything of it, in whatever state it is."""
        self._stop.set()
        self.supervisor.tell_to_stop()
        await self._ended


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():
        return  # cancelled
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
