"""Phases that no instance takes: for now, so that requests fail in time, or for good, so that the system has ended."""

from __future__ import annotations

from collections.abc import Iterator

from hbserve.config import Config, InstanceRole
from hbserve.scheduler.core_io import Clock
from hbserve.scheduler.instance import InstanceHandle, Instances
from hbserve.scheduler.membership import InstanceMembership
from hbserve.scheduler.readiness import Readiness

_PHASES = ("prefills", "decodes")
"""Names of the properties of `InstanceRole` that say whether an instance does a phase."""


class PhaseCoverage:
    """Finds phases without an instance; owner of `Readiness.ended` and of the list of instances given up.

    Args:
        membership: knows the instances that are joining, which may do a phase later.
    """

    def __init__(
        self, config: Config, instances: Instances, membership: InstanceMembership, readiness: Readiness, clock: Clock
    ) -> None:
        self._instances = instances
        self._membership = membership
        self._readiness = readiness
        self._clock = clock
        self._recovery_timeout_s = config.rpc.recovery_timeout_s
        self._configured = {instance.instance_id: instance.instance_type for instance in config.gpu_instances}
        self._given_up: dict[str, str] = {}  # reason, by instance
        self._unserved_since: dict[str, float] = {}  # by phase

    def find_missing(self) -> str | None:
        """Return, in words, a phase that no instance took for longer than requests wait; None: all is well.

        An instance that is lost takes none, and neither does one that drains. Called at each heartbeat.
        """
        now = self._clock.now
        for phase in _PHASES:
            able = [instance for instance in self._instances.values() if getattr(instance.role, phase)]
            if any(instance.lost_since is None and not instance.is_draining for instance in able):
                self._unserved_since.pop(phase, None)
            elif now - self._unserved_since.setdefault(phase, now) >= self._recovery_timeout_s:
                missing = self._readiness.name_missing() if able else "the last one has left, or has another role"
                waited = f"for {self._recovery_timeout_s:g} s (rpc.recovery_timeout_s)"
                return f"no instance that {phase} was there {waited}: {missing}"
        return None

    def on_given_up(self, instance_id: str, reason: str) -> None:
        """The launcher of an instance has given it up: it does not come back."""
        if instance_id not in self._configured and instance_id not in self._instances:
            return  # another process of the system
        self._given_up[instance_id] = reason
        if instance_id in self._instances:
            self._instances[instance_id].given_up = reason
        self._look_for_end()

    def on_registered(self, instance: InstanceHandle) -> None:
        """An instance is there; it may have been given up."""
        if self._given_up.pop(instance.id, None) is not None:
            instance.given_up = None
            self._look_for_end()

    def _look_for_end(self) -> None:
        """Find out whether a phase has lost its last instance for good."""
        roles = self._configured | dict(self._present_roles())
        self._readiness.ended = None
        for phase in _PHASES:
            able = [name for name, role in roles.items() if getattr(role, phase)]
            if able and self._given_up.keys() >= set(able):
                reasons = "; ".join(f"{name}: {self._given_up[name]}" for name in able)
                self._readiness.ended = f"no instance that {phase} comes back: {reasons}"
                return

    def _present_roles(self) -> Iterator[tuple[str, InstanceRole]]:
        for instance in (*self._membership.joining, *self._instances.values()):
            yield instance.id, instance.role
