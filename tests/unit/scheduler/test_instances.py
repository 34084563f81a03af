"""`Instances` visits those that something has woken, in the order of the configuration, and no others."""

from __future__ import annotations

import math

from hbserve.scheduler.instance import InstanceHandle
from tests.support.scheduler_parts import SchedulerParts


def look_at_all(parts: SchedulerParts, now: float) -> list[InstanceHandle]:
    """Look at the instances whose time has come; afterwards nothing is to be planned for them."""
    visited = []
    for instance in parts.instances.to_plan(now):
        instance.plan_at = math.inf
        visited.append(instance)
    return visited


def three() -> tuple[SchedulerParts, list[InstanceHandle]]:
    roles = {"p0": "prefill", "p1": "prefill", "d0": "decode"}
    listed = [{"instance_id": name, "instance_type": role} for name, role in roles.items()]
    parts = SchedulerParts("disaggregated", gpu_instances=listed)
    instances = list(parts.instances.values())
    assert look_at_all(parts, 0.0) == instances  # each has just come
    return parts, instances


def test_only_what_was_woken_is_visited() -> None:
    parts, [first, second, third] = three()
    assert look_at_all(parts, 0.0) == []
    assert parts.instances.plan_at == math.inf
    third.wake()
    first.wake()
    second.wake_at(5.0)
    assert parts.instances.plan_at == -math.inf
    assert look_at_all(parts, 1.0) == [first, third]
    assert parts.instances.plan_at == 5.0
    second.wake_at(3.0)
    assert parts.instances.plan_at == 3.0
    assert look_at_all(parts, 9.0) == [second]
    assert look_at_all(parts, 9.0) == []  # not once more for the later time


def test_what_is_woken_meanwhile_has_its_turn_once_and_in_order() -> None:
    parts, [first, second, third] = three()
    second.wake()
    visited = []
    for instance in parts.instances.to_plan(0.0):
        instance.plan_at = math.inf
        visited.append(instance)
        if instance is second:
            for woken in (first, second, third):
                woken.wake()
    assert visited == [second, third]
    assert parts.instances.plan_at == -math.inf
    assert look_at_all(parts, 0.0) == [first, second]


def test_the_ready_ones_follow_losses_roles_and_removals() -> None:
    parts, [first, second, third] = three()
    assert parts.instances.ready == [first, second, third]
    assert parts.instances.prefilling == [first, second]
    for worker in first.workers.values():
        worker.hello = None
    first.reset()
    assert parts.instances.ready == [second, third]
    parts.begin(first)
    assert parts.instances.ready == [first, second, third]
    first.change_role(third.role)
    assert parts.instances.prefilling == [second]
    parts.instances.remove(second.id)
    second.wake()
    assert parts.instances.ready == [first, third]
    assert second not in look_at_all(parts, 0.0)


def test_short_steps_have_more_plans_in_flight() -> None:
    """A round trip takes longer than such a step, and the device must not wait for it."""
    worker = next(iter(SchedulerParts("unified").instances["unified-0"].workers.values()))
    depths = []
    for step_s in (0.0, 0.02, 0.0029, 0.0014, 0.0006, 0.0001):
        worker.last_step_s = step_s
        depths.append(worker.pipeline_depth(2))
    assert depths == [2, 2, 3, 4, 5, 5]
