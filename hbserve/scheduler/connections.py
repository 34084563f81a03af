"""The scheduler's connections to workers: which worker sent a message, and pings to find new ones."""

from __future__ import annotations

from collections.abc import Iterator

from hbserve.messages.worker import Ping
from hbserve.scheduler.core_io import Clock, OutboxWriter
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.worker import WorkerHandle

_GREETING_INTERVAL_S = 0.02


class WorkerConnections:
    """Maps connections to workers, and pings the workers.

    Args:
        scheduler_epoch: number of this scheduler. Workers obey the largest, and drop their state when it changes.
    """

    def __init__(self, clock: Clock, outbox: OutboxWriter, scheduler_epoch: int) -> None:
        self._clock = clock
        self._outbox = outbox
        self._scheduler_epoch = scheduler_epoch
        self._by_connection: dict[int, tuple[InstanceHandle, WorkerHandle]] = {}
        self._next_greetings: dict[WorkerHandle, float] = {}  # time of the next ping, by worker

    def __iter__(self) -> Iterator[tuple[InstanceHandle, WorkerHandle]]:
        """Iterate over the workers that may send messages, each with its instance; they may be closed meanwhile."""
        return iter(list(self._by_connection.values()))

    def find(self, connection: int) -> tuple[InstanceHandle, WorkerHandle] | None:
        """Return the worker at a connection and its instance; None: the connection has been closed."""
        return self._by_connection.get(connection)

    def listen(self, instance: InstanceHandle, worker: WorkerHandle) -> None:
        """Take messages from a worker, which may start later: a new connection or the next heartbeat finds it."""
        self._by_connection[worker.connection] = instance, worker

    def close(self, worker: WorkerHandle) -> None:
        """Close the connection to a worker."""
        if self._by_connection.pop(worker.connection, None) is not None:
            self._next_greetings.pop(worker, None)
            self._outbox.disconnect(worker.connection)

    def ping(self, worker: WorkerHandle) -> None:
        """Ping a worker. It answers with a `Hello` if the scheduler does not know its epoch."""
        worker.send(Ping(scheduler_epoch=self._scheduler_epoch, known_epoch=worker.epoch))

    def begin_greeting(self, worker: WorkerHandle) -> None:
        """Ping a worker that was just announced at short intervals until it is registered."""
        self._next_greetings[worker] = self._clock.now

    def greet(self) -> None:
        """Send the pings of `begin_greeting` that are due. They find a worker sooner than heartbeats do."""
        now = self._clock.now
        for worker, next_ping_at in list(self._next_greetings.items()):
            if worker.ready:
                del self._next_greetings[worker]
            elif next_ping_at <= now:
                self.ping(worker)
                self._next_greetings[worker] = now + _GREETING_INTERVAL_S
                self._clock.call_at(now + _GREETING_INTERVAL_S)

    def on_made(self, connection: int) -> None:
        """There is a connection to a worker: ping it now, which is sooner than the next heartbeat."""
        if connection in self._by_connection:
            self.ping(self._by_connection[connection][1])
