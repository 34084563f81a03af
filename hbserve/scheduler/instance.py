"""The scheduler's view of one instance: its pool, its allocations, and the workers that compute on it.

An instance is a KV pool with slots. Most have one worker, which owns the pool's memory: when it is
lost, the pool is. Where a resident process owns the memory, any number of workers may come and go,
each for one phase and with a share of the device; which of them gets a phase's next plan is decided
step by step (`choose_workers`). A worker keeps nothing that a plan could not tell the next one, so a
sequence changes workers between two steps. What is in flight at the old one, the new one waits for; they tell
each other on a board (`hbserve.engine.step_board`).
"""

from __future__ import annotations

import heapq
import math
import time

import zmq

from hbserve.config import InstanceConfig, InstanceRole, PerformanceConfig
from hbserve.config.semi_pd import DECODE_PACE, MIXED_PACE
from hbserve.kv_cache.block_pool import BlockPool
from hbserve.messages.worker import NUM_BOARD_CELLS, Hello, InstanceCommand
from hbserve.policy.decode_throttle import DecodeThrottle, choose_percentage
from hbserve.policy.dispatch_timer import DispatchTimer
from hbserve.policy.mixed_step_budget import MixedStepBudget, slack_s
from hbserve.rpc.cluster_key import ClusterKey
from hbserve.scheduler.sequence import InflightStep, KVAllocation, Sequence
from hbserve.scheduler.worker import Work, WorkerHandle

_PHASES = (InstanceRole.DECODE, InstanceRole.PREFILL)


class InstanceHandle:
    """One instance as the scheduler knows it.

    Args:
        address: of its one worker; None where workers are announced later.

    Attributes:
        workers: by name, in the order in which they came.
        arena_epoch: of the pool's memory; an allocation of another epoch is void. 0: there is none.
        shares: each phase's percentage while both are busy.
        is_mixed: both phases are done by one worker, in the same steps.
        is_draining: it is given no more requests.
        turns: when decode computes while prefill is busy at another worker; None: always.
        mixed_steps: decode's pace where one worker does both.
        tpot_target_ms: of requests that come without one; None: nothing is asked of those.
    """

    def __init__(
        self,
        config: InstanceConfig,
        performance: PerformanceConfig,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str | None,
        key: ClusterKey | None = None,
    ) -> None:
        self.config = config
        self.id = config.instance_id
        self.role: InstanceRole = config.instance_type
        self.workers: dict[str, WorkerHandle] = {}
        if address is not None:
            self.workers[self.id] = WorkerHandle(self.id, self.role, 100, context, address, key)
        self.is_draining = False
        self.arena_epoch = 0
        self.shares = dict.fromkeys(_PHASES, 100)
        self.is_mixed = False
        self.turns: DecodeThrottle | None = None
        self.mixed_steps = MixedStepBudget()
        self.tpot_target_ms: float | None = None
        self.lost_since: float | None = time.monotonic()
        self.why_lost = "has not started yet"
        self.num_restarts = -1
        self._work_of_ended = Work()
        self._performance = performance
        self.reset()

    def change_role(self, role: InstanceRole) -> None:
        """From now on it does something else; it must have nothing to do."""
        at_work = self.allocations or self.reserved or self.num_steps_in_flight
        assert not at_work, f"{self.id} is at work"
        self.role = role
        for worker in self.workers.values():
            worker.role = role
        self._current.clear()

    def reset(self) -> None:
        """The pool's memory is gone, and all allocations with it."""
        self.arena_epoch = 0
        self.allocations: dict[Sequence, KVAllocation] = {}
        self.reserved: dict[Sequence, KVAllocation] = {}
        self._free_slots = list(range(self._performance.max_num_seqs))
        self._current: dict[InstanceRole, WorkerHandle] = {}

    @property
    def ready(self) -> bool:
        """Whether every phase that is done here has a worker."""
        roles = [worker.role for worker in self.workers.values() if worker.ready]
        return (not self.role.prefills or any(role.prefills for role in roles)) and (
            not self.role.decodes or any(role.decodes for role in roles)
        )

    @property
    def hello(self) -> Hello | None:
        """What one of the registered workers said of itself; None where there is none."""
        return next((worker.hello for worker in self.workers.values() if worker.hello is not None), None)

    @property
    def num_steps_in_flight(self) -> int:
        """Over all workers."""
        return sum(len(worker.inflight) for worker in self.workers.values())

    @property
    def work(self) -> Work:
        """Of all workers that are or were here."""
        total = Work()
        for work in (self._work_of_ended, *(worker.work for worker in self.workers.values())):
            total.add(work)
        return total

    def register(self, worker: WorkerHandle, hello: Hello) -> None:
        """A worker is here; if it comes with new memory, so is a new pool, which is empty."""
        worker.hello = hello
        worker.is_introduced = False
        worker.cell = None if worker.owns_memory or worker.role is InstanceRole.UNIFIED else self._free_cell(worker)
        worker.has_waited_for = 0
        peers = [other.timing for other in self.workers.values() if other is not worker and other.role is worker.role]
        worker.timing = DispatchTimer(max(peers, key=lambda timing: timing.num_samples, default=None))
        worker.prepared_for = worker.started_as
        worker.last_seen = time.monotonic()
        if hello.arena_epoch != self.arena_epoch:
            self.reset()
            self.arena_epoch = hello.arena_epoch
            self.num_restarts += 1
            self.pool = BlockPool(
                hello.num_blocks, hello.block_size, enable_prefix_caching=self._performance.enable_prefix_caching
            )
        if self.ready:
            self.lost_since = None

    def _free_cell(self, worker: WorkerHandle) -> int | None:
        taken = {other.cell for other in self.workers.values() if other is not worker}
        return next((cell for cell in range(NUM_BOARD_CELLS) if cell not in taken), None)

    def note_lost(self, why: str) -> None:
        """Remember since when and why some phase has no worker, if that is so."""
        self.why_lost = why
        if self.lost_since is None and not self.ready:
            self.lost_since = time.monotonic()

    def send(self, command: InstanceCommand) -> None:
        """Send to the instance's one worker; transfers are only between instances that have one."""
        for worker in self.workers.values():
            worker.send(command)

    # --- who computes ----------------------------------------------------------------------------

    def choose_workers(self) -> dict[WorkerHandle, set[InstanceRole]]:
        """Who may get plans now, and for which phases.

        Where phases are mixed, one worker does both. Else the other phase's being idle or busy decides the
        share, and so the worker; between decode's turns prefill counts as alone. The new worker's first step
        waits for the last one of the old worker (`steps_ahead`); where it cannot, the change does.
        """
        chosen: dict[WorkerHandle, set[InstanceRole]] = {}
        mixing = self._mixing_worker()
        busy = {phase: self._is_busy(phase) for phase in _PHASES}
        alone = {phase: not busy[_other(phase)] for phase in _PHASES}
        if self.turns is not None:
            if all(busy.values()) and mixing is None:
                alone[InstanceRole.PREFILL] = not self._update_turns(self.turns, time.monotonic())
            else:
                self.turns.on_idle(time.monotonic())
        for phase in _PHASES:
            target = mixing or self._worker_at_share(phase, alone[phase])
            if target is None:
                continue
            current = self._current.get(phase)
            if current is not None and current is not target and not _can_change(current, target):
                continue
            self._current[phase] = target
            chosen.setdefault(target, set()).add(phase)
        return chosen

    def steps_ahead(self, worker: WorkerHandle) -> list[tuple[WorkerHandle, InflightStep]]:
        """Steps in flight at others that a worker's next one comes after; all of a phase's are in one order."""
        return [
            (other, step)
            for other in self.workers.values()
            if other is not worker and worker.can_follow(other)
            for step in other.inflight
            if step.rows
        ]

    def whose_result_is_next(self) -> WorkerHandle | None:
        """Of the workers with results that are not confirmed; None: what comes before them is not yet heard of."""
        for worker in self.workers.values():
            if worker.results:
                after = worker.inflight[0].after
                if not after or all(step.step_id > after for _, step in self.steps_ahead(worker)):
                    return worker
        return None

    def _mixing_worker(self) -> WorkerHandle | None:
        """Who does both phases now; None where they are done side by side, or it is not there."""
        able = [w for w in self.workers.values() if w.ready and not w.is_retiring and w.role is InstanceRole.UNIFIED]
        return max(able, key=lambda worker: worker.percentage) if self.is_mixed and able else None

    def _worker_at_share(self, phase: InstanceRole, is_alone: bool) -> WorkerHandle | None:
        candidates = self._candidates(phase)
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        percentages = [worker.percentage for worker in candidates]
        wanted = choose_percentage(percentages, self.shares[phase], is_alone)
        return next(worker for worker in reversed(candidates) if worker.percentage == wanted)

    def mixed_interval_s(self, worker: WorkerHandle, phases: set[InstanceRole]) -> float | None:
        """From one decode step to the next, mean, at a worker that mixes both phases now; None: as it comes."""
        if not self.is_mixed or len(phases) < 2 or worker.role is not InstanceRole.UNIFIED:
            return None
        target_ms = min((ms for ms in (self.tpot_target_ms, self._tightest_tpot_ms()) if ms is not None), default=None)
        return None if target_ms is None else MIXED_PACE * target_ms / 1000

    def spare_s(self, sequence: Sequence, allocation: KVAllocation, interval_s: float, now: float) -> float:
        """Time that a sequence that decodes here can lose, see `spare_s`; infinite where nothing is asked of it."""
        target_ms = sequence.tpot_target_ms or self.tpot_target_ms
        if target_ms is None:
            return math.inf
        num_tokens = sequence.max_total_tokens - sequence.num_prompt_tokens - 1
        num_left = sequence.max_total_tokens - allocation.num_planned - 1
        return slack_s(now, sequence.first_token_time or now, num_tokens, num_left, target_ms / 1000, interval_s)

    def _update_turns(self, turns: DecodeThrottle, now: float) -> bool:
        """By the tightest TPOT target that a request here came with, and by what each can spare."""
        target_ms = self._tightest_tpot_ms()
        needed_s = None if target_ms is None else DECODE_PACE * target_ms / 1000
        decoding = [item for item in self.allocations.items() if item[1].num_planned >= item[1].num_tokens_at_entry]
        spares = (self.spare_s(sequence, allocation, turns.interval_s, now) for sequence, allocation in decoding)
        prefill = self._current.get(InstanceRole.PREFILL)
        return turns.update(now, needed_s, min(spares, default=math.inf), prefill.last_step_s if prefill else 0.0)

    def _tightest_tpot_ms(self) -> float | None:
        return min((ms for sequence in self.allocations if (ms := sequence.tpot_target_ms) is not None), default=None)

    def takes_turns(self, phases: set[InstanceRole]) -> bool:
        """Whether a worker of these phases computes decode steps that may have to wait for prefill's."""
        is_alone = self.turns is None or self.is_mixed or phases != {InstanceRole.DECODE}
        return not is_alone and self._is_busy(InstanceRole.PREFILL)

    def decode_has_turn(self) -> bool:
        """While prefill is busy: decode steps go beside the prefill steps that were planned for it."""
        assert self.turns is not None
        prefill = self._current.get(InstanceRole.PREFILL)
        steps = [] if prefill is None else [*(step for _, step in self.steps_ahead(prefill)), *prefill.inflight]
        if not steps:
            return self.turns.is_open
        return steps[0].beside_decode or self.turns.is_overdue

    def max_in_flight(self, phases: set[InstanceRole], depth: int) -> int:
        """Steps of a worker; one in decode's turns, since what is in flight cannot wait, unless decode is behind."""
        return 1 if self.takes_turns(phases) and self.turns is not None and not self.turns.is_behind else depth

    def note_planned(self, worker: WorkerHandle, phases: set[InstanceRole]) -> None:
        """A step has been planned; the turns of decode count it."""
        if self.turns is None:
            return
        if phases == {InstanceRole.PREFILL}:
            worker.inflight[-1].beside_decode = self.turns.is_open
        elif self.takes_turns(phases):
            self.turns.on_decode_step()

    def _candidates(self, phase: InstanceRole) -> list[WorkerHandle]:
        # Short prompts may be computed where they decode; admission allocations no others there.
        role = InstanceRole.DECODE if self.role is InstanceRole.DECODE else phase
        there = [worker for worker in self.workers.values() if worker.ready and not worker.is_told_to_end]
        able = [worker for worker in there if _does(worker.role, role) and _does(self.role, role)]
        # Who can do both does one only where nobody else is there.
        able = [worker for worker in able if worker.role is not InstanceRole.UNIFIED] or able
        if self.awaits_worker(role):
            return able  # another rung in between would be one change more, and a larger share than the phase's own
        return [worker for worker in able if not worker.is_retiring] or able

    def awaits_worker(self, role: InstanceRole) -> bool:
        """Whether one has been named that is not registered yet."""
        return any(w.role is role and not w.ready and not w.is_retiring for w in self.workers.values())

    def is_current(self, worker: WorkerHandle) -> bool:
        """Whether it got a phase's plans last."""
        return worker in self._current.values()

    def _is_busy(self, phase: InstanceRole) -> bool:
        current = self._current.get(phase)
        if current is not None and (current.inflight or self.steps_ahead(current)):
            return True
        if phase is InstanceRole.PREFILL:
            return any(
                allocation.num_planned < allocation.num_tokens_at_entry for allocation in self.allocations.values()
            )
        return any(
            allocation.num_planned >= allocation.num_tokens_at_entry
            and allocation.num_planned + 1 < sequence.max_total_tokens
            for sequence, allocation in self.allocations.items()
        )

    def forget_worker(self, worker: WorkerHandle) -> list[InflightStep]:
        """A worker has ended; returns its steps that will never be confirmed."""
        worker.hello = None
        self.workers.pop(worker.id, None)
        self._work_of_ended.add(worker.work)
        for phase in _PHASES:
            if self._current.get(phase) is worker:
                del self._current[phase]
        for allocation in self.allocations.values():
            allocation.blocks_sent.pop(worker, None)
        unconfirmed = list(worker.inflight)
        worker.inflight.clear()
        return unconfirmed

    # --- allocations -----------------------------------------------------------------------------------

    @property
    def has_free_slot(self) -> bool:
        """Whether one more sequence can be admitted."""
        return bool(self._free_slots)

    def take_slot(self) -> int:
        """The lowest free slot: low slots keep the workers' tables dense."""
        return heapq.heappop(self._free_slots)

    def reserve(self, sequence: Sequence, allocation: KVAllocation) -> None:
        """Keep an allocation for a sequence that is still prefilled elsewhere."""
        self.reserved[sequence] = allocation

    def activate(self, sequence: Sequence, allocation: KVAllocation) -> None:
        """From the next plan on, the sequence takes part."""
        self.reserved.pop(sequence, None)
        self.allocations[sequence] = allocation

    def free_slot(self, sequence: Sequence, allocation: KVAllocation) -> None:
        """Free an allocation. Steps in flight may still name its slot; a worker works in order, so no harm."""
        if allocation.epoch != self.arena_epoch:
            return  # the memory is gone and all its allocations with it
        self.allocations.pop(sequence, None)
        self.reserved.pop(sequence, None)
        heapq.heappush(self._free_slots, allocation.slot)

    @property
    def num_tokens_to_prefill(self) -> int:
        """Prompt tokens that are admitted here and not planned: the load that placement looks at."""
        return sum(
            max(0, allocation.num_tokens_at_entry - allocation.num_planned) for allocation in self.allocations.values()
        )


def _can_change(current: WorkerHandle, target: WorkerHandle) -> bool:
    """Whether a phase can go from one worker to another now."""
    if not current.ready or not current.inflight:
        return True
    # Of a sequence with more to it than its last token, nobody else knows that before the step is confirmed.
    rows = (row for step in current.inflight for row in step.rows)
    return target.can_follow(current) and not any(row.samples and row.sequence.keeps_state for row in rows)


def _other(phase: InstanceRole) -> InstanceRole:
    return InstanceRole.PREFILL if phase is InstanceRole.DECODE else InstanceRole.DECODE


def _does(role: InstanceRole, phase: InstanceRole) -> bool:
    return role.prefills if phase is InstanceRole.PREFILL else role.decodes
