"""Instances that join a running system: those that the configuration lacks, or lists without their addresses.

A name is *joining* from an instance's `Join` to its `Hello`, and *joined* from then until the instance is lost or has
left. After that it is unknown here and may join again.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from hbserve.config import Config, InstanceConfig, InstanceRole
from hbserve.config.validation import with_instance
from hbserve.errors import ConfigError
from hbserve.messages.membership import Join, Joined
from hbserve.scheduler.core_io import Clock, OutboxWriter
from hbserve.scheduler.instance import InstanceHandle, Instances
from hbserve.scheduler.worker import WorkerHandle


class InstanceMembership:
    """Decides which instances may join; owner of which are joining and which have joined.

    Args:
        instances: of the system, by id, at first those of the configuration; those that have joined are added here.
    """

    def __init__(self, config: Config, instances: Instances, clock: Clock, outbox: OutboxWriter) -> None:
        self._config = config
        self._clock = clock
        self._outbox = outbox
        self._instances = instances
        self._configured = {instance.id: instance.config for instance in instances.values()}
        self._joining: dict[str, tuple[InstanceHandle, float]] = {}
        self._joined: set[str] = set()

    @property
    def joining(self) -> Iterable[InstanceHandle]:
        """Instances that asked to join and have not registered; they get no work, and the system needs none."""
        return [instance for instance, _ in self._joining.values()]

    def is_member(self, instance: InstanceHandle) -> bool:
        """Whether an instance has joined, or is joining."""
        return instance.id in self._joined or instance.id in self._joining

    def join(self, join: Join) -> tuple[Joined, InstanceHandle | None]:
        """Return the answer to an instance that wants to join, and its handle if it may."""
        there = self._instances.get(join.instance_id)
        worker = None if there is None else there.workers.get(there.id)
        if there is not None and worker is not None and worker.ready:
            if worker.address == join.address and there.id in self._joined:
                return self._answer(there), None  # it did not hear the scheduler for a while, and has missed nothing
            return _refuse(f"there is {join.instance_id} already, at {worker.address}", is_taken=True), None
        if worker is not None and join.instance_id not in self._joined:
            return _refuse(f"the configuration has {join.instance_id}, at {worker.address}"), None
        try:
            config = self._checked(join)
        except ConfigError as error:
            return _refuse(str(error).removeprefix(f"{error.key}: ")), None
        address = join.address
        if there is not None:
            there.workers[there.id] = WorkerHandle(there.id, join.role, 100, address, self._clock, self._outbox)
            there.workers[there.id].role = there.role  # which may have been changed
            self._joined.add(there.id)
            return self._answer(there), there
        new = InstanceHandle(config, self._config, address, self._clock, self._outbox)
        self._joining[new.id] = new, self._clock.now + self._config.rpc.start_timeout_s
        return self._answer(new), new

    def _checked(self, join: Join) -> InstanceConfig:
        """Return the configuration of an instance that wants to join.

        Raises:
            ConfigError: if it cannot be part of the system.
        """
        configured = self._configured.get(join.instance_id)
        if configured is not None:
            if configured.instance_type is not join.role:
                raise ConfigError(f"{join.instance_id} is {configured.instance_type} in the configuration")
            return configured
        if join.role is InstanceRole.SEMI_PD:
            raise ConfigError("a semi_pd instance is started with its scheduler")
        known = (*self._instances.values(), *self.joining)
        others = [instance.config for instance in known if instance.id != join.instance_id]
        config = msgspec.structs.replace(self._config, gpu_instances=tuple(others))
        host, _, port = join.address.removeprefix("tcp://").rpartition(":")
        if not join.address.startswith("tcp://") or not port.isdecimal():
            raise ConfigError(f"{join.address} is no TCP address")
        taken = {other.kv_rank for other in (*self._configured.values(), *others)}
        if join.kv_rank is not None and join.kv_rank in taken:
            raise ConfigError(f"KV rank {join.kv_rank} is taken meanwhile; start the instance again")
        kv_rank = join.kv_rank
        if kv_rank is None:
            kv_rank = next(rank for rank in range(len(taken) + 1) if rank not in taken)
        new = InstanceConfig(
            instance_id=join.instance_id,
            instance_type=join.role,
            host=host,
            port=int(port),
            kv_rank=kv_rank,
            tensor_parallel_size=join.num_ranks or self._config.model.tensor_parallel_size,
        )
        if new.num_ranks > self._config.max_ranks:  # the others count KV ranks by it
            raise ConfigError(f"{new.num_ranks} ranks are more than any instance of the configuration has")
        with_instance(config, new)
        return new

    def _answer(self, instance: InstanceHandle) -> Joined:
        assert instance.config.kv_rank is not None
        return Joined(config=msgspec.to_builtins(self._config), kv_rank=instance.config.kv_rank)

    def on_arrived(self, instance: InstanceHandle) -> None:
        """An instance has introduced itself, and fits."""
        if self._joining.pop(instance.id, None) is not None:
            self._instances.add(instance)
            self._joined.add(instance.id)

    def overdue(self) -> list[InstanceHandle]:
        """Return instances that asked to join and did not come in time."""
        return [instance for instance, deadline in self._joining.values() if self._clock.now > deadline]

    def on_gone(self, instance: InstanceHandle, for_good: bool = False) -> bool:
        """An instance was lost, has left or did not come; returns whether it is no part of the system any more.

        Args:
            for_good: an operator has removed it, so that its entry in the configuration no longer counts.
        """
        self._joining.pop(instance.id, None)
        self._joined.discard(instance.id)
        if for_good:
            self._configured.pop(instance.id, None)
        if instance.id in self._configured:
            return False
        self._instances.remove(instance.id)
        return True


def _refuse(error: str, is_taken: bool = False) -> Joined:
    return Joined(error=error, is_taken=is_taken)
