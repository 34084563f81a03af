"""The real SLO controller on the simulated clock, with a simulated rotation of workers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hbserve.metrics.window_metrics import AggregatedMetrics
from hbserve.policy.step_time_predictor import StepTimePredictor
from hbserve.semi_pd.slo_algorithm import SLOAwareResourceController
from hbserve.simulate.units import SemiPDUnit
from hbserve.slo.constraints import SLOConstraints, SMAllocation, SplitBounds
from hbserve.slo.latency_model import LatencyModel
from hbserve.slo.split_policy import WarmPercentages

_ALL_PERCENTAGES = tuple(range(5, 101, 5))
_PREPARATION_S = 5.0
"""Time from the request for other workers until they serve. Serving goes on meanwhile."""
_INTERVAL_S = 1.0


class SimulatedRotation:
    """The rotation of a unit's workers. A change of the split is immediate where workers are warm.

    Otherwise it takes effect when new workers have started.

    Args:
        warm: percentages that always have workers in both phases. The percentages in effect are warm too.

    Attributes:
        moves: each change of the split, and when.
    """

    def __init__(self, unit: SemiPDUnit, warm: tuple[int, ...] = _ALL_PERCENTAGES) -> None:
        self._unit, self._warm = unit, warm
        self.rotating = False
        self.moves: list[tuple[float, SMAllocation]] = []

    def request_sm_reallocation(self, new_allocation: SMAllocation) -> bool:
        """See `hbserve.semi_pd.slo_algorithm.RotationManager`."""
        if self.rotating:
            return False
        if WarmPercentages(**self.get_status()["warm_percentages"]).has(new_allocation):
            self._change(new_allocation)
        else:
            self.rotating = True
            clock = self._unit.clock
            clock.at(clock.now + _PREPARATION_S, lambda: self._change(new_allocation))
        return True

    def _change(self, allocation: SMAllocation) -> None:
        self.rotating = False
        self._unit.allocation = allocation
        self.moves.append((self._unit.clock.now, allocation))

    def get_status(self) -> dict[str, Any]:
        """See `hbserve.semi_pd.slo_algorithm.RotationManager`."""
        now = self._unit.allocation
        return {
            "current_sm_allocation": asdict(now),
            "switch_requested": self.rotating,
            "warm_percentages": {
                "prefill": sorted({*self._warm, now.prefill_percentage}),
                "decode": sorted({*self._warm, now.decode_percentage}),
                "unified": [100],
            },
        }


class SimulatedController:
    """The controller of one unit. The clock calls it every second until a time.

    Args:
        steps: step times as the controller believes them; the unit may have others.
    """

    def __init__(
        self,
        unit: SemiPDUnit,
        constraints: SLOConstraints,
        steps: StepTimePredictor,
        until: float,
        rotation: SimulatedRotation | None = None,
        bounds: SplitBounds | None = None,
    ) -> None:
        self._unit, self._until = unit, until
        self.rotation = rotation or SimulatedRotation(unit)
        model = LatencyModel(
            steps,
            constraints,
            unit.alone,
            unit.sizes.max_num_seqs,
            unit.sizes.max_chunk_prefill_tokens,
            1000 * unit.decode_interval_s,
        )
        self.controller = SLOAwareResourceController(
            constraints, _Metrics(unit), self.rotation, _INTERVAL_S, bounds, model
        )
        unit.clock.at(unit.clock.now + _INTERVAL_S, self._step)

    def _step(self) -> None:
        self.controller.step()
        clock = self._unit.clock
        if clock.now + _INTERVAL_S <= self._until:
            clock.at(clock.now + _INTERVAL_S, self._step)


class _Metrics:
    """A unit's collector. Before each read the unit reports the state of its queues."""

    def __init__(self, unit: SemiPDUnit) -> None:
        self._unit = unit
        self.reset_window = unit.metrics.reset_window
        self.begin_exclusion = unit.metrics.begin_exclusion
        self.end_exclusion = unit.metrics.end_exclusion

    def get_current_window_metrics(self) -> AggregatedMetrics:
        self._unit.record_state()
        return self._unit.metrics.get_current_window_metrics()
