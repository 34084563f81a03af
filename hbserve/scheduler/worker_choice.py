"""The choice of the worker that computes next, and of the time that its step may take.

Most instances have one worker, which does every phase of the instance. A semi-PD instance has several on one KV
pool: each does one phase (or both, mixed in one step) with a share of the device. A phase goes to the worker whose
share fits what the other phase is doing. All steps of a phase have one order, also across workers: the first step at a
new worker waits until the last step at the old worker has ended. The workers see to that themselves
(`hbserve.engine.step_board`), so the scheduler can plan both steps at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from hbserve.config import Config, InstanceRole
from hbserve.config.semi_pd import DECODE_PACE, MIXED_PACE
from hbserve.policy.decode_throttle import DecodeThrottle, choose_percentage
from hbserve.policy.gap_budget import GapBudget
from hbserve.policy.mixed_step_budget import MIN_TOKENS, MIN_TOKENS_ALONE, MixedStepBudget, slack_s
from hbserve.policy.step_time_predictor import StepWork, num_pairs
from hbserve.scheduler.core_io import Clock
from hbserve.scheduler.sequence import InflightStep, KVAllocation, Sequence
from hbserve.scheduler.worker import WorkerHandle

_MAX_OVERHEAD = 0.1
"""Share of a step's time that does not depend on its work. Beside decode rows without a target, a step has no more
prompt tokens than bring it down to this."""
_MAX_OVERHEAD_OF_PROMPTS = 0.05
"""The same of a step that targets bound. A larger one gains less than this, and what comes meanwhile waits for its end:
static splits on an H200 serve up to 7 points more of Mooncake's conversations so than with steps of 8,192 tokens."""
_SOFT_TOKENS = 2048
"""Tokens of a step where targets are a guess. Larger steps compute prompts hardly faster."""
_MAX_SOFT_TOKENS = 4 * _SOFT_TOKENS
"""Tokens of prompts that are counted to see how many wait."""
_STEP_SHARE = 0.25
"""Share of the TTFT target that a step of prompts may take: what comes while it runs waits for its end."""
_BATCH_SHARE = 0.1
"""The same of a step with nothing but best-effort work."""
_BATCH_DELAY = 0.0125
"""Share of the TTFT target by which best-effort work may lengthen a step with other work."""
_BATCH_TPOT_SHARE = 0.1
"""The same of the TPOT target. Slower sequences are more sequences, and each is in the steps of every prompt."""
PHASES = (InstanceRole.DECODE, InstanceRole.PREFILL)
_PHASES_OF_ONE = {
    InstanceRole.UNIFIED: set(PHASES),
    InstanceRole.DECODE: set(PHASES),  # it computes short prompts, too; admission allocates no others there
    InstanceRole.PREFILL: {InstanceRole.PREFILL},
}
"""Phases of the one worker that an instance of a role has."""


class StepLimit(NamedTuple):
    """Limits of one step.

    Attributes:
        seconds: how long it may take, if it has prompts.
        batch_alone_s: how long it may take with nothing but best-effort work in it.
        batch_delay_s: by how much best-effort work may lengthen it.
        takes_decodes: it may have decode rows.
        prompt_tokens: how many it may have; ``min_prompt_tokens``: however long these take.
        batch_s: how long it may take with best-effort work beside other work.
        is_accounted: decode keeps an account of its lead, which counts this step.
    """

    seconds: float
    batch_alone_s: float
    batch_delay_s: float
    takes_decodes: bool = True
    prompt_tokens: int = 0
    min_prompt_tokens: int = MIN_TOKENS_ALONE
    batch_s: float = math.inf
    is_accounted: bool = False


class WorkerChoice:
    """Decides which worker of an instance gets a phase's next step; owner of that choice and of its pace.

    Args:
        role: the instance's role.
        workers, allocations: the instance's own, read here.
        config: the system's, for targets and for decode's throttle.

    Attributes:
        shares: each phase's percentage while both phases are busy.
        is_mixed: one worker does both phases, in the same steps.
        finishes_decodes: a prefill instance decodes what it had when it got this role.
        tokens_per_step: prompt tokens that a step has time for, at most, as of the last plan.
    """

    def __init__(
        self,
        role: InstanceRole,
        workers: Mapping[str, WorkerHandle],
        allocations: Mapping[Sequence, KVAllocation],
        config: Config,
        clock: Clock,
    ) -> None:
        self.shares = dict.fromkeys(PHASES, 100)
        self.is_mixed = self.finishes_decodes = False
        self.tokens_per_step = math.inf
        self._role = role
        self._clock = clock
        self._workers = workers
        self._allocations = allocations
        self._prompt_budget = config.prefill_budget
        chunked = config.chunked_prefill
        self._has_no_token_limit = chunked.enabled and chunked.max_chunk_prefill_tokens is None
        self._is_side_by_side = False  # both phases are busy, at different workers
        self._current: dict[InstanceRole, WorkerHandle] = {}
        slo = config.semi_pd.slo
        # Applies to requests without a target of their own; None: no target.
        self._tpot_target_ms = config.scheduler.tpot_ms if slo is None else slo.tpot_target_ms
        self._targets_are_soft = config.scheduler.targets_are_soft
        self._soft_tpot_s: float | None = None
        self._gaps = GapBudget()
        if self._targets_are_soft:
            if self._tpot_target_ms is not None:
                self._soft_tpot_s = self._tpot_target_ms / 1000
            self._tpot_target_ms = None
        # Says when decode computes while prefill is busy at another worker; None: always.
        self._throttle: DecodeThrottle | None = None
        if slo is not None and slo.holds_back_decode:
            self._throttle = DecodeThrottle(slo.decode_interval_ms / 1000)
        self._mixed_steps = MixedStepBudget(holds_back_decode=slo is None or slo.holds_back_decode)

    @property
    def overdue_at(self) -> float:
        """When decode, for which `may_plan` has returned False, waits no longer."""
        return math.inf if self._throttle is None else self._throttle.overdue_at

    def reset(self, role: InstanceRole | None = None) -> None:
        """Forget which workers the phases were at; the instance may have a new role."""
        self._role = role or self._role
        self._current.clear()

    def forget(self, worker: WorkerHandle) -> None:
        """Forget a worker that has ended."""
        self._current = {phase: current for phase, current in self._current.items() if current is not worker}

    def set_shares(self, shares: dict[InstanceRole, int], is_mixed: bool) -> bool:
        """Set each phase's percentage, and whether one worker does both; returns whether anything changed."""
        changed = (shares, is_mixed) != (self.shares, self.is_mixed)
        self.shares, self.is_mixed = shares, is_mixed
        return changed

    # --- the worker of a phase -------------------------------------------------------------------

    def choose_workers(self) -> dict[WorkerHandle, set[InstanceRole]]:
        """Return the workers that may get plans now, each with its phases.

        Mixed phases go to one worker. Otherwise the share, and so the worker, depends on whether the other phase is
        busy; between decode's turns prefill counts as alone. The new worker's first step waits for the old worker's
        last one (`steps_ahead`). Where it cannot wait, the change does.
        """
        if self._role is not InstanceRole.SEMI_PD and len(self._workers) == 1:
            phases = _PHASES_OF_ONE[self._role]
            if self.finishes_decodes:
                self.finishes_decodes = any(s.decode_allocation is a for s, a in self._allocations.items())
                phases = set(PHASES)
            return {worker: phases for worker in self._workers.values() if worker.can_take_plans}
        chosen: dict[WorkerHandle, set[InstanceRole]] = {}
        mixing = self._mixing_worker()
        busy = {phase: self._is_busy(phase) for phase in PHASES}
        alone = {phase: not busy[_other(phase)] for phase in PHASES}
        self._is_side_by_side = all(busy.values()) and mixing is None and len(self._workers) > 1
        if self._throttle is not None:
            if all(busy.values()) and mixing is None:
                alone[InstanceRole.PREFILL] = not self._update_throttle(self._throttle, self._clock.now)
            else:
                self._throttle.on_idle(self._clock.now)
        for phase in PHASES:
            target = mixing or self._worker_at_share(phase, alone[phase])
            if target is None:
                continue
            current = self._current.get(phase)
            if current is not None and current is not target and not _can_change(current, target):
                continue
            self._current[phase] = target
            chosen.setdefault(target, set()).add(phase)
        return chosen

    def is_current(self, worker: WorkerHandle) -> bool:
        """Whether the worker got a phase's plans last."""
        return worker in self._current.values()

    def awaits_worker(self, role: InstanceRole) -> bool:
        """Whether a worker of a role has been announced and is not registered yet."""
        return any(w.role is role and not w.ready and not w.is_draining for w in self._workers.values())

    def _mixing_worker(self) -> WorkerHandle | None:
        """Return the worker that does both phases now; None: the phases are side by side, or it is not there."""
        able = [w for w in self._workers.values() if w.ready and not w.is_draining and w.role is InstanceRole.UNIFIED]
        return max(able, key=lambda worker: worker.percentage) if self.is_mixed and able else None

    def _worker_at_share(self, phase: InstanceRole, is_alone: bool) -> WorkerHandle | None:
        candidates = self._candidates(phase)
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        percentages = [worker.percentage for worker in candidates]
        wanted = choose_percentage(percentages, self.shares[phase], is_alone)
        return next(worker for worker in reversed(candidates) if worker.percentage == wanted)

    def _candidates(self, phase: InstanceRole) -> list[WorkerHandle]:
        able = [worker for worker in self._workers.values() if worker.can_take_plans and _does(worker.role, phase)]
        # A unified worker does one phase only where no worker of that phase is there.
        able = [worker for worker in able if worker.role is not InstanceRole.UNIFIED] or able
        if self.awaits_worker(phase):
            return able  # an intermediate worker would be one more change, at a larger share than the phase's own
        return [worker for worker in able if not worker.is_draining] or able

    def _is_busy(self, phase: InstanceRole) -> bool:
        current = self._current.get(phase)
        if current is not None and (current.inflight or self.steps_ahead(current)):
            return True
        if phase is InstanceRole.PREFILL:
            return any(a.num_to_prefill > 0 for a in self._allocations.values())
        return any(
            a.num_planned >= a.num_tokens_at_entry and a.num_planned + 1 < sequence.max_total_tokens
            for sequence, a in self._allocations.items()
        )

    # --- the order of steps ----------------------------------------------------------------------

    def steps_ahead(self, worker: WorkerHandle) -> list[tuple[WorkerHandle, InflightStep]]:
        """Return the steps in flight at other workers that a worker's next step comes after."""
        if len(self._workers) == 1:
            return []
        return [
            (other, step)
            for other in self._workers.values()
            if other is not worker and worker.can_follow(other)
            for step in other.inflight
            if step.rows
        ]

    def can_take(self, worker: WorkerHandle, allocation: KVAllocation) -> bool:
        """Whether a worker may get a sequence's next row: its rows in flight are there, or at one it can follow."""
        if not allocation.num_inflight or allocation.last_worker_id == worker.id:
            return True
        last = self._workers.get(allocation.last_worker_id or "")
        return last is not None and worker.can_follow(last)

    def next_to_confirm(self) -> WorkerHandle | None:
        """Return a worker whose oldest result can be confirmed; None: results of earlier steps are missing."""
        for worker in self._workers.values():
            if worker.results:
                after = worker.inflight[0].after
                if not after or all(step.step_id > after for _, step in self.steps_ahead(worker)):
                    return worker
        return None

    # --- decode's turns beside prefill -----------------------------------------------------------

    def _update_throttle(self, throttle: DecodeThrottle, now: float) -> bool:
        """Return whether decode has its turn, by the tightest TPOT target here and each sequence's slack."""
        target_ms = self._tightest_tpot_ms()
        needed_s = None if target_ms is None else DECODE_PACE * target_ms / 1000
        decoding = [item for item in self._allocations.items() if item[1].num_planned >= item[1].num_tokens_at_entry]
        slacks = (self._slack_s(sequence, allocation, throttle.interval_s, now) for sequence, allocation in decoding)
        prefill = self._current.get(InstanceRole.PREFILL)
        prompts = self._next_prompts(int(min(self._prompt_budget, self.tokens_per_step)))
        step_s = prefill.timing.predictor.seconds(prompts) if prefill else 0.0
        return throttle.update(now, needed_s, min(slacks, default=math.inf), step_s)

    def _next_prompts(self, max_tokens: int, with_batch: bool = True) -> StepWork:
        """Return the work of a step with as many of the waiting prompt tokens as it can have, and without decode rows.

        The policy may choose others of them.

        Args:
            max_tokens: of the step.
            with_batch: those of best-effort requests count, too.
        """
        tokens, pairs = 0, 0.0
        for sequence, allocation in self._allocations.items():
            if sequence.is_batch and not with_batch:
                continue
            chunk = min(allocation.num_to_prefill, max_tokens - tokens)
            if chunk > 0:
                tokens += chunk
                pairs += num_pairs(chunk, allocation.num_planned)
        return StepWork(0, 0, tokens, pairs)

    def is_shared(self, phases: set[InstanceRole]) -> bool:
        """Whether another worker computes on the device beside a step of these phases that is planned now."""
        has_turn = self._throttle is None or self._throttle.is_open
        return self._is_side_by_side and (has_turn or phases == {InstanceRole.DECODE})

    def _is_throttled(self, phases: set[InstanceRole]) -> bool:
        """Whether a worker of these phases computes decode steps that may have to wait for prefill's."""
        is_alone = self._throttle is None or self.is_mixed or phases != {InstanceRole.DECODE}
        return not is_alone and self._is_busy(InstanceRole.PREFILL)

    def may_plan(self, phases: set[InstanceRole]) -> bool:
        """Whether a worker of these phases may get a step now: decode waits for its turn while prefill is busy.

        Decode steps go beside the prefill steps that were planned for that.
        """
        if self._throttle is None or not self._is_throttled(phases):
            return True
        prefill = self._current.get(InstanceRole.PREFILL)
        steps = [] if prefill is None else [*(step for _, step in self.steps_ahead(prefill)), *prefill.inflight]
        if not steps:
            return self._throttle.is_open
        return steps[0].beside_decode or self._throttle.is_overdue

    def max_in_flight(self, phases: set[InstanceRole], depth: int) -> int:
        """Return how many steps a worker may have in flight.

        In decode's turns it is one, since a step in flight cannot wait; it is ``depth`` if decode is behind.
        """
        if self._throttle is None or self._throttle.is_behind or not self._is_throttled(phases):
            return depth
        return 1

    def on_planned(self, worker: WorkerHandle, phases: set[InstanceRole]) -> None:
        """A step has been planned; decode's turns count it."""
        if self._throttle is None:
            return
        if phases == {InstanceRole.PREFILL}:
            worker.inflight[-1].beside_decode = self._throttle.is_open
        elif self._is_throttled(phases):
            self._throttle.on_decode_step()

    # --- the size of a step ----------------------------------------------------------------------

    def step_limit(self, worker: WorkerHandle, phases: set[InstanceRole], ttft_s: float) -> StepLimit:
        """Return the limits of a worker's next step.

        Args:
            ttft_s: the tightest TTFT target of requests that may come meanwhile; infinite: there is none.
        """
        limit = self._step_limit(worker, phases, ttft_s)
        if InstanceRole.PREFILL in phases:
            in_time = worker.timing.predictor.tokens_within(StepWork(0, 0), 0, limit.seconds)
            self.tokens_per_step = min(limit.prompt_tokens, max(limit.min_prompt_tokens, in_time))
            if len(phases) == 2 and self._soft_tpot_s is not None:  # how long a gap is depends on how many wait
                self.tokens_per_step = _MAX_SOFT_TOKENS
        return limit

    def _step_limit(self, worker: WorkerHandle, phases: set[InstanceRole], ttft_s: float) -> StepLimit:
        max_step_s = _STEP_SHARE * ttft_s
        limit = StepLimit(max_step_s, batch_alone_s=_BATCH_SHARE * ttft_s, batch_delay_s=_BATCH_DELAY * ttft_s)
        decoding: list[tuple[Sequence, KVAllocation]] = []
        waiting_tokens, now = 0, self._clock.now
        for sequence, allocation in self._allocations.items():
            if sequence.planned_from > now:  # no step can have it yet, so no other row makes room for it
                continue
            if allocation.num_planned >= allocation.num_tokens_at_entry:
                if not sequence.is_batch and sequence.decode_allocation is allocation:
                    decoding.append((sequence, allocation))
            elif not sequence.is_batch and self.can_take(worker, allocation):
                waiting_tokens += allocation.num_to_prefill
        predictor, max_tokens = worker.timing.predictor, self._prompt_budget
        if self._has_no_token_limit and max_step_s < math.inf:
            efficient = max(predictor.efficient_tokens(_MAX_OVERHEAD_OF_PROMPTS), _SOFT_TOKENS)
            max_tokens = int(min(efficient, max_tokens))
        targets_ms = [ms for sequence, _ in decoding if (ms := self._target_ms(sequence))]
        if targets_ms:
            min_ms = 1000 * predictor.seconds(StepWork(1, 0))  # no step can keep a tighter target
            targets_ms = [ms for ms in targets_ms if ms > min_ms]
        known_tokens = int(min(predictor.max_known_tokens, max_tokens))
        if not targets_ms:
            if self._targets_are_soft:
                limit = limit._replace(seconds=math.inf)
                max_tokens = min(known_tokens, max(_SOFT_TOKENS - len(decoding), MIN_TOKENS_ALONE))
                if len(phases) == 2 and decoding and waiting_tokens and self._soft_tpot_s is not None:
                    return self._limit_by_gap(limit, worker, decoding, known_tokens, self._soft_tpot_s)
            elif decoding and self._has_no_token_limit:
                efficient = max(predictor.efficient_tokens(_MAX_OVERHEAD), MIN_TOKENS_ALONE)
                max_tokens = int(min(efficient, known_tokens))
            elif max_step_s < math.inf:
                max_tokens = known_tokens
            return limit._replace(prompt_tokens=max_tokens)
        max_tokens = known_tokens
        interval_s = MIXED_PACE * min(targets_ms) / 1000
        batch_delay_s = min(limit.batch_delay_s, _BATCH_TPOT_SHARE * min(targets_ms) / 1000)
        limit = limit._replace(batch_delay_s=batch_delay_s)
        if len(phases) < 2:
            seconds = max_step_s if InstanceRole.PREFILL in phases else interval_s
            return limit._replace(seconds=seconds, prompt_tokens=max_tokens, batch_s=interval_s)
        min_slack_s, prompts_s = math.inf, 0.0
        if waiting_tokens:
            # This step begins when the one under way ends, some milliseconds after its plan is made.
            begins_at = max(now, worker.timing.expected_end() or now)
            min_slack_s = min(self._slack_s(sequence, a, interval_s, begins_at) for sequence, a in decoding)
            prompts_s = predictor.estimate_s(self._next_prompts(max_tokens, with_batch=False))
        fills_a_step = waiting_tokens >= max_tokens or prompts_s >= max_step_s
        limit_s = self._mixed_steps.limit_s(now, interval_s, min_slack_s, min(prompts_s, max_step_s), fills_a_step)
        if limit_s == math.inf:
            return limit._replace(takes_decodes=False, prompt_tokens=max_tokens, batch_s=0.0)
        return limit._replace(
            seconds=min(limit_s, max_step_s),
            prompt_tokens=max_tokens,
            min_prompt_tokens=MIN_TOKENS,
            batch_s=interval_s if self._mixed_steps.is_ahead(now) else 0.0,
            is_accounted=True,
        )

    def _limit_by_gap(
        self,
        limit: StepLimit,
        worker: WorkerHandle,
        decoding: list[tuple[Sequence, KVAllocation]],
        known_tokens: int,
        tpot_s: float,
    ) -> StepLimit:
        """Return the limits of a step with prompts and decode rows whose targets are a guess."""
        predictor, max_tokens = worker.timing.predictor, min(known_tokens, _SOFT_TOKENS)
        begins_at = max(self._clock.now, worker.timing.expected_end() or self._clock.now)
        prompts_s = predictor.estimate_s(self._next_prompts(_MAX_SOFT_TOKENS, with_batch=False))
        alone_s = predictor.estimate_s(self._next_prompts(max_tokens, with_batch=False))
        decode_s = predictor.estimate_s(StepWork(len(decoding), sum([a.num_planned for _, a in decoding])))
        seconds = self._gaps.limit_s(begins_at, tpot_s, prompts_s, alone_s, decode_s)
        if seconds == math.inf:
            return limit._replace(takes_decodes=False, prompt_tokens=max_tokens, batch_s=0.0)
        return limit._replace(seconds=seconds, prompt_tokens=max_tokens)

    def on_mixed_step(self, now: float, beside_prompts: bool) -> None:
        """A step with decode rows has been planned under a limit of time."""
        self._mixed_steps.on_decode_step(now, beside_prompts)

    def on_decode_step(self) -> None:
        """A step with decode rows has been planned."""
        self._gaps.on_decode_step()

    def _target_ms(self, sequence: Sequence) -> float | None:
        return None if sequence.is_batch else sequence.tpot_target_ms or self._tpot_target_ms

    def _slack_s(self, sequence: Sequence, allocation: KVAllocation, interval_s: float, now: float) -> float:
        """Return the time that a decoding sequence can lose, see `slack_s`; infinity without a target.

        Args:
            now: when its next step begins, at the soonest.
        """
        target_ms = self._target_ms(sequence)
        if target_ms is None:
            return math.inf
        num_tokens = sequence.max_total_tokens - sequence.num_prompt_tokens - 1
        num_left = sequence.max_total_tokens - allocation.num_planned - 1
        return slack_s(now, sequence.first_token_time or now, num_tokens, num_left, target_ms / 1000, interval_s)

    def is_late(self, sequence: Sequence, allocation: KVAllocation) -> bool:
        """Whether a decoding sequence is behind its TPOT target."""
        target_ms = self._target_ms(sequence)
        return target_ms is not None and self._slack_s(sequence, allocation, target_ms / 1000, self._clock.now) < 0

    def _tightest_tpot_ms(self) -> float | None:
        return min((ms for sequence in self._allocations if (ms := sequence.tpot_target_ms) is not None), default=None)


def _can_change(current: WorkerHandle, target: WorkerHandle) -> bool:
    """Whether a phase can go from one worker to another now."""
    if not current.ready or not current.inflight:
        return True
    # Worker-side state (token counts, grammars) is known elsewhere only when the step in flight is confirmed.
    rows = (row for step in current.inflight for row in step.rows)
    return target.can_follow(current) and not any(row.samples and row.sequence.keeps_state for row in rows)


def _other(phase: InstanceRole) -> InstanceRole:
    return InstanceRole.PREFILL if phase is InstanceRole.DECODE else InstanceRole.DECODE


def _does(role: InstanceRole, phase: InstanceRole) -> bool:
    return role.prefills if phase is InstanceRole.PREFILL else role.decodes
