"""The scheduler's view of the instances: each with its KV pool, slots, allocations and workers; all in `Instances`.

Most instances have one worker, which owns the pool's memory: when the worker is lost, so is the pool. Where a
resident process owns the memory (semi-PD), workers come and go, each for one phase and with a share of the device;
`WorkerChoice` says which of them computes next. A worker keeps nothing that a plan could not tell another worker,
so a sequence can change workers between two steps.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, ValuesView

from hbserve.config import Config, InstanceConfig, InstanceRole
from hbserve.kv_cache.block_pool import BlockPool
from hbserve.messages.worker import NUM_BOARD_CELLS, Hello, InstanceCommand
from hbserve.policy.dispatch_timer import DispatchTimer
from hbserve.policy.profile_curves import ProfileCurves
from hbserve.policy.step_time_predictor import StepTimePredictor
from hbserve.scheduler.core_io import Clock, OutboxWriter
from hbserve.scheduler.sequence import InflightStep, KVAllocation, Sequence
from hbserve.scheduler.worker import Work, WorkerHandle, phases_of
from hbserve.scheduler.worker_choice import WorkerChoice
from hbserve.speculation.measured_gain import GainMeter


class InstanceHandle:
    """One instance as the scheduler knows it; owner of its pool and slots.

    Args:
        instance: its configuration.
        config: the system's.
        address: where its one worker listens; None: workers are announced later (`SetWorkers`).
        curves: of its model's profile, if there is one.

    Attributes:
        workers: by id, in the order in which they came.
        allocations: of the sequences that plans may take, by sequence.
        reserved: of sequences that are still prefilled elsewhere.
        arena_epoch: identifies the pool's memory; an allocation of another epoch is void. 0: there is no memory.
        is_draining: it is given no more requests.
        given_up: why its launcher does not start it again; None: it may come back.
        unsettled: workers that may still do steps of an earlier scheduler on memory of which this one knows nothing
            yet, with the time by which they must register. Until then no block of the memory is given out.
        choice: decides which worker computes next.
        plan_at: when the next steps of its workers are looked at, see `wake` and `wake_at`.
        number: its place in the order of all instances; 0: it is none of the system's.
        has_eagle_head: its workers' drafts are those of an EAGLE-3 head, as far as they have introduced themselves.
    """

    def __init__(
        self,
        instance: InstanceConfig,
        config: Config,
        address: str | None,
        clock: Clock,
        outbox: OutboxWriter,
        curves: ProfileCurves | None = None,
    ) -> None:
        self.config = instance
        self._curves = curves
        self._clock = clock
        self.id = instance.instance_id
        self.role: InstanceRole = instance.instance_type
        self.workers: dict[str, WorkerHandle] = {}
        if address is not None:
            self.workers[self.id] = WorkerHandle(self.id, self.role, 100, address, clock, outbox)
        self.allocations: dict[Sequence, KVAllocation] = {}
        self.reserved: dict[Sequence, KVAllocation] = {}
        self.choice = WorkerChoice(self.role, self.workers, self.allocations, config, clock)
        self.is_draining = False
        self.unsettled: dict[str, float] = {}
        self.lost_since: float | None = clock.now
        self.why_lost = "has not started yet"
        self.given_up: str | None = None
        self.num_restarts = -1
        self.has_eagle_head = False
        self._work_of_ended = Work()
        self._performance = config.performance
        self.plan_at = -math.inf
        self._prompts: list[tuple[Sequence, KVAllocation]] | None = None  # None: to be found
        self.number = 0
        self._woken: list[InstanceHandle] = []
        self.reset()

    # --- when its next steps are looked at -------------------------------------------------------

    def enlist(self, woken: list[InstanceHandle], number: int) -> None:
        """Take a place in the order of all instances, and the list to which it adds itself whenever it is woken."""
        self._woken, self.number = woken, number
        woken.append(self)

    def wake(self) -> None:
        """Look at the workers' next steps in this step of the scheduler: something has changed that may allow a plan.

        No other instance is looked at. So whatever a plan depends on must call this when it changes: workers, their
        results, allocations, free blocks, links.
        """
        self.plan_at = -math.inf
        self._prompts = None
        self._woken.append(self)

    def wake_at(self, at: float) -> None:
        """Look at the workers' next steps at a time, if nothing changes before."""
        if at < self.plan_at:
            self.plan_at = at
            self._woken.append(self)

    # --- memory ----------------------------------------------------------------------------------

    @property
    def num_short_of_a_block(self) -> int:
        """Number of decoding sequences whose next token has no block yet."""
        return sum(
            sequence.decode_allocation is allocation
            and allocation.lacks_block
            and allocation.num_planned + 1 < sequence.max_total_tokens
            for sequence, allocation in self.allocations.items()
        )

    def reset(self) -> None:
        """Forget the pool's memory, which is gone, and all allocations in it."""
        self.arena_epoch = 0
        self.allocations.clear()
        self.reserved.clear()
        self._free_slots = list(range(self._performance.max_num_seqs))
        self.choice.reset()
        self.wake()

    # --- workers ---------------------------------------------------------------------------------

    def change_role(self, role: InstanceRole) -> None:
        """Take another role, for requests that come from now on.

        Requests under way go on where their memory is. An instance that now prefills decodes its sequences to their
        ends, in the same steps as new prompts. An instance that now decodes computes its prompts, and sends those that
        decode elsewhere.
        """
        self.role = role
        for worker in self.workers.values():
            worker.role = role
        self.choice.reset(role)
        self.choice.finishes_decodes = not role.decodes and bool(self.allocations)
        self.wake()

    def is_prepared_for(self, role: InstanceRole) -> bool:
        """Whether a change to a role needs no preparation, such as the capture of CUDA graphs."""
        return all(phases_of(role) <= worker.prepared_phases for worker in self.workers.values())

    @property
    def ready(self) -> bool:
        """Whether every phase of this instance has a worker, and its memory may be used."""
        roles = [worker.role for worker in self.workers.values() if worker.hello is not None]
        return (
            not self.unsettled
            and (not self.role.prefills or any(role.prefills for role in roles))
            and (not self.role.decodes or any(role.decodes for role in roles))
        )

    @property
    def hello(self) -> Hello | None:
        """The introduction of one of the registered workers; None if there is none."""
        return next((worker.hello for worker in self.workers.values() if worker.hello is not None), None)

    @property
    def num_steps_in_flight(self) -> int:
        """Over all workers."""
        return sum(len(worker.inflight) for worker in self.workers.values())

    @property
    def work(self) -> Work:
        """Totals of all workers that are or were here."""
        total = Work()
        for work in (self._work_of_ended, *(worker.work for worker in self.workers.values())):
            total.add(work)
        return total

    def register(self, worker: WorkerHandle, hello: Hello) -> None:
        """Take in a worker that has introduced itself; new memory means a new, empty pool."""
        worker.hello = hello
        self.has_eagle_head = hello.has_eagle_head
        worker.is_introduced = False
        worker.cell = None if worker.owns_memory or worker.role is InstanceRole.UNIFIED else self._free_cell(worker)
        worker.has_waited_for = 0
        peers = [other.timing for other in self.workers.values() if other is not worker and other.role is worker.role]
        predictor = StepTimePredictor(self._curves, worker.percentage)
        worker.timing = DispatchTimer(predictor, max(peers, key=lambda timing: timing.num_samples, default=None))
        worker.gain = GainMeter()
        worker.prepared_for, worker.prepared_phases = worker.started_as, phases_of(worker.started_as)
        worker.prepared_phases |= phases_of(hello.serves_as)
        if hello.arena_epoch != self.arena_epoch:
            self.reset()
            self.arena_epoch = hello.arena_epoch
            self.num_restarts += 1
            sharing = self._performance.enable_prefix_caching
            self.pool = BlockPool(hello.num_blocks, hello.block_size, enable_prefix_caching=sharing)
        self._settle(worker)

    def _free_cell(self, worker: WorkerHandle) -> int | None:
        taken = {other.cell for other in self.workers.values() if other is not worker}
        return next((cell for cell in range(NUM_BOARD_CELLS) if cell not in taken), None)

    def _settle(self, worker: WorkerHandle) -> None:
        """Note that a worker can do no steps of an earlier scheduler any more."""
        self.unsettled.pop(worker.id, None)
        if self.ready:
            self.lost_since = None
        self.wake()

    @property
    def why_missing(self) -> str:
        """Why it is not there, in words."""
        return self.why_lost if self.given_up is None else f"given up: {self.given_up}"

    def note_lost(self, reason: str) -> None:
        """Remember why a worker was lost and, if a phase now has no worker, since when."""
        self.why_lost = reason
        if self.lost_since is None and not self.ready:
            self.lost_since = self._clock.now

    def forget_worker(self, worker: WorkerHandle) -> list[InflightStep]:
        """Forget a worker that has ended; returns its steps that will never be confirmed."""
        worker.hello = None
        self.workers.pop(worker.id, None)
        self._work_of_ended.add(worker.work)
        self.choice.forget(worker)
        self._settle(worker)
        for allocation in self.allocations.values():
            allocation.blocks_sent.pop(worker.id, None)
        return worker.drop_steps()

    def send(self, command: InstanceCommand) -> None:
        """Send to the instance's one worker; transfers are only between instances that have one."""
        for worker in self.workers.values():
            worker.send(command)

    # --- allocations -----------------------------------------------------------------------------

    @property
    def num_sequences(self) -> int:
        """Sequences that have a slot here."""
        return len(self.allocations) + len(self.reserved)

    @property
    def num_slots(self) -> int:
        """Sequences that it can hold."""
        return self._performance.max_num_seqs

    @property
    def num_free_slots(self) -> int:
        """Sequences that can still be admitted."""
        return len(self._free_slots)

    @property
    def num_tokens_to_prefill(self) -> int:
        """Prompt tokens that are admitted here and not planned: the load that placement looks at."""
        return sum([allocation.num_to_prefill for _, allocation in self.prompts])

    @property
    def prompts(self) -> list[tuple[Sequence, KVAllocation]]:
        """The sequences with prompt tokens that are not planned. Only what wakes the instance adds one."""
        if self._prompts is None:
            self._prompts = list(self.allocations.items())
        if self._prompts:
            self._prompts = [item for item in self._prompts if item[1].num_to_prefill > 0]
        return self._prompts

    def take_slot(self) -> int:
        """Take the lowest free slot: low slots keep the workers' tables dense."""
        return heapq.heappop(self._free_slots)

    def reserve(self, sequence: Sequence, allocation: KVAllocation) -> None:
        """Keep an allocation for a sequence that is still prefilled elsewhere, or that waits for a load."""
        self.allocations.pop(sequence, None)
        self.reserved[sequence] = allocation

    def activate_until_load(self, sequence: Sequence, allocation: KVAllocation) -> None:
        """Have the sequence take part up to the beginning of its load, or not before the load has ended."""
        if allocation.load_start == allocation.num_planned:
            self.reserve(sequence, allocation)
        else:
            self.activate(sequence, allocation)

    def activate(self, sequence: Sequence, allocation: KVAllocation) -> None:
        """Have the sequence take part from the next plan on."""
        self.reserved.pop(sequence, None)
        self.allocations[sequence] = allocation
        if sequence.decode_allocation is allocation and not self.role.decodes:
            self.choice.finishes_decodes = True  # it was on its way here when the role changed
        self.wake()

    def free_slot(self, sequence: Sequence, allocation: KVAllocation) -> None:
        """Free an allocation's slot. Steps in flight may still name it; a worker works in order, so no harm."""
        if allocation.epoch != self.arena_epoch:
            return  # the memory is gone and all its allocations with it
        self.allocations.pop(sequence, None)
        self.reserved.pop(sequence, None)
        heapq.heappush(self._free_slots, allocation.slot)
        self.wake()


# --- all instances --------------------------------------------------------------------------------


class Instances(Mapping[str, InstanceHandle]):
    """The instances by id, in the order of the configuration; those that have joined come after.

    A step of the scheduler visits only instances that something has woken, so its cost does not grow with their number.
    Each instance adds itself to a list when something wakes it (`InstanceHandle.wake`), and every question here reads
    that list first.
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
