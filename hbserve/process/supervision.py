"""Supervision of instances that have several processes: the launcher delegates their start, watch and end."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod

from hbserve.config import Config, InstanceConfig


class InstanceSupervisor(ABC):
    """Supervisor that starts, watches and ends the processes of one instance."""

    @classmethod
    @abstractmethod
    def supervise(
        cls, config: Config, instance: InstanceConfig, run_dir: str, scheduler_address: str
    ) -> InstanceSupervisor:
        """Make the supervisor of an instance; it starts nothing yet.

        Args:
            config: configuration of the system.
            instance: instance of that configuration.
            run_dir: private folder for sockets.
            scheduler_address: address for `hbserve.messages.supervisor.SetWorkers`, which announce the workers.
        """

    @abstractmethod
    def start_or_raise(self, deadline: float) -> None:
        """Start all processes and return when they are ready; may block.

        Args:
            deadline: on the monotonic clock.

        Raises:
            StartupError: naming what failed and why.
        """

    @abstractmethod
    def tell_to_stop(self) -> None:
        """Make a running `start_or_raise` give up; does not block. Any thread may call this."""

    @abstractmethod
    def stop(self) -> None:
        """End all processes; may block. May be called in every state."""


class Supervision:
    """Thread that starts a supervisor, and at the end stops it, for the launcher's event loop: both may block.

    One thread does both, because an interpreter that is ending cannot start another one. It is a daemon, because
    interpreters join other threads before the launcher can stop it.

    Args:
        supervisor: supervisor that has not started anything.
        deadline: deadline of the start, on the monotonic clock.

    Attributes:
        ready: done when the start is over; raises what the start has raised.
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
        """Stop the supervisor, in whatever state it is."""
        self._stop.set()
        self.supervisor.tell_to_stop()
        await self._ended


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if not future.done():  # done: cancelled
        future.set_exception(error) if error is not None else future.set_result(None)
