"""What a window of time looks like: the collector's answer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from hbserve.metrics.distribution import Distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemMetrics:
    """The state of queues and memory at one moment.

    Attributes:
        timestamp: on the collector's clock, seconds.
        prefill_queue_length: requests that wait for an allocation.
        prefill_queue_tokens: tokens of theirs that must be computed.
        oldest_wait_s: how long the oldest of them has waited.
        late_requests, late_tokens: of these, what has missed its TTFT target and is left to wait for the others'
            sake: with policy ``slo_aware``.
        decode_queue_length: requests whose KV is on its way to where they decode.
        running_prefill, running_decode: requests in these phases.
        kv_usage: share of the KV blocks that are held, in [0, 1], of the fullest pool.
    """

    timestamp: float
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
    """What the workers that did one phase did in the window.

    Attributes:
        num_steps: steps with work of that phase.
        num_rows: sequences of that phase in them, summed over the steps.
        num_tokens: prompt tokens computed, or tokens decoded.
        utilization: share of the window in which the busiest such worker's device worked, in [0, 1].
    """

    num_steps: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    utilization: float = 0.0

    @property
    def batch_size(self) -> float:
        """Sequences of that phase per step with any, mean."""
        return self.num_rows / self.num_steps if self.num_steps else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregatedMetrics:
    """One window; latencies in milliseconds, means and percentiles 0 where nothing was seen.

    A TTFT belongs to the window in which the first token came, the other latencies to the one in
    which their request ended, and an ITL to that of its later token.

    Attributes:
        window_start_time, window_end_time: on the collector's clock, seconds.
        num_arrivals, num_completed, num_failed: requests in the window.
        input_tokens: prompt tokens of the requests that arrived.
        cached_tokens: prompt tokens of the admitted requests that were found in the prefix cache,
            of ``admitted_tokens``.
        output_tokens: tokens that came out, first ones included.
        itl: gaps between a request's tokens, one per token after the first.
        e2e, prefill_queue, decode_queue: see `RequestMetrics`.
        num_met, num_missed: completed requests that had targets and kept all of them, or did not.
        worker_busy: share of the window in which each worker's device worked, in [0, 1].
        system: the last state reported.
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

    def thinned(self, most: int) -> AggregatedMetrics:
        """With no more than so many values in each distribution: small enough to send."""
        parts = {name: getattr(self, name) for name in self.__slots__}
        thin: dict[str, Any] = {n: part.thinned(most) for n, part in parts.items() if isinstance(part, Distribution)}
        return replace(self, **thin)

    @property
    def duration_s(self) -> float:
        """Length of the window."""
        return self.window_end_time - self.window_start_time

    def _rate(self, count: int) -> float:
        return count / self.duration_s if self.duration_s > 0 else 0.0

    @property
    def arrival_rate(self) -> float:
        """Requests that came, per second."""
        return self._rate(self.num_arrivals)

    @property
    def request_throughput(self) -> float:
        """Requests completed per second."""
        return self._rate(self.num_completed)

    @property
    def prefill_throughput(self) -> float:
        """Prompt tokens computed per second."""
        return self._rate(self.prefill.num_tokens)

    @property
    def decode_throughput(self) -> float:
        """Output tokens per second, first ones included."""
        return self._rate(self.output_tokens)

    @property
    def prefix_hit_rate(self) -> float:
        """Share of the admitted prompt tokens that were in the prefix cache."""
        return self.cached_tokens / self.admitted_tokens if self.admitted_tokens else 0.0

    @property
    def ttft_mean(self) -> float:
        """Milliseconds."""
        return self.ttft.mean

    @property
    def ttft_p50(self) -> float:
        """Milliseconds."""
        return self.ttft.percentile(50)

    @property
    def ttft_p95(self) -> float:
        """Milliseconds."""
        return self.ttft.percentile(95)

    @property
    def ttft_p99(self) -> float:
        """Milliseconds."""
        return self.ttft.percentile(99)

    @property
    def tpot_mean(self) -> float:
        """Milliseconds."""
        return self.tpot.mean

    @property
    def tpot_p50(self) -> float:
        """Milliseconds."""
        return self.tpot.percentile(50)

    @property
    def tpot_p95(self) -> float:
        """Milliseconds."""
        return self.tpot.percentile(95)

    @property
    def tpot_p99(self) -> float:
        """Milliseconds."""
        return self.tpot.percentile(99)
