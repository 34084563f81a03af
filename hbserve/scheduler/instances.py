"""All instances of the system, and which of them have something to do.

A step of the scheduler visits only what something has woken, so that it does not cost more the more instances there
are.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, ValuesView

from hbserve.config import InstanceRole
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.sequence import KVAllocation, Sequence


class Instances(Mapping[str, InstanceHandle]):
    """The instances by id, in the order of the configuration; those that have joined come after.

    Each instance adds itself to a list when something wakes it (`InstanceHandle.wake`). Every question here reads that
    list first.
    """

    def __init__(self, instances: Iterable[InstanceHandle] = ()) -> None:
        self._by_id: dict[str, InstanceHandle] = {}
        self._num_added = 0
        self._woken: list[InstanceHandle] = []
        self._plan_times: list[tuple[float, int, InstanceHandle]] = []  # a heap; entries of earlier times stay in it
        self._may_have_prompts: dict[InstanceHandle, None] = {}
        self._roles_of_ready: dict[InstanceHandle, InstanceRole] = {}
        self._ready: list[InstanceHandle] | None = None  # None: to be sorted
        self._prefilling: list[InstanceHandle] = []
        for instance in instances:
            self.add(instance)

    def __getitem__(self, instance_id: str) -> InstanceHandle:
        return self._by_id[instance_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_id)

    def __len__(self) -> int:
        return len(self._by_id)

    def values(self) -> ValuesView[InstanceHandle]:
        """Return all instances, in their order."""
        return self._by_id.values()

    def add(self, instance: InstanceHandle) -> None:
        """Add an instance after all others."""
        self._num_added += 1
        self._by_id[instance.id] = instance
        instance.enlist(self._woken, self._num_added)

    def remove(self, instance_id: str) -> None:
        """Remove an instance, if it is there."""
        instance = self._by_id.pop(instance_id, None)
        if instance is not None:
            self._read_woken()
            instance.enlist([], 0)
            self._may_have_prompts.pop(instance, None)
            if self._roles_of_ready.pop(instance, None) is not None:
                self._ready = None

    def _read_woken(self) -> None:
        for instance in self._woken:
            heapq.heappush(self._plan_times, (instance.plan_at, instance.number, instance))
            self._may_have_prompts[instance] = None
            role = instance.role if instance.ready else None
            if role is not self._roles_of_ready.get(instance):
                self._ready = None
                self._roles_of_ready.pop(instance, None)
                if role is not None:
                    self._roles_of_ready[instance] = role
        self._woken.clear()

    # --- whose next steps are looked at ----------------------------------------------------------

    def to_plan(self, now: float) -> Iterator[InstanceHandle]:
        """Yield the instances whose `InstanceHandle.plan_at` has come, in their order; the caller sets it anew.

        What is woken meanwhile has its turn if it comes later in the order, and otherwise in the next call.
        """
        due: list[tuple[int, InstanceHandle]] = []
        passed: list[InstanceHandle] = []
        last = 0
        while True:
            self._read_woken()
            while self._plan_times and self._plan_times[0][0] <= now:
                _, number, instance = heapq.heappop(self._plan_times)
                heapq.heappush(due, (number, instance))
            if not due:
                break
            number, instance = heapq.heappop(due)
            if number != instance.number or instance.plan_at > now:
                continue
            if number > last:
                last = number
                yield instance
            else:
                passed.append(instance)
        self._woken += passed

    @property
    def plan_at(self) -> float:
        """The earliest `InstanceHandle.plan_at`; infinity if there is none."""
        self._read_woken()
        times = self._plan_times
        while times and (times[0][1] != times[0][2].number or times[0][0] != times[0][2].plan_at):
            heapq.heappop(times)
        return times[0][0] if times else math.inf

    # --- where requests can go -------------------------------------------------------------------

    @property
    def ready(self) -> list[InstanceHandle]:
        """The instances that are ready, in their order."""
        self._read_woken()
        if self._ready is None:
            self._ready = sorted(self._roles_of_ready, key=lambda instance: instance.number)
            self._prefilling = [instance for instance in self._ready if instance.role.prefills]
        return self._ready

    @property
    def prefilling(self) -> list[InstanceHandle]:
        """Those of them that prefill."""
        assert self.ready is not None
        return self._prefilling

    def prompts(self) -> list[tuple[Sequence, KVAllocation]]:
        """Return the sequences with prompt tokens that are not planned, of all instances that prefill."""
        self._read_woken()
        found: list[tuple[Sequence, KVAllocation]] = []
        for instance in list(self._may_have_prompts):
            prompts = instance.prompts
            if not prompts:
                del self._may_have_prompts[instance]
            elif instance in self._roles_of_ready and instance.role.prefills:
                found += prompts
        return found
