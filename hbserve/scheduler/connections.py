"""The connections to the workers: receiving, heartbeats, and which workers are silent."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from hbserve.config import RpcConfig
from hbserve.messages.worker import InstanceReply, Ping
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.worker import WorkerHandle

logger = logging.getLogger(__name__)

_GREETING_INTERVAL_S = 0.02


class WorkerConnections:
    """Listens to every worker; owner of the connections, of the tasks that receive, and of `WorkerHandle.last_seen`.

    Args:
        on_reply: called with every message of a worker.
        on_lost: called, with the reason, for a registered worker whose connection broke or that is silent.
        wake: makes the scheduler plan again.
    """

    def __init__(
        self,
        rpc: RpcConfig,
        on_reply: Callable[[InstanceHandle, WorkerHandle, InstanceReply], None],
        on_lost: Callable[[InstanceHandle, WorkerHandle, str], None],
        wake: Callable[[], None],
    ) -> None:
        self._heartbeat_timeout_s = rpc.heartbeat_timeout_s
        self._on_reply = on_reply
        self._on_lost = on_lost
        self._wake = wake
        self._scheduler_epoch = time.time_ns()  # workers obey the scheduler that was started last
        self._tasks: dict[WorkerHandle, list[asyncio.Task[None]]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def serve(self, workers: Iterable[tuple[InstanceHandle, WorkerHandle]]) -> None:
        """Listen to these workers and to those that are opened later, until cancelled."""
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            for instance, worker in workers:
                self.open(instance, worker)
            await self._failure
        finally:
            for worker in list(self._tasks):
                await self._close(worker)
            await asyncio.gather(*self._closing)

    def open(self, instance: InstanceHandle, worker: WorkerHandle) -> None:
        """Listen to a worker. Heartbeats find out when it is there."""
        tasks = [
            asyncio.create_task(self._receive_from(instance, worker)),
            asyncio.create_task(self._watch_connection(instance, worker)),
        ]
        for task in tasks:
            task.add_done_callback(self._on_task_end)
        self._tasks[worker] = tasks

    def close_later(self, worker: WorkerHandle) -> None:
        """Close a worker's connection, without waiting for that."""
        task = asyncio.create_task(self._close(worker))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close(self, worker: WorkerHandle) -> None:
        tasks = self._tasks.pop(worker, [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        worker.rpc.close()

    async def _receive_from(self, instance: InstanceHandle, worker: WorkerHandle) -> None:
        while True:
            reply = await worker.rpc.receive()
            worker.last_seen = time.monotonic()
            self._on_reply(instance, worker, reply)
            self._wake()

    async def _watch_connection(self, instance: InstanceHandle, worker: WorkerHandle) -> None:
        while True:
            await worker.rpc.wait_disconnected()
            if worker.ready:  # otherwise it has been lost already, with its own reason
                self._on_lost(instance, worker, "its connection broke")
                self._wake()

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        """Make `serve` fail with a task's error: no task ends on its own."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._failure.done():
            self._failure.set_exception(error)

    # --- heartbeats ------------------------------------------------------------------------------

    def check_heartbeats(
        self, workers: Iterable[tuple[InstanceHandle, WorkerHandle]], now: float, was_asleep: bool
    ) -> None:
        """Ping every worker, and report registered workers that were silent for too long as lost.

        Args:
            now: on the monotonic clock.
            was_asleep: the scheduler itself was suspended, so no silence counts this time.
        """
        for instance, worker in workers:
            self._ping(worker)
            silence_s = now - worker.last_seen
            if worker.ready and silence_s > self._heartbeat_timeout_s and not was_asleep:
                self._on_lost(instance, worker, f"no sign of life for {silence_s:.1f} s")

    def greet(self, worker: WorkerHandle) -> None:
        """Ping a worker until its `Hello` comes, which is sooner than the next heartbeat."""
        if worker in self._tasks and not worker.ready:
            self._ping(worker)
            asyncio.get_running_loop().call_later(_GREETING_INTERVAL_S, self.greet, worker)

    def _ping(self, worker: WorkerHandle) -> None:
        worker.send(Ping(scheduler_epoch=self._scheduler_epoch, known_epoch=worker.epoch))
