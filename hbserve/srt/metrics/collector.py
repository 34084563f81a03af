"""The scheduler's metrics, under the names of SGLang."""

from __future__ import annotations

from dataclasses import dataclass

from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.metrics.window_metrics import AggregatedMetrics

__all__ = ["SchedulerMetricsCollector", "SchedulerStats"]

SchedulerMetricsCollector = SemiPDMetricsCollector


@dataclass
class SchedulerStats:
    """State of a scheduler in a few numbers.

    Attributes:
        num_running_reqs: requests in prefill or decode.
        num_used_tokens: tokens of KV in use.
        token_usage: share of the KV in use, in [0, 1].
        gen_throughput: output tokens per second.
        num_queue_reqs: requests that wait to be admitted.
        avg_request_queue_latency: mean wait, in seconds.
        cache_hit_rate: share of the prompt tokens found in the prefix cache, in [0, 1].
    """

    num_running_reqs: int = 0
    num_used_tokens: int = 0
    token_usage: float = 0.0
    gen_throughput: float = 0.0
    num_queue_reqs: int = 0
    avg_request_queue_latency: float = 0.0
    cache_hit_rate: float = 0.0

    @classmethod
    def of(cls, window: AggregatedMetrics, total_tokens: int = 0) -> SchedulerStats:
        """Read the numbers from a window of `SemiPDMetricsCollector`.

        Args:
            total_tokens: tokens of KV that the pool has, for ``num_used_tokens``.
        """
        system = window.system
        usage = system.kv_usage if system else 0.0
        return cls(
            num_running_reqs=system.running_prefill + system.running_decode if system else 0,
            num_used_tokens=round(usage * total_tokens),
            token_usage=usage,
            gen_throughput=window.decode_throughput,
            num_queue_reqs=system.prefill_queue_length if system else 0,
            avg_request_queue_latency=window.prefill_queue.mean / 1000,
            cache_hit_rate=window.prefix_hit_rate,
        )
