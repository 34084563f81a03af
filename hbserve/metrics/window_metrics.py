"""Snapshots of a time window: what the collector returns, and the sum of several collectors' windows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from hbserve.locking import synchronized
from hbserve.metrics.distribution import Distribution

LATENCIES = ("ttft", "tpot", "itl", "e2e", "prefill_queue", "decode_queue")


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemMetrics:
    """The state of queues and memory at one moment.

    Attributes:
        timestamp: on the collector's clock, seconds.
        batch_queue_length: best-effort requests that wait for an allocation; no other number here counts them.
        prefill_queue_length: requests that wait for an allocation.
        prefill_queue_tokens: tokens of those requests that must be computed.
        oldest_wait_s: wait of the oldest such request.
        late_requests, late_tokens: the part of that queue that has missed its TTFT target. The policy ``slo_aware``
            lets these requests wait, so that the others can keep their targets.
        decode_queue_length: requests whose KV is being moved to the decode worker.
        running_prefill, running_decode: requests in these phases.
        kv_usage: share of the KV blocks in use, in [0, 1], of the fullest pool.
    """

    timestamp: float
    batch_queue_length: int = 0
    prefill_queue_length: int = 0
    prefill_queue_tokens: int = 0
    oldest_wait_s: float = 0.0
    late_requests: int = 0
    late_tokens: int = 0
    decode_queue_length: int = 0
    running_prefill: int = 0
    running_decode: int = 0
    kv_usage: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleMetrics:
    """The work of all workers in one phase during the window.

    Attributes:
        num_steps: steps with work of that phase.
        num_rows: sequences of that phase in those steps, summed over the steps.
        num_tokens: prompt tokens computed, or tokens decoded.
        utilization: share of the window in which the busiest worker's device worked, in [0, 1].
    """

    num_steps: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    utilization: float = 0.0

    @property
    def batch_size(self) -> float:
        """Mean number of sequences of that phase in a step that has any."""
        return self.num_rows / self.num_steps if self.num_steps else 0.0


class _Derived:
    """A number computed from a window, as an attribute."""

    def __init__(self, compute: Callable[[AggregatedMetrics], float]) -> None:
        self._compute = compute

    def __get__(self, window: AggregatedMetrics, owner: type) -> float:
        return self._compute(window)


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregatedMetrics:
    """One window. Latencies are in milliseconds; means and percentiles of no samples are 0.

    A TTFT belongs to the window of the first token, an ITL to that of its later token, and every other latency to
    the window in which the request ended.

    Attributes:
        window_start_time, window_end_time: on the collector's clock, seconds.
        num_arrivals, num_completed, num_failed: requests in the window.
        num_met, num_missed: completed requests that had targets and kept all of them, or missed one.
        input_tokens: prompt tokens of the requests that arrived.
        admitted_tokens: prompt tokens of the requests that were admitted.
        cached_tokens: the part of ``admitted_tokens`` that was found in the prefix cache.
        output_tokens: generated tokens, first tokens included.
        itl: gaps between a request's tokens, one per token after the first.
        e2e, prefill_queue, decode_queue: see `RequestMetrics`.
        worker_busy: share of the window in which each worker's device worked, in [0, 1].
        system: the last reported state.
        duration_s: length of the window.
        arrival_rate, request_throughput: arrived and completed requests per second.
        prefill_throughput, decode_throughput: prompt tokens computed, and output tokens, per second.
        prefix_hit_rate: share of the admitted prompt tokens that were in the prefix cache.
    """

    window_start_time: float
    window_end_time: float
    num_arrivals: int = 0
    num_completed: int = 0
    num_failed: int = 0
    num_preemptions: int = 0
    num_met: int = 0
    num_missed: int = 0
    input_tokens: int = 0
    admitted_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    input_length: Distribution = field(default_factory=Distribution)
    output_length: Distribution = field(default_factory=Distribution)
    ttft: Distribution = field(default_factory=Distribution)
    tpot: Distribution = field(default_factory=Distribution)
    itl: Distribution = field(default_factory=Distribution)
    e2e: Distribution = field(default_factory=Distribution)
    prefill_queue: Distribution = field(default_factory=Distribution)
    decode_queue: Distribution = field(default_factory=Distribution)
    prefill: RoleMetrics = field(default_factory=RoleMetrics)
    decode: RoleMetrics = field(default_factory=RoleMetrics)
    worker_busy: dict[str, float] = field(default_factory=dict)
    system: SystemMetrics | None = None

    duration_s = _Derived(lambda window: window.window_end_time - window.window_start_time)
    arrival_rate = _Derived(lambda window: window._rate(window.num_arrivals))
    request_throughput = _Derived(lambda window: window._rate(window.num_completed))
    prefill_throughput = _Derived(lambda window: window._rate(window.prefill.num_tokens))
    decode_throughput = _Derived(lambda window: window._rate(window.output_tokens))
    prefix_hit_rate = _Derived(lambda window: window.cached_tokens / max(window.admitted_tokens, 1))
    ttft_mean = _Derived(lambda window: window.ttft.mean)
    ttft_p50 = _Derived(lambda window: window.ttft.percentile(50))
    ttft_p95 = _Derived(lambda window: window.ttft.percentile(95))
    ttft_p99 = _Derived(lambda window: window.ttft.percentile(99))
    tpot_mean = _Derived(lambda window: window.tpot.mean)
    tpot_p50 = _Derived(lambda window: window.tpot.percentile(50))
    tpot_p95 = _Derived(lambda window: window.tpot.percentile(95))
    tpot_p99 = _Derived(lambda window: window.tpot.percentile(99))

    def _rate(self, count: int) -> float:
        return count / self.duration_s if self.duration_s > 0 else 0.0

    def thinned(self, max_values: int) -> AggregatedMetrics:
        """Limit each distribution to ``max_values`` values, so that the window is small enough to send."""
        parts = {name: getattr(self, name) for name in self.__slots__}
        thin: dict[str, Any] = {
            name: part.thinned(max_values) for name, part in parts.items() if isinstance(part, Distribution)
        }
        return replace(self, **thin)

    def as_numbers(self) -> dict[str, float]:
        """The window in plain numbers, for people and logs; ``_ms`` are milliseconds, throughputs per second."""
        numbers: dict[str, float] = {
            "arrival_rate": self.arrival_rate,
            "request_throughput": self.request_throughput,
            "prefill_throughput": self.prefill_throughput,
            "decode_throughput": self.decode_throughput,
            "prefill_utilization": self.prefill.utilization,
            "decode_utilization": self.decode.utilization,
            "prefill_batch_size": self.prefill.batch_size,
            "decode_batch_size": self.decode.batch_size,
            "prefix_hit_rate": self.prefix_hit_rate,
            "num_requests": self.num_completed,
            "num_met": self.num_met,
            "num_missed": self.num_missed,
        }
        for name in LATENCIES:
            latencies: Distribution = getattr(self, name)
            numbers[f"{name}_mean_ms"] = latencies.mean
            for percent in (50, 95, 99):
                numbers[f"{name}_p{percent}_ms"] = latencies.percentile(percent)
        return numbers


@synchronized
class MetricsAggregator:
    """The sum of the latest windows of several collectors: of several processes, or of several instances. Any thread
    may call its methods.

    A request must be reported by one source only; where prefill and decode are measured apart, each of its events by
    one. Percentiles of the whole are those of all samples together. All windows must use the same clock.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._latest: dict[tuple[str, str], AggregatedMetrics] = {}

    def update_prefill_metrics(self, metrics: AggregatedMetrics, instance_id: str = "prefill") -> None:
        """Replace the window of a source that prefills."""
        self._latest["prefill", instance_id] = metrics

    def update_decode_metrics(self, metrics: AggregatedMetrics, instance_id: str = "decode") -> None:
        """Replace the window of a source that decodes."""
        self._latest["decode", instance_id] = metrics

    def remove(self, instance_id: str) -> None:
        """Forget a source."""
        for key in [key for key in self._latest if key[1] == instance_id]:
            del self._latest[key]

    def get_aggregated_metrics(self) -> AggregatedMetrics:
        """Add up all sources; an empty window if there are none."""
        empty = AggregatedMetrics(window_start_time=0.0, window_end_time=0.0)
        merged: AggregatedMetrics = _merged("", list(self._latest.values()) or [empty])
        return merged


_MAXIMA = frozenset({"window_end_time", "timestamp", "oldest_wait_s", "kv_usage", "utilization"})


def _merged(name: str, parts: list[Any]) -> Any:
    """Merge windows, or one field ``name`` of them: samples together, counts added up, states at their maximum."""
    parts = [part for part in parts if part is not None]
    match parts[:1]:
        case []:
            return None
        case [Distribution()]:
            return Distribution.merged(parts)
        case [dict()]:
            return {key: value for part in parts for key, value in part.items()}
        case [int() | float()]:
            if name == "window_start_time":
                return min(parts)
            return max(parts) if name in _MAXIMA else sum(parts)
    names = [field.name for field in fields(parts[0])]
    return type(parts[0])(**{name: _merged(name, [getattr(part, name) for part in parts]) for name in names})
