"""The scheduler's side of the border to clients, operators and supervisors: who asks what, and who answers it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from hbserve.messages.admin import GetStats, GetWindow, RemoveInstance, SetRole, Stats, Window
from hbserve.messages.client import AbortRequest, AddRequest, ClientMessage, SubscribeReady
from hbserve.messages.membership import Join
from hbserve.messages.supervisor import MarkRotation, SetWorkers
from hbserve.pd_disagg.client_port import ClientPort
from hbserve.pd_disagg.drains import Drains
from hbserve.pd_disagg.intake import Intake
from hbserve.pd_disagg.readiness import Readiness
from hbserve.pd_disagg.request_book import RequestBook
from hbserve.pd_disagg.system_stats import SystemStats
from hbserve.pd_disagg.worker_registry import WorkerRegistry

logger = logging.getLogger(__name__)


class ClientDesk:
    """Takes every message to whoever it is for.

    Args:
        port: where they come in.
        intake: for new requests.
        requests: for those that are given up.
        readiness: for clients that wait for it.
        stats: for questions.
        drains: for instances that shall change their roles.
        workers: for workers and instances that come and go.
        wake: has the scheduler plan again.
    """

    def __init__(
        self,
        port: ClientPort,
        intake: Intake,
        requests: RequestBook,
        readiness: Readiness,
        stats: SystemStats,
        drains: Drains,
        workers: WorkerRegistry,
        wake: Callable[[], None],
    ) -> None:
        self._port = port
        self._intake = intake
        self._requests = requests
        self._readiness = readiness
        self._stats = stats
        self._drains = drains
        self._workers = workers
        self._wake = wake

    async def serve(self) -> None:
        """Until cancelled."""
        while True:
            try:
                client, message = await self._port.receive()
            except msgspec.DecodeError as error:
                logger.error("dropped a message that is no client message: %s", error)
                continue
            self._on_message(client, message)
            self._wake()

    def _on_message(self, client: bytes, message: ClientMessage) -> None:
        if isinstance(message, AddRequest):
            refusal = self._intake.take(client, message)
            if refusal is not None:
                self._port.push(client, refusal)
        elif isinstance(message, AbortRequest):
            sequence = self._requests.get(client, message.request_id)
            if sequence is not None:
                self._requests.finish(sequence, message.finish_reason)
        elif isinstance(message, SubscribeReady):
            self._readiness.subscribe(client, message.deadline_s)
        elif isinstance(message, GetStats):
            stats = self._stats.collect(recent=message.recent)
            self._port.reply(client, Stats(query_id=message.query_id, stats=stats))
        elif isinstance(message, GetWindow):
            metrics = self._stats.window(message.seconds)
            self._port.reply(client, Window(query_id=message.query_id, metrics=metrics))
        elif isinstance(message, SetRole):
            self._drains.set_role(client, message)
        elif isinstance(message, RemoveInstance):
            self._workers.remove(client, message)
        elif isinstance(message, Join):
            self._workers.join(client, message)
        elif isinstance(message, SetWorkers):
            self._workers.set_workers(client, message)
        elif isinstance(message, MarkRotation):
            self._stats.mark_rotation(message.begins)
