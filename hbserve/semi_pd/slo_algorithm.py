"""The SLO controller: it reads windows of metrics and requests splits, in a thread of the launcher's process."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from hbserve.metrics.window_metrics import AggregatedMetrics
from hbserve.policy.profile_file import profiled_predictor
from hbserve.slo.constraints import SLOConstraints, SMAllocation, SplitBounds
from hbserve.slo.latency_model import LatencyModel
from hbserve.slo.split_policy import Decision, SplitPolicy, WarmPercentages
from hbserve.slo.workload import observed_window

__all__ = ["SLOAwareResourceController", "SLOConstraints", "SplitBounds"]

logger = logging.getLogger(__name__)

_NUM_DECISIONS = 64  # kept for the status
_ROTATION_TIMEOUT_S = 120.0


class MetricsSource(Protocol):
    """Source of windows; the collector behind it may live in another process."""

    def get_current_window_metrics(self) -> AggregatedMetrics:
        """Get the current window."""

    def reset_window(self) -> None:
        """Begin a new window now."""

    def begin_exclusion(self) -> None:
        """Leave out latencies that overlap the time from now."""

    def end_exclusion(self) -> None:
        """End the time that is left out."""


class RotationManager(Protocol):
    """Owner of the split, as the controller sees it."""

    def request_sm_reallocation(self, new_allocation: SMAllocation) -> bool:
        """Begin to change the split; False if that cannot be done now."""

    def get_status(self) -> dict[str, Any]:
        """Get ``current_sm_allocation``, the split in effect; ``switch_requested``, whether a change is under way; and
        ``warm_percentages`` by role, which need no new process, if they are known."""


class SLOAwareResourceController:
    """Controller that watches latencies and moves the split so that most requests meet their targets.

    `step` looks at one window and makes at most one move. `start_monitoring` calls it every ``monitoring_interval``
    seconds in a thread, which `stop_monitoring` ends.

    Args:
        slo_constraints: the targets.
        metrics_collector: source of windows.
        process_rotation_manager: owner of the split.
        monitoring_interval: seconds.
        bounds: of the splits and of the time between moves.
        model: of latencies; default: from the built-in profile. That one is right only for an 8B model on an H200, and
            must learn first elsewhere.
    """

    def __init__(
        self,
        slo_constraints: SLOConstraints,
        metrics_collector: MetricsSource,
        process_rotation_manager: RotationManager,
        monitoring_interval: float = 2.0,
        bounds: SplitBounds | None = None,
        model: LatencyModel | None = None,
        on_error: Callable[[str], object] = lambda error: None,
    ) -> None:
        self.slo_constraints = slo_constraints
        self._on_error, self._is_failing = on_error, False
        self.metrics_collector = metrics_collector
        self.process_rotation_manager = process_rotation_manager
        self.monitoring_interval = monitoring_interval
        model = model or LatencyModel(profiled_predictor(), slo_constraints)
        self.policy = SplitPolicy(model, slo_constraints, bounds)
        self.decisions: deque[Decision] = deque(maxlen=_NUM_DECISIONS)
        self._pending: Decision | None = None
        self._num_steps = 0
        self._num_requested = 0
        self._num_succeeded = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # --- life --------------------------------------------------------------------------------------

    def start_monitoring(self) -> None:
        """Start the thread; a second call does nothing."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._monitor, name="slo-controller")
            self._thread.start()

    def stop_monitoring(self) -> None:
        """End the thread; the split stays."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _monitor(self) -> None:
        while not self._stop.wait(self.monitoring_interval):
            try:
                self.step()
                self._is_failing = False
            except Exception as error:
                # The split stays, and the next window may succeed.
                logger.exception("slo_failed: the SLO controller: it could not judge the window")
                if not self._is_failing:
                    self._on_error(f"it could not judge the window, and the split stays: {error}")
                self._is_failing = True

    # --- one look ----------------------------------------------------------------------------------

    def step(self) -> Decision | None:
        """Judge the window once; returns None while a requested rotation is under way."""
        self._num_steps += 1
        status = self.process_rotation_manager.get_status()
        split = status["current_sm_allocation"]
        current = SMAllocation(split["prefill_percentage"], split["decode_percentage"], split.get("mixed", False))
        metrics = self.metrics_collector.get_current_window_metrics()
        under_way = bool(status.get("switch_requested", True))
        if self._pending is not None:
            self._await_split(self._pending, current, under_way, metrics.window_end_time)
            return None
        percentages = status.get("warm_percentages")
        warm = None if percentages is None else WarmPercentages(**percentages)
        decision = self.policy.decide(observed_window(metrics, self.slo_constraints), current, warm)
        self.decisions.append(decision)
        log = logger.info if decision.moves else logger.debug
        log("split %s -> %s: %s", current, decision.chosen, describe(decision))
        if decision.moves:
            self._move(decision, warm)
        return decision

    def _move(self, decision: Decision, warm: WarmPercentages | None) -> None:
        self._num_requested += 1
        chosen = decision.chosen
        if not self.process_rotation_manager.request_sm_reallocation(chosen):
            logger.warning("the split %s was refused", chosen)
            return
        self.policy.moved(decision, rotated=warm is not None and not warm.has(chosen))
        self._pending = decision
        self.metrics_collector.begin_exclusion()

    def _await_split(self, pending: Decision, current: SMAllocation, under_way: bool, now: float) -> None:
        """Begin a new window if the requested split is in effect, or if it has been given up."""
        has_arrived = current == pending.chosen
        if not has_arrived and under_way and now - pending.time < _ROTATION_TIMEOUT_S:
            return
        self._num_succeeded += has_arrived
        if not has_arrived:
            logger.warning("the split %s did not come into effect", pending.chosen)
        self._pending = None
        self.metrics_collector.end_exclusion()
        self.metrics_collector.reset_window()

    # --- status ------------------------------------------------------------------------------------

    def get_controller_status(self) -> dict[str, Any]:
        """Return plain numbers: targets, statistics, the model's coefficients and confidence, the last decisions."""
        return {
            "running": self._thread is not None,
            "rotating": self._pending is not None,
            "slo": {
                name: getattr(self.slo_constraints, name)
                for name in ("ttft_target_ms", "tpot_target_ms", "ttft_percentile", "tpot_percentile")
            },
            "statistics": {
                "total_windows": self._num_steps,
                "total_adjustments": self._num_requested,
                "successful_adjustments": self._num_succeeded,
                "success_rate": self._num_succeeded / self._num_requested if self._num_requested else 1.0,
            },
            "model": {"confidence": self.policy.model.confidence, **self.policy.model.coefficients()},
            "decisions": [describe(decision) for decision in list(self.decisions)],
        }


def describe(decision: Decision) -> dict[str, Any]:
    """Turn a decision into plain numbers, for logs and the status."""

    def split(allocation: SMAllocation | None) -> list[int] | str | None:
        if allocation is None or allocation.mixed:
            return None if allocation is None else "mixed"
        return [allocation.prefill_percentage, allocation.decode_percentage]

    numbers: dict[str, Any] = {
        "time": round(decision.time, 3),
        "reason": decision.reason,
        "current": split(decision.current),
        "chosen": split(decision.chosen),
        "candidate": split(decision.candidate),
        "candidates": decision.num_candidates,
        "confidence": round(decision.confidence, 3),
        "violations": {name: round(ratio, 3) for name, ratio in decision.violations.items()},
        "arrival_rate": round(decision.workload.arrival_rate, 3),
        "prompt_tokens": round(decision.workload.prompt_tokens, 1),
        "output_tokens": round(decision.workload.output_tokens, 1),
        "running": round(decision.workload.running, 1),
        "backlog_tokens": round(decision.workload.backlog_tokens),
    }
    for name, prediction in (("predicted", decision.predicted), ("best", decision.best)):
        if prediction is not None:
            numbers[name] = {
                "ttft_ms": round(prediction.ttft_ms, 1),
                "tpot_ms": round(prediction.tpot_ms, 2),
                "goodput": round(prediction.goodput, 3),
                "prefill_load": round(prediction.prefill_load, 3),
            }
    return numbers
