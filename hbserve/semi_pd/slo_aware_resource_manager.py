"""The SLO controller for programs that report windows of their own, under the names of its first design."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from hbserve.locking import synchronized
from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.metrics.distribution import Distribution
from hbserve.metrics.window_metrics import AggregatedMetrics, RoleMetrics, SystemMetrics
from hbserve.semi_pd.slo_algorithm import RotationManager, SLOAwareResourceController
from hbserve.slo.constraints import SLOConstraints, SplitBounds

__all__ = ["ReportedMetrics", "SLOAwareResourceManager", "SLOTarget", "WorkloadMetrics"]

SLOTarget = SLOConstraints

_MONITORING_INTERVAL_S = 2.0
_SAMPLES_PER_REPORT = 30  # a percentile stands for many requests
_PROMPT_TOKENS = 512
"""Assumed length of a prompt, by which tokens per second become requests per second: reports do not say it."""


@dataclass(frozen=True, kw_only=True)
class WorkloadMetrics:
    """Load and latencies of a program's last few seconds.

    Attributes:
        timestamp: the program's own; the time of the report counts.
        prefill_throughput, decode_throughput: tokens per second.
        ttft_p95, tpot_p95: milliseconds; 0: nothing measured.
        prefill_utilization, decode_utilization: in [0, 1].
    """

    timestamp: float
    prefill_queue_length: int = 0
    decode_queue_length: int = 0
    prefill_throughput: float = 0.0
    decode_throughput: float = 0.0
    ttft_p95: float = 0.0
    tpot_p95: float = 0.0
    prefill_utilization: float = 0.0
    decode_utilization: float = 0.0

    def as_system_metrics(self) -> SystemMetrics:
        """Return the part that a collector records."""
        return SystemMetrics(
            timestamp=self.timestamp,
            prefill_queue_length=self.prefill_queue_length,
            decode_queue_length=self.decode_queue_length,
        )


@synchronized
class ReportedMetrics:
    """Windows of a collector, completed by `WorkloadMetrics` where the collector has been told of no request."""

    def __init__(self, collector: SemiPDMetricsCollector) -> None:
        self.lock = threading.RLock()
        self._collector = collector
        self._reports: deque[tuple[float, WorkloadMetrics]] = deque(maxlen=1000)
        self._is_excluded = False

    def report(self, metrics: WorkloadMetrics) -> None:
        """Take in a report."""
        self._collector.record_system_metrics(metrics.as_system_metrics())
        if not self._is_excluded:
            self._reports.append((self._collector.clock(), metrics))

    def get_current_window_metrics(self) -> AggregatedMetrics:
        """Get the current window."""
        window = self._collector.get_current_window_metrics()
        reports = [report for time, report in self._reports if time >= window.window_start_time]
        if not reports or window.num_arrivals:
            return window
        seconds = window.duration_s
        prompt_tokens = seconds * sum(report.prefill_throughput for report in reports) / len(reports)
        output_tokens = seconds * sum(report.decode_throughput for report in reports) / len(reports)
        num_requests = max(1, round(prompt_tokens / _PROMPT_TOKENS)) if prompt_tokens or output_tokens else 0
        last = reports[-1]
        return replace(
            window,
            num_arrivals=num_requests,
            num_completed=num_requests,
            input_tokens=round(prompt_tokens),
            output_tokens=round(output_tokens),
            input_length=_samples([prompt_tokens / max(num_requests, 1)], num_requests),
            output_length=_samples([output_tokens / max(num_requests, 1)], num_requests),
            ttft=_samples([report.ttft_p95 for report in reports]),
            tpot=_samples([report.tpot_p95 for report in reports]),
            prefill=RoleMetrics(num_tokens=round(prompt_tokens), utilization=last.prefill_utilization),
            decode=RoleMetrics(num_tokens=round(output_tokens), utilization=last.decode_utilization),
        )

    def reset_window(self) -> None:
        """Begin a new window now."""
        self._reports.clear()
        self._collector.reset_window()

    def begin_exclusion(self) -> None:
        """Leave out latencies and reports from now."""
        self._is_excluded = True
        self._collector.begin_exclusion()

    def end_exclusion(self) -> None:
        """End the time that is left out."""
        self._is_excluded = False
        self._collector.end_exclusion()


def _samples(values: list[float], weight: int = _SAMPLES_PER_REPORT) -> Distribution:
    return Distribution.of((value, weight) for value in values if value > 0 and weight)


class SLOAwareResourceManager:
    """`SLOAwareResourceController` that judges the reports of `report_metrics`.

    Args:
        slo_target: the targets.
        process_rotation_manager: owner of the split.
        window_size_seconds: age of the oldest report in a window.
        adjustment_cooldown_seconds: shortest time between two moves.
        min_confidence_threshold: see `SplitBounds`.
        monitoring_interval: seconds between two looks.

    Attributes:
        controller: makes the decisions, and keeps them with their numbers.
    """

    def __init__(
        self,
        slo_target: SLOConstraints,
        process_rotation_manager: RotationManager,
        window_size_seconds: float = 30.0,
        adjustment_cooldown_seconds: float = 60.0,
        min_confidence_threshold: float = 0.7,
        monitoring_interval: float = _MONITORING_INTERVAL_S,
    ) -> None:
        self._reports = ReportedMetrics(SemiPDMetricsCollector(window_size_seconds=window_size_seconds))
        bounds = SplitBounds(
            cooldown_s=adjustment_cooldown_seconds,
            rotation_cooldown_s=adjustment_cooldown_seconds,
            min_confidence_threshold=min_confidence_threshold,
        )
        self.controller = SLOAwareResourceController(
            slo_target, self._reports, process_rotation_manager, monitoring_interval, bounds
        )

    def start(self) -> None:
        """Start to watch; a second call does nothing."""
        self.controller.start_monitoring()

    def stop(self) -> None:
        """Stop to watch; the split stays."""
        self.controller.stop_monitoring()

    def report_metrics(self, metrics: WorkloadMetrics) -> None:
        """Report the load and latencies of the last few seconds."""
        self._reports.report(metrics)

    def get_status(self) -> dict[str, Any]:
        """See `SLOAwareResourceController.get_controller_status`."""
        return self.controller.get_controller_status()
