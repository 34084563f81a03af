"""Changes of instances while the system serves: to another role, or to leave.

An instance that is prepared for its new role takes the role as soon as the links for it are open. Until then it keeps
serving, and requests under way go on where their memory is. Any other instance is drained first, because it captures
CUDA graphs for the new role, and its streams would wait for that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from hbserve.config import InstanceRole
from hbserve.messages.admin import InstanceChanged, PrepareRoles, RemoveInstance, SetRole
from hbserve.messages.worker import Shutdown
from hbserve.scheduler.core_io import Clock, OutboxWriter
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.metrics import EventLog
from hbserve.scheduler.steps.step_planner import StepPlanner
from hbserve.scheduler.transfer_tracker import TransferTracker


@dataclass(slots=True)
class _Drain:
    """One change: its instance gets no new request until it has nothing left, or changes at once.

    Attributes:
        asked_by: client and query to answer; None: the instance itself asked.
        role: the role afterwards; None: the instance leaves.
        deadline: when the drain is given up; None: the instance itself ends it.
        is_prepared: the instance has been told to prepare for the role, or to end.
        at_once: the instance is prepared, and goes on with its requests; only links may be missing.
    """

    asked_by: tuple[bytes, int] | None
    role: InstanceRole | None
    deadline: float | None
    is_prepared: bool = False
    at_once: bool = False


class Drains:
    """Drains instances, then gives them their new role or lets them leave; nothing is restarted or loaded.

    Args:
        transfers: opens and closes the links that the roles need.
        planner: tells workers of their new roles.
    """

    def __init__(
        self,
        instances: Mapping[str, InstanceHandle],
        transfers: TransferTracker,
        planner: StepPlanner,
        events: EventLog,
        clock: Clock,
        outbox: OutboxWriter,
    ) -> None:
        self._instances = instances
        self._transfers = transfers
        self._planner = planner
        self._events = events
        self._clock = clock
        self._outbox = outbox
        self._drains: dict[str, _Drain] = {}

    def set_role(self, client: bytes, message: SetRole) -> None:
        """Begin a change of role, or tell the client why not."""
        instance = self._known(client, message)
        if instance is None:
            return
        problem = self._change_under_way(instance) or self._why_role_is_needed(instance, message.role)
        if InstanceRole.SEMI_PD in (instance.role, message.role):
            problem = f"{instance.id} is {instance.role}: a semi_pd instance keeps its role, and no other becomes one"
        elif problem is None and instance.role is message.role:
            self._outbox.reply(client, InstanceChanged(query_id=message.query_id))
            return
        at_once = instance.ready and instance.is_prepared_for(message.role)
        deadline = self._clock.now + message.deadline_s
        self._begin(instance, problem, _Drain((client, message.query_id), message.role, deadline, at_once=at_once))

    def prepare(self, message: PrepareRoles) -> None:
        """Open the links that roles would need, before a change: to connect two GPUs stops their steps for 0.1 s."""
        roles = message.roles.items()
        self._transfers.prepare({self._instances[name]: role for name, role in roles if name in self._instances})

    def remove(self, client: bytes, message: RemoveInstance) -> None:
        """Begin to remove an instance, or tell the client why not."""
        instance = self._known(client, message)
        if instance is None:
            return
        problem = self._change_under_way(instance) or self.why_needed(instance)
        if problem is None and instance.role is InstanceRole.SEMI_PD:
            problem = f"{instance.id} is {instance.role}: it ends with the system"
        self._begin(instance, problem, _Drain((client, message.query_id), None, self._clock.now + message.deadline_s))

    def on_wants_to_leave(self, instance: InstanceHandle) -> None:
        """An instance was told to end and waits until it has nothing left. It may ask again."""
        drain = self._drains.get(instance.id)
        if drain is None or drain.role is not None:
            if drain is not None:
                self._end(instance.id, f"{instance.id} is leaving")
            self._begin(instance, None, _Drain(None, None, None))

    def on_gone(self, instance: InstanceHandle) -> bool:
        """An instance has left, or was lost; returns whether an operator wants it not to come back."""
        drain = self._drains.get(instance.id)
        if drain is None or drain.role is not None:
            return False
        self._end(instance.id, None)
        return drain.asked_by is not None

    def has_let_go(self, instance: InstanceHandle) -> bool:
        """Whether it has nothing left and has been told to end."""
        drain = self._drains.get(instance.id)
        return drain is not None and drain.role is None and drain.is_prepared

    def _known(self, client: bytes, message: SetRole | RemoveInstance) -> InstanceHandle | None:
        """Return the named instance; None: there is none, and the client has been told."""
        instance = self._instances.get(message.instance_id)
        if instance is None:
            error = f"there is no instance {message.instance_id!r}; there are {', '.join(self._instances)}"
            self._outbox.reply(client, InstanceChanged(query_id=message.query_id, error=error, is_unknown=True))
        return instance

    def _change_under_way(self, instance: InstanceHandle) -> str | None:
        if instance.id in self._drains:
            leaves = self._drains[instance.id].role is None
            return f"{instance.id} is {'leaving' if leaves else 'changing its role'} already"
        return None

    def _why_role_is_needed(self, instance: InstanceHandle, role: InstanceRole) -> str | None:
        """Return why the system could not serve if an instance took a role; None: it could."""
        others = [other for other in self._instances.values() if other is not instance and not other.is_draining]
        if instance.ready and not _serve([role, *(other.role for other in others if other.ready)]):
            return f"{instance.id} is the only {instance.role} instance that is ready"
        if not _serve([role, *(other.role for other in others)]):
            return f"{instance.id} is the only {instance.role} instance"
        return None

    def why_needed(self, instance: InstanceHandle) -> str | None:
        """Return why the system cannot do without an instance in its role; None: others can take its place."""
        others = [
            other
            for other in self._instances.values()
            if other is not instance and other.role is instance.role and not other.is_draining
        ]
        if instance.ready and not any(other.ready for other in others):
            return f"{instance.id} is the only {instance.role} instance that is ready"
        if not others:  # it is lost, and requests wait for it to come back
            return f"{instance.id} is the only {instance.role} instance"
        return None

    def _begin(self, instance: InstanceHandle, problem: str | None, drain: _Drain) -> None:
        if problem is not None:
            assert drain.asked_by is not None
            client, query_id = drain.asked_by
            self._outbox.reply(client, InstanceChanged(query_id=query_id, error=problem))
            return
        instance.is_draining = not drain.at_once
        self._drains[instance.id] = drain

    def proceed(self) -> None:
        """Continue the drains of instances that have nothing left, and give up those that are late."""
        for name, drain in list(self._drains.items()):
            instance = self._instances.get(name)
            if instance is None:
                self._end(name, f"{name} was lost")
                continue
            if drain.at_once:
                self._change_at_once(instance, drain)
                continue
            is_empty = not (instance.num_sequences or instance.num_steps_in_flight)
            if is_empty and not self._transfers.touches(instance):
                self._go_on(instance, drain)
            elif drain.deadline is not None and self._clock.now > drain.deadline and not drain.is_prepared:
                left = instance.num_sequences
                self._end(name, f"{name} still had {left} requests at the deadline; it stays {instance.role}")

    def _change_at_once(self, instance: InstanceHandle, drain: _Drain) -> None:
        assert drain.role is not None
        assert drain.deadline is not None
        if not instance.ready:
            self._end(instance.id, f"{instance.id} was lost")
        elif (problem := self._why_role_is_needed(instance, drain.role)) is not None:
            self._end(instance.id, problem)  # another one has changed since this was asked for
        elif self._transfers.prepare(
            {other: other.role for other in self._instances.values()} | {instance: drain.role}
        ):
            self._change_role(instance, drain.role)
            self._end(instance.id, None)
        elif self._clock.now > drain.deadline:
            self._end(instance.id, f"its links did not open by the deadline; {instance.id} stays {instance.role}")

    def _go_on(self, instance: InstanceHandle, drain: _Drain) -> None:
        if drain.role is None:
            if not drain.is_prepared:
                drain.is_prepared = True
                self._transfers.disconnect(instance)
                instance.send(Shutdown())
            return  # `on_gone` ends the drain
        if not drain.is_prepared and instance.ready:
            drain.is_prepared = True
            self._planner.plan_preparation(instance, drain.role)
            return  # the next call finds the preparation done
        self._transfers.disconnect(instance)
        self._change_role(instance, drain.role)
        self._end(instance.id, None)

    def _change_role(self, instance: InstanceHandle, role: InstanceRole) -> None:
        self._events.note("role", instance.id, f"{instance.role} to {role}")
        instance.change_role(role)
        self._transfers.connect(self._instances.values())
        self._outbox.log(logging.INFO, f"{instance.id} is {role} now")

    def _end(self, name: str, error: str | None) -> None:
        drain = self._drains.pop(name)
        if name in self._instances:
            self._instances[name].is_draining = False
        if drain.asked_by is not None:
            client, query_id = drain.asked_by
            self._outbox.reply(client, InstanceChanged(query_id=query_id, error=error))


def _serve(roles: list[InstanceRole]) -> bool:
    """Whether instances of these roles can serve a request together."""
    return any(role.prefills for role in roles) and any(role.decodes for role in roles)
