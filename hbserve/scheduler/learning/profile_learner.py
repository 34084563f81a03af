"""Learning of a profile in the background: watch the steps of unified instances, and probe while there is no request.

    no request for _IDLE_S ──► probe: two equal steps, the second counts ──► _PAUSE_S ──► next probe ──► … ──► profile

A probe writes to blocks of its own, at most a sixteenth of the pool, and reads only these. Its steps are planned one
at a time, and a request that comes ends it. So the request waits for one step, which is predicted to take at most
`_MAX_PROBE_S`. The first probe of each kind has no prediction yet; it is one sequence, or 64 prompt tokens. A size that
took longer twice is not tried again, and neither are larger ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hbserve.config import Config, InstanceRole
from hbserve.kv_cache.block_pool import BlockPool
from hbserve.messages.worker import PlanRow, SequenceState
from hbserve.policy.learnt_points import LearntPoints, ProbeLimits
from hbserve.policy.probe_step import ProbeSize, probe_rows
from hbserve.scheduler.core_io import Clock, OutboxWriter
from hbserve.scheduler.instance import InstanceHandle, Instances
from hbserve.scheduler.metrics import EventLog
from hbserve.scheduler.requests.lifecycle import RequestLifecycle
from hbserve.scheduler.sequence import InflightStep
from hbserve.scheduler.steps.step_planner import StepPlanner

_IDLE_S = 1.0
"""Time without a request before the first probe: between two turns of a conversation there is none."""
_PAUSE_S = 0.25
"""Time between two probes. With the next value it bounds the share of requests that meet one."""
_MAX_PROBE_S = 0.06
"""Longest step of a probe."""
_POOL_SHARE = 16
_STEPS = 2
"""Steps of a probe: the first one may find the device's clocks low."""
_ENOUGH_TIME_S = 600.0
"""A system that is never idle keeps what its own steps have shown by then, if that is enough."""


@dataclass
class _Probe:
    """A probe under way, with the times of its steps so far. Its blocks are pinned until it ends."""

    instance: InstanceHandle
    arena_epoch: int
    size: ProbeSize
    rows: list[PlanRow]
    pool: BlockPool
    owner: str
    times_s: list[float] = field(default_factory=list)


class ProfileLearner:
    """Owner of the learnt points and of the probe under way; it ends when it has made a profile.

    Args:
        requests: probes run only while there is none.
    """

    def __init__(
        self,
        config: Config,
        instances: Instances,
        requests: RequestLifecycle,
        planner: StepPlanner,
        events: EventLog,
        clock: Clock,
        outbox: OutboxWriter,
    ) -> None:
        self._model = config.model.path.rstrip("/").rpartition("/")[2]
        self._max_tokens = config.performance.max_num_batched_tokens
        self._max_rows = config.performance.max_num_seqs
        self._instances, self._requests, self._planner = instances, requests, planner
        self._events, self._clock, self._outbox = events, clock, outbox
        self._points = LearntPoints()
        self._probe: _Probe | None = None
        self._num_probes = 0
        self._idle_since: float | None = None
        self._next_at = 0.0
        self._started_at = clock.now
        self._is_over = False

    @property
    def state(self) -> dict[str, object]:
        """What statistics say of it."""
        return {"state": "learnt" if self._is_over else "learning", "points": self._points.num_points}

    def on_step_done(self, instance: InstanceHandle, step: InflightStep, busy_s: float) -> None:
        """A step has been confirmed: one of a request, or of a probe."""
        if self._is_over:
            return
        probe = self._probe
        if not step.is_probe:
            if step.work is not None and instance.role is InstanceRole.UNIFIED:
                self._points.observe(step.work, busy_s)
        elif probe is not None and probe.instance is instance:
            probe.times_s.append(busy_s)

    def proceed(self) -> None:
        """Begin a probe if it is time for one; make the profile if there is nothing left to learn."""
        if self._is_over:
            return
        now = self._clock.now
        if self._probe is not None:
            self._go_on(self._probe)
        if self._probe is not None:
            return
        if len(self._requests):
            self._idle_since = None
            if now - self._started_at > _ENOUGH_TIME_S and self._points.is_enough:
                self._finish()
            return
        if self._idle_since is None:
            self._idle_since = now
        at = max(self._idle_since + _IDLE_S, self._next_at)
        if now < at:
            self._clock.call_at(at)
            return
        able = [instance for instance in self._instances.ready if _may_probe(instance)]
        if able:
            self._begin(able[self._num_probes % len(able)])

    def _begin(self, instance: InstanceHandle) -> None:
        [worker] = instance.workers.values()
        assert worker.hello is not None
        predictor = worker.timing.predictor
        limits = ProbeLimits(self._max_tokens, self._max_rows, worker.hello.max_model_len)
        size = self._points.next_probe(limits, predictor.estimate_s, _MAX_PROBE_S)
        if size is None:
            if self._points.is_enough:
                self._finish()
            return
        pool = instance.pool
        num_blocks = min(size.num_blocks(pool.block_size), max(1, pool.total_blocks // _POOL_SHARE))
        self._num_probes += 1
        owner = f"probe {self._num_probes}"
        blocks = pool.allocate_blocks(owner, num_blocks)
        if blocks is None:
            return
        pool.pin(owner)
        states, rows = probe_rows(size, blocks, pool.block_size)
        self._probe = _Probe(instance, instance.arena_epoch, size, rows, pool, owner)
        self._plan_step(self._probe, states)

    def _plan_step(self, probe: _Probe, states: list[SequenceState]) -> None:
        [worker] = probe.instance.workers.values()
        self._planner.plan_probe(probe.instance, worker, probe.rows, states, probe.size.work)

    def _go_on(self, probe: _Probe) -> None:
        """Plan the next step of a probe, or end it after its last one, or because a request has come."""
        if probe.instance.arena_epoch != probe.arena_epoch:
            self._probe = None  # its worker is lost, and the memory with it
            return
        if _has_probe_in_flight(probe.instance) or not probe.instance.ready:
            return
        assert probe.times_s, "a step that is not confirmed has lost its worker"
        latest_s = probe.times_s[-1]
        if len(probe.times_s) == _STEPS or latest_s > _MAX_PROBE_S:
            self._points.on_probed(probe.size, latest_s, _MAX_PROBE_S)
        elif _may_probe(probe.instance) and not len(self._requests):
            self._plan_step(probe, [])
            return
        self._end_probe(probe)

    def _end_probe(self, probe: _Probe) -> None:
        probe.pool.free(probe.owner)
        probe.pool.unpin(probe.owner)
        self._probe = None
        self._next_at = self._clock.now + _PAUSE_S
        self._clock.call_at(self._next_at)

    def _finish(self) -> None:
        self._is_over = True
        worker = next(worker for instance in self._instances.ready for worker in instance.workers.values())
        device = "unknown" if worker.hello is None else worker.hello.device
        profile = self._points.profile(self._model, device)
        self._outbox.on_learnt(profile)
        text = f"learnt the times of {len(profile.steps)} sizes of steps, for the next start"
        self._events.note("profile", self._model, text)


def _may_probe(instance: InstanceHandle) -> bool:
    is_free = not instance.is_draining and not instance.num_sequences and not instance.num_steps_in_flight
    return is_free and instance.role is InstanceRole.UNIFIED and len(instance.workers) == 1


def _has_probe_in_flight(instance: InstanceHandle) -> bool:
    return any(step.is_probe for worker in instance.workers.values() for step in worker.inflight)
