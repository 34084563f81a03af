"""The supervisor of a simulated semi-PD instance, and the real SLO controller on the simulated clock."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import msgspec

from hbserve.config import InstanceRole
from hbserve.messages.admin import GetWindowMetrics, WindowMetrics
from hbserve.messages.supervisor import MarkRotation, SetWorkers, WorkerSpec
from hbserve.metrics.window_metrics import AggregatedMetrics
from hbserve.policy.step_time_predictor import StepTimePredictor
from hbserve.semi_pd.slo_algorithm import SLOAwareResourceController
from hbserve.simulate.device import ARENA_EPOCH, SimulatedWorker
from hbserve.simulate.world import SimulatedSystem
from hbserve.slo.constraints import SLOConstraints, SMAllocation, SplitBounds
from hbserve.slo.latency_model import LatencyModel
from hbserve.slo.split_policy import WarmPercentages

_ALL_PERCENTAGES = tuple(range(5, 101, 5))
_PREPARATION_S = 5.0
"""Time from the request for other workers until they serve. Serving goes on meanwhile."""
_INTERVAL_S = 1.0
_WINDOW_S = 5.0
_Level = tuple[InstanceRole, int]


class SimulatedRotation:
    """The workers of a semi-PD instance, and their rotation. A change of the split is immediate where workers are warm.

    Otherwise it takes effect when new workers have started.

    Args:
        allocation: the first split.

    Attributes:
        warm: percentages that always have workers in both phases. The percentages in effect are warm too.
        allocation: the split in effect.
        moves: each change of the split, and when.
    """

    def __init__(
        self,
        system: SimulatedSystem,
        instance_id: str,
        allocation: SMAllocation,
    ) -> None:
        self._system, self._instance_id = system, instance_id
        self.warm: tuple[int, ...] = _ALL_PERCENTAGES
        self._ladder = system.config.semi_pd.ladder
        self._workers: dict[_Level, SimulatedWorker] = {}
        self._draining: list[SimulatedWorker] = []
        self._num_workers = 0
        self.allocation = allocation
        self.rotating = False
        self.moves: list[tuple[float, SMAllocation]] = []
        self._set_workers("they have started")

    # --- the rotation manager, as the controller sees it -------------------------------------------

    def request_sm_reallocation(self, new_allocation: SMAllocation) -> bool:
        """See `hbserve.semi_pd.slo_algorithm.RotationManager`."""
        if self.rotating:
            return False
        if WarmPercentages(**self.get_status()["warm_percentages"]).has(new_allocation):
            self.change(new_allocation)
        else:
            self.rotating = True
            clock = self._system.clock
            clock.at(clock.now + _PREPARATION_S, lambda: self.change(new_allocation))
        return True

    def change(self, allocation: SMAllocation) -> None:
        """Put a split in effect, with new workers where it needs others."""
        self.rotating = False
        self.allocation = allocation
        self.moves.append((self._system.clock.now, allocation))
        self._set_workers("a change of workers")

    def get_status(self) -> dict[str, Any]:
        """See `hbserve.semi_pd.slo_algorithm.RotationManager`."""
        now = self.allocation
        return {
            "current_sm_allocation": asdict(now),
            "switch_requested": self.rotating,
            "warm_percentages": {
                "prefill": sorted({*self.warm, now.prefill_percentage}),
                "decode": sorted({*self.warm, now.decode_percentage}),
                "unified": self._ladder.unified or (),
            },
        }

    # --- workers -----------------------------------------------------------------------------------

    def _levels(self) -> set[_Level]:
        ladder, split = self._ladder, self.allocation
        prefill = {(InstanceRole.PREFILL, share) for share in (split.prefill_percentage, *ladder.prefill)}
        decode = {(InstanceRole.DECODE, share) for share in (split.decode_percentage, *ladder.decode)}
        return prefill | decode | {(InstanceRole.UNIFIED, share) for share in ladder.unified or ()}

    def _set_workers(self, reason: str) -> None:
        levels = self._levels()
        for level in [level for level in self._workers if level not in levels]:
            self._draining.append(self._workers.pop(level))
        for role, share in sorted(levels - self._workers.keys()):
            self._num_workers += 1
            name = f"{self._instance_id}-{role}-{self._num_workers}"
            worker = self._system.start_worker(self._instance_id, name, role, share, self._on_exit)
            self._workers[role, share] = worker
        self._announce(reason)

    def _on_exit(self, worker: SimulatedWorker) -> None:
        self._draining.remove(worker)
        self._announce(f"{worker.id} has ended")

    def _announce(self, reason: str) -> None:
        self._system.tell(
            SetWorkers(
                instance_id=self._instance_id,
                arena_epoch=ARENA_EPOCH,
                workers=[_spec(worker) for worker in self._workers.values()],
                draining=[_spec(worker) for worker in self._draining],
                prefill_percentage=self.allocation.prefill_percentage,
                decode_percentage=self.allocation.decode_percentage,
                mixed=self.allocation.mixed,
                reason=reason,
            )
        )


def _spec(worker: SimulatedWorker) -> WorkerSpec:
    return WorkerSpec(worker_id=worker.id, role=worker.role, percentage=worker.percentage, address=worker.id)


class SimulatedController:
    """The controller of one instance. The clock calls it every second until a time.

    Args:
        steps: step times as the controller believes them; the devices may have others.
        until: it acts no more after this.
    """

    def __init__(
        self,
        system: SimulatedSystem,
        rotation: SimulatedRotation,
        constraints: SLOConstraints,
        steps: StepTimePredictor,
        until: float,
        bounds: SplitBounds | None = None,
    ) -> None:
        self._clock, self._until = system.clock, until
        self.rotation = rotation
        config = system.config
        ladder, slo = config.semi_pd.ladder, config.semi_pd.slo
        model = LatencyModel(
            steps,
            constraints,
            SMAllocation(max(ladder.prefill), max(ladder.decode)) if ladder.prefill and ladder.decode else None,
            config.performance.max_num_seqs,
            config.prefill_budget,
            0.0 if slo is None else slo.decode_interval_ms,
        )
        self.controller = SLOAwareResourceController(
            constraints, _Metrics(system), rotation, _INTERVAL_S, bounds, model
        )
        self._clock.at(self._clock.now + _INTERVAL_S, self._step)

    def _step(self) -> None:
        self.controller.step()
        if self._clock.now + _INTERVAL_S <= self._until:
            self._clock.at(self._clock.now + _INTERVAL_S, self._step)


class _Metrics:
    """The scheduler's windows, as `hbserve.semi_pd.slo_service.SchedulerMetricsSource` gets them."""

    def __init__(self, system: SimulatedSystem) -> None:
        self._system = system
        self._since = system.clock.now

    def get_current_window_metrics(self) -> AggregatedMetrics:
        seconds = min(_WINDOW_S, self._system.clock.now - self._since)
        reply = self._system.ask(GetWindowMetrics(query_id=0, seconds=seconds))
        assert isinstance(reply, WindowMetrics)
        return msgspec.convert(reply.metrics, AggregatedMetrics)

    def reset_window(self) -> None:
        self._since = self._system.clock.now

    def begin_exclusion(self) -> None:
        self._system.tell(MarkRotation(begins=True))

    def end_exclusion(self) -> None:
        self._system.tell(MarkRotation(begins=False))
