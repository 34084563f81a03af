"""One picture from the windows of several collectors: of processes, of instances."""

from __future__ import annotations

from typing import Any

from hbserve.metrics.distribution import Distribution
from hbserve.metrics.window_metrics import AggregatedMetrics, RoleMetrics, SystemMetrics

_DISTRIBUTIONS = ("input_length", "output_length", "ttft", "tpot", "itl", "e2e", "prefill_queue", "decode_queue")
_COUNTS = (
    "num_arrivals",
    "num_completed",
    "num_failed",
    "num_preemptions",
    "num_met",
    "num_missed",
    "input_tokens",
    "admitted_tokens",
    "cached_tokens",
    "output_tokens",
)


class MetricsAggregator:
    """Keeps the latest window of each source and adds them up.

    A request must be reported by one source only, or, where prefill and decode are measured apart,
    each of its events by one. Percentiles of the whole are those of all samples together. Windows
    must be of one clock.
    """

    def __init__(self) -> None:
        self._latest: dict[tuple[str, str], AggregatedMetrics] = {}

    def update_prefill_metrics(self, metrics: AggregatedMetrics, instance_id: str = "prefill") -> None:
        """The latest window of a source that prefills; replaces the one before."""
        self._latest["prefill", instance_id] = metrics

    def update_decode_metrics(self, metrics: AggregatedMetrics, instance_id: str = "decode") -> None:
        """The latest window of a source that decodes; replaces the one before."""
        self._latest["decode", instance_id] = metrics

    def remove(self, instance_id: str) -> None:
        """A source is gone."""
        for key in [key for key in self._latest if key[1] == instance_id]:
            del self._latest[key]

    def get_aggregated_metrics(self) -> AggregatedMetrics:
        """All sources as one; an empty window where there are none."""
        parts = list(self._latest.values())
        if not parts:
            return AggregatedMetrics(window_start_time=0.0, window_end_time=0.0)
        distributions: dict[str, Any] = {
            name: Distribution.merged(getattr(part, name) for part in parts) for name in _DISTRIBUTIONS
        }
        counts: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in _COUNTS}
        return AggregatedMetrics(
            window_start_time=min(part.window_start_time for part in parts),
            window_end_time=max(part.window_end_time for part in parts),
            prefill=_merge_roles([part.prefill for part in parts]),
            decode=_merge_roles([part.decode for part in parts]),
            worker_busy={name: share for part in parts for name, share in part.worker_busy.items()},
            system=_merge_systems([part.system for part in parts if part.system is not None]),
            **counts,
            **distributions,
        )


def _merge_roles(parts: list[RoleMetrics]) -> RoleMetrics:
    return RoleMetrics(
        num_steps=sum(part.num_steps for part in parts),
        num_rows=sum(part.num_rows for part in parts),
        num_tokens=sum(part.num_tokens for part in parts),
        utilization=max(part.utilization for part in parts),
    )


def _merge_systems(parts: list[SystemMetrics]) -> SystemMetrics | None:
    if not parts:
        return None
    return SystemMetrics(
        timestamp=max(part.timestamp for part in parts),
        prefill_queue_length=sum(part.prefill_queue_length for part in parts),
        prefill_queue_tokens=sum(part.prefill_queue_tokens for part in parts),
        oldest_wait_s=max(part.oldest_wait_s for part in parts),
        late_requests=sum(part.late_requests for part in parts),
        late_tokens=sum(part.late_tokens for part in parts),
        decode_queue_length=sum(part.decode_queue_length for part in parts),
        running_prefill=sum(part.running_prefill for part in parts),
        running_decode=sum(part.running_decode for part in parts),
        kv_usage=max(part.kv_usage for part in parts),
    )
