"""The real controller on the simulated clock."""

from __future__ import annotations

from typing import Any

from hbserve.metrics.window_metrics import AggregatedMetrics
from hbserve.semi_pd.slo_algorithm import SLOAwareResourceController
from hbserve.simulate.units import SemiPDUnit
from hbserve.slo.constraints import SLOConstraints, SMAllocation, SplitBounds
from hbserve.slo.latency_model import LatencyModel
from hbserve.slo.split_policy import WarmPercentages
from hbserve.slo.step_times import StepTimes

_ALL = tuple(range(5, 101, 5))


class SimulatedRotation:
    """Changes a unit's split: at once where workers are warm, else after they have started.

    Args:
        warm: percentages that both phases always have workers of; those in effect are warm too.
        mixes: whether there is a worker of both.
        preparation_s: from the request for others until they serve. Serving goes on meanwhile.
    """

    def __init__(
        self, unit: SemiPDUnit, warm: tuple[int, ...] = _ALL, preparation_s: float = 5.0, mixes: bool = True
    ) -> None:
        self._unit, self._warm, self._preparation_s, self._mixes = unit, warm, preparation_s, mixes
        self.rotating = False
        self.moves: list[tuple[float, SMAllocation]] = []
        """Each change of the split, and when."""

    def request_sm_reallocation(self, new_allocation: SMAllocation) -> bool:
        """See `hbserve.semi_pd.slo_algorithm.RotationManager`."""
        if self.rotating:
            return False
        if WarmPercentages(**self.get_status()["warm_percentages"]).has(new_allocation):
            self._change(new_allocation)
        else:
            self.rotating = True
            clock = self._unit.clock
            clock.at(clock.now + self._preparation_s, lambda: self._change(new_allocation))
        return True

    def _change(self, allocation: SMAllocation) -> None:
        self.rotating = False
        self._unit.allocation = allocation
        self.moves.append((self._unit.clock.now, allocation))

    def get_status(self) -> dict[str, Any]:
        """See `hbserve.semi_pd.slo_algorithm.RotationManager`."""
        now = self._unit.allocation
        return {
            "current_sm_allocation": {
                "prefill_percentage": now.prefill_percentage,
                "decode_percentage": now.decode_percentage,
                "mixed": now.mixed,
            },
            "switch_requested": self.rotating,
            "warm_percentages": {
                "prefill": sorted({*self._warm, now.prefill_percentage}),
                "decode": sorted({*self._warm, now.decode_percentage}),
                "unified": [100] if self._mixes else [],
            },
        }


class SimulatedController:
    """A controller of one unit, called every ``interval_s`` seconds until ``until``.

    Args:
        steps: what the controller believes of step times; the unit may have others.
    """

    def __init__(
        self,
        unit: SemiPDUnit,
        constraints: SLOConstraints,
        steps: StepTimes,
        until: float,
        rotation: SimulatedRotation | None = None,
        bounds: SplitBounds | None = None,
        interval_s: float = 1.0,
    ) -> None:
        self._unit, self._until, self._interval_s = unit, until, interval_s
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
            constraints, _Metrics(unit), self.rotation, interval_s, bounds, model
        )
        unit.clock.at(unit.clock.now + interval_s, self._step)

    def _step(self) -> None:
        self.controller.step()
        clock = self._unit.clock
        if clock.now + self._interval_s <= self._until:
            clock.at(clock.now + self._interval_s, self._step)


class _Metrics:
    """A unit's collector, with its queues' state brought up to date before each look."""

    def __init__(self, unit: SemiPDUnit) -> None:
        self._unit = unit
        self.reset_window = unit.metrics.reset_window
        self.begin_exclusion = unit.metrics.begin_exclusion
        self.end_exclusion = unit.metrics.end_exclusion

    def get_current_window_metrics(self) -> AggregatedMetrics:
        self._unit.record_state()
        return self._unit.metrics.get_current_window_metrics()
