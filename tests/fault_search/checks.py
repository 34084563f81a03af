"""What must hold of the scheduler's books: at every moment, and when nothing is open any more."""

from __future__ import annotations

from hbserve.messages.worker import StepPlan
from hbserve.scheduler.core_io import Outbox
from hbserve.scheduler.scheduler import CpuScheduler
from hbserve.scheduler.sequence import KVAllocation, Sequence


def check_books(core: CpuScheduler) -> None:
    """Assert that the books of every pool and tier agree with each other and with the allocations."""
    core._requests.tiers.check_consistency()
    for instance in core.instances.values():
        if not instance.arena_epoch:
            continue
        instance.pool.check_consistency()
        slots = [allocation.slot for allocation in (*instance.allocations.values(), *instance.reserved.values())]
        assert len(set(slots)) == len(slots), f"two sequences have one slot of {instance.id}"
        assert not set(slots) & set(instance._free_slots), f"a slot of {instance.id} is free and taken"
        prompts = [item for item in instance.allocations.items() if item[1].num_to_prefill > 0]
        assert instance.prompts == prompts, f"{instance.id} has overlooked a prompt"
        for allocation in (*instance.allocations.values(), *instance.reserved.values()):
            assert allocation.num_computed <= allocation.num_planned or allocation in instance.reserved.values()


def check_nothing_was_overlooked(core: CpuScheduler, now: float) -> Outbox:
    """Look at every instance once more, and assert that this plans nothing; returns the outbox of that step.

    A step looks only at instances that something has woken. Not for workers that share an instance: which of them may
    get a plan depends on what the others have just got. Nor where a step waits for the result of a draft in flight:
    time alone can change which rows that step would have, and the result wakes the instance in any case.
    """
    for instance in core.instances.values():
        if not any(_is_guessed_behind(*item) for item in instance.allocations.items()):
            instance.wake()
    outbox = core.step(now)
    plans = [plan for _, plan in outbox.to_workers if isinstance(plan, StepPlan) and plan.rows]
    assert not plans, f"nothing has woken the instance that gets {plans[0]}"
    return outbox


def _is_guessed_behind(sequence: Sequence, allocation: KVAllocation) -> bool:
    """Whether the tokens after a row in flight may be guessed."""
    decodes = allocation.num_planned >= allocation.num_tokens_at_entry
    return decodes and allocation.num_inflight > 0 and sequence.speculator is not None


def check_idle(core: CpuScheduler) -> str | None:
    """Return what is not free although no request is open; None: all is free."""
    if len(core._requests):
        return f"{len(core._requests)} requests are open in the scheduler"
    if core.waiting:
        return "requests wait"
    for instance in core.instances.values():
        if not instance.ready:
            return f"{instance.id} is not ready: {instance.why_lost}"
        pool = instance.pool
        if instance.allocations or instance.reserved:
            return f"{instance.id} has allocations"
        if pool.num_free_blocks != pool.total_blocks:
            return f"{instance.id} has {pool.num_free_blocks} free blocks of {pool.total_blocks}"
        if len(instance._free_slots) != core.config.performance.max_num_seqs:
            return f"{instance.id} has {len(instance._free_slots)} free slots"
        if instance.num_steps_in_flight:
            return f"{instance.id} has steps in flight"
    if len(core._requests._lookups):
        return f"{len(core._requests._lookups)} lookups in tiers are under way"
    if len(core._requests.tiers):
        return f"{len(core._requests.tiers)} copies of tiers are under way"
    if len(core._requests._transfers):
        return f"{len(core._requests._transfers)} transfers are open"
    check_books(core)
    return None
