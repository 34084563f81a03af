"""Windows of the metrics collector as the policy judges them, and a steady estimate of the load over windows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import NamedTuple

from hbserve.metrics.distribution import Distribution
from hbserve.metrics.window_metrics import AggregatedMetrics
from hbserve.slo.constraints import SLOConstraints
from hbserve.slo.latency_model import ObservedLatency, WorkloadEstimate


@dataclass(frozen=True, kw_only=True)
class ObservedWindow:
    """Load and latencies observed under one split, since the last move and outside rotations.

    Attributes:
        start, end: seconds.
        workload: requests that arrived, and the state at the end.
        ttft, tpot: latencies of requests; None if there were too few.
    """

    start: float
    end: float
    workload: WorkloadEstimate
    ttft: ObservedLatency | None
    tpot: ObservedLatency | None


_MEMORY_S = 20.0  # time after which a window counts 1/e of its weight
_SHIFT_DEVIATIONS = 3.0  # standard deviations of a count that a steady load explains


class _Totals(NamedTuple):
    """Sums over windows, weighted by age."""

    seconds: float = 0.0
    requests: float = 0.0
    prompt: float = 0.0
    prompt_squared: float = 0.0
    context: float = 0.0
    output: float = 0.0
    output_weight: float = 0.0


class WorkloadEstimator:
    """Estimator of the load: means over the last seconds, forgotten at once when the load shifts.

    The load has shifted if a window's number of requests, or of prompt tokens, is further from the mean than chance
    explains. The present state (backlog, running, spread) is passed on unchanged.
    """

    def __init__(self) -> None:
        self._totals = _Totals()
        self._last_end: float | None = None

    def update(self, now: WorkloadEstimate, start: float, end: float) -> WorkloadEstimate:
        """Take in a window and return the estimate; of overlapping windows, the new part counts."""
        seconds = end - start if self._last_end is None else min(end - start, end - self._last_end)
        if seconds <= 0:
            return self._estimate(now)
        self._last_end = end
        if self._has_shifted(now, end - start):
            self._totals = _Totals()
            seconds = end - start
        keep, requests = math.exp(-seconds / _MEMORY_S), now.arrival_rate * seconds
        added = _Totals(
            seconds,
            requests,
            requests * now.prompt_tokens,
            requests * now.prompt_tokens_squared,
            requests * now.context_tokens,
            requests * now.output_tokens,
            requests if now.output_tokens else 0.0,
        )
        self._totals = _Totals(*(keep * old + new for old, new in zip(self._totals, added, strict=True)))
        return self._estimate(now)

    def _has_shifted(self, now: WorkloadEstimate, seconds: float) -> bool:
        totals = self._totals
        if totals.seconds < 2 * seconds or totals.requests < 1:
            return False
        seen = now.arrival_rate * seconds
        expected = totals.requests / totals.seconds * seconds
        if abs(seen - expected) > _SHIFT_DEVIATIONS * math.sqrt(expected) + 1:
            return True
        if seen < 3:
            return False
        mean = totals.prompt / totals.requests
        deviation = math.sqrt(max(0.0, totals.prompt_squared / totals.requests - mean**2) / seen)
        return abs(now.prompt_tokens - mean) > _SHIFT_DEVIATIONS * deviation + 0.1 * mean

    def _estimate(self, now: WorkloadEstimate) -> WorkloadEstimate:
        totals = self._totals
        if totals.requests <= 0 or totals.seconds <= 0:
            return now
        return replace(
            now,
            arrival_rate=totals.requests / totals.seconds,
            prompt_tokens=totals.prompt / totals.requests,
            prompt_tokens_squared=totals.prompt_squared / totals.requests,
            context_tokens=totals.context / totals.requests,
            output_tokens=totals.output / totals.output_weight if totals.output_weight else now.output_tokens,
        )


_MIN_SAMPLES = 3
_DEFAULT_SPREAD = 0.15  # deviation of log TPOT over requests


def observed_window(metrics: AggregatedMetrics, constraints: SLOConstraints) -> ObservedWindow:
    """Make the load and latencies of a window from the collector's metrics.

    A queue counts before its requests have their first token: the oldest wait is a TTFT to come. Gaps between tokens
    count before their requests end: after a shift of the load, TPOT would be that of the few requests that end soon.
    """
    spread = _log_spread(metrics.tpot)
    system = metrics.system
    hit_rate = metrics.prefix_hit_rate
    prompt = metrics.input_length
    return ObservedWindow(
        start=metrics.window_start_time,
        end=metrics.window_end_time,
        workload=WorkloadEstimate(
            arrival_rate=metrics.arrival_rate,
            prompt_tokens=prompt.mean * (1 - hit_rate),
            prompt_tokens_squared=_mean_square(prompt) * (1 - hit_rate) ** 2,
            context_tokens=prompt.mean * hit_rate,
            output_tokens=_output_tokens(metrics),
            backlog_tokens=float(max(0, system.prefill_queue_tokens - system.late_tokens)) if system else 0.0,
            running=float(system.running_decode) if system else metrics.decode.batch_size,
            tpot_spread=spread,
        ),
        ttft=_ttft(metrics, constraints),
        tpot=_tpot(metrics, constraints, spread),
    )


def _ttft(metrics: AggregatedMetrics, constraints: SLOConstraints) -> ObservedLatency | None:
    ttft, target_ms = metrics.ttft, constraints.ttft_target_ms
    oldest_ms = 1000 * metrics.system.oldest_wait_s if metrics.system else 0.0
    if ttft.count < _MIN_SAMPLES:
        return ObservedLatency(1, oldest_ms, oldest_ms) if oldest_ms > target_ms else None
    # With a policy that defers late requests, their number in one window's time counts, and not how long they wait.
    window_ms = 1000 * (metrics.window_end_time - metrics.window_start_time)
    late = metrics.system.late_requests if metrics.system else 0
    if late:
        newly_late = math.ceil(late * min(1.0, window_ms / max(oldest_ms, 1.0)))
        percentile = Distribution.merged([ttft, Distribution((oldest_ms,), (newly_late,))]).percentile(
            constraints.ttft_percentile
        )
    else:
        percentile = max(ttft.percentile(constraints.ttft_percentile), oldest_ms)
    mean = sum(min(value, 2 * target_ms) * weight for value, weight in zip(ttft.values, ttft.weights, strict=True))
    return ObservedLatency(ttft.count, mean / ttft.count, percentile)


def _tpot(metrics: AggregatedMetrics, constraints: SLOConstraints, spread: float) -> ObservedLatency | None:
    gaps = metrics.itl
    # Without gaps, requests are reported by their ends alone, and few of them must do.
    needed = 10 * _MIN_SAMPLES if gaps.count >= _MIN_SAMPLES else _MIN_SAMPLES
    if metrics.tpot.count >= needed:
        percentile = metrics.tpot.percentile(constraints.tpot_percentile)
    elif gaps.count < _MIN_SAMPLES:
        return None
    else:
        percentile = gaps.mean * math.exp(spread * NormalDist().inv_cdf(constraints.tpot_percentile / 100))
    count = max(metrics.tpot.count, round(metrics.decode.batch_size), 1)
    return ObservedLatency(count, gaps.mean if gaps.count else metrics.tpot.mean, percentile)


def _output_tokens(metrics: AggregatedMetrics) -> float:
    if metrics.output_length.count >= _MIN_SAMPLES or not metrics.output_tokens:
        return metrics.output_length.mean
    return metrics.output_tokens / metrics.num_arrivals if metrics.num_arrivals else 0.0


def _mean_square(samples: Distribution) -> float:
    total = sum(value**2 * weight for value, weight in zip(samples.values, samples.weights, strict=True))
    return total / samples.count if samples.count else 0.0


def _log_spread(samples: Distribution) -> float:
    logs = [
        (math.log(value), weight) for value, weight in zip(samples.values, samples.weights, strict=True) if value > 0
    ]
    count = sum(weight for _, weight in logs)
    if count < 10 * _MIN_SAMPLES:
        return _DEFAULT_SPREAD
    mean = sum(log * weight for log, weight in logs) / count
    return math.sqrt(sum((log - mean) ** 2 * weight for log, weight in logs) / count)
