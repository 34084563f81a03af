"""Instances that change from prefill to decode, or back, while the system serves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hbserve.config import InstanceRole
from hbserve.messages.admin import RoleSet, SetRole
from hbserve.pd_disagg.instance_handle import InstanceHandle
from hbserve.pd_disagg.timeline import EventLog
from hbserve.pd_disagg.transfer_ledger import TransferLedger

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Change:
    """One that has been asked for: its instance gets nothing new until it has nothing left."""

    client: bytes
    query_id: int
    role: InstanceRole
    deadline: float


class RoleChanges:
    """Drains instances and gives them their new roles. Nothing is restarted, loaded or forgotten.

    Args:
        instances: all there are, by id.
        transfers: whose links follow the roles.
        events: where changes are noted.
        reply: to a client.
    """

    def __init__(
        self,
        instances: Mapping[str, InstanceHandle],
        transfers: TransferLedger,
        events: EventLog,
        reply: Callable[[bytes, RoleSet], None],
    ) -> None:
        self._instances = instances
        self._transfers = transfers
        self._events = events
        self._reply = reply
        self._changes: dict[str, _Change] = {}

    def ask(self, client: bytes, message: SetRole) -> None:
        """Begin a change, or say why not."""
        problem = self._problem(message)
        instance = self._instances.get(message.instance_id)
        if problem is not None or instance is None or instance.role is message.role:
            self._reply(client, RoleSet(query_id=message.query_id, error=problem))
            return
        instance.is_draining = True
        deadline = time.monotonic() + message.deadline_s
        self._changes[instance.id] = _Change(client, message.query_id, message.role, deadline)

    def _problem(self, message: SetRole) -> str | None:
        plain = (InstanceRole.PREFILL, InstanceRole.DECODE)
        instance = self._instances.get(message.instance_id)
        if instance is None:
            return f"there is no instance {message.instance_id!r}; there are {', '.join(self._instances)}"
        if instance.role not in plain or message.role not in plain:
            return f"{instance.id} is {instance.role}: only prefill and decode instances change, and into each other"
        if instance.id in self._changes:
            return f"{instance.id} is changing its role already"
        others = [each for each in self._instances.values() if each is not instance and not each.is_draining]
        if instance.role is not message.role and not any(each.role is instance.role and each.ready for each in others):
            return f"{instance.id} is the only {instance.role} instance that is ready"
        return None

    def proceed(self) -> None:
        """Give instances that have nothing left their new roles, and give up on those that took too long."""
        for name, change in list(self._changes.items()):
            instance = self._instances[name]
            is_empty = not (instance.seats or instance.reserved or instance.num_steps_in_flight)
            if is_empty and not self._transfers.touches(instance):
                self._events.note("role", name, f"{instance.role} to {change.role}")
                self._transfers.disconnect(instance)
                instance.change_role(change.role)
                self._transfers.connect(self._instances.values())
                logger.info("%s is %s now", name, change.role)
                self._end(name, None)
            elif time.monotonic() > change.deadline:
                left = len(instance.seats) + len(instance.reserved)
                self._end(name, f"{name} still had {left} requests at the deadline; it stays {instance.role}")

    def _end(self, name: str, error: str | None) -> None:
        change = self._changes.pop(name)
        self._instances[name].is_draining = False
        self._reply(change.client, RoleSet(query_id=change.query_id, error=error))
