"""From the collector's window to what the policy judges."""

from __future__ import annotations

import math
from statistics import NormalDist

from hbserve.metrics.distribution import Distribution
from hbserve.metrics.window_metrics import AggregatedMetrics
from hbserve.semi_pd.latency_model import Observed, Workload
from hbserve.semi_pd.slo_constraints import SLOConstraints
from hbserve.semi_pd.split_policy import Window

_MIN_SAMPLES = 3
_DEFAULT_SPREAD = 0.15  # deviation of log TPOT over requests


def window_of(metrics: AggregatedMetrics, constraints: SLOConstraints) -> Window:
    """The load of a window, and what requests saw in it.

    A queue counts before its requests have their first token: the oldest wait is a TTFT to come. And
    the gaps between tokens count before their requests end: after a turn of the load TPOT would be
    that of the few that end soon.
    """
    spread = _log_spread(metrics.tpot)
    system = metrics.system
    hit_rate = metrics.prefix_hit_rate
    prompt = metrics.input_length
    return Window(
        start=metrics.window_start_time,
        end=metrics.window_end_time,
        workload=Workload(
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


def _ttft(metrics: AggregatedMetrics, constraints: SLOConstraints) -> Observed | None:
    ttft, target_ms = metrics.ttft, constraints.ttft_target_ms
    oldest_ms = 1000 * metrics.system.oldest_wait_s if metrics.system else 0.0
    if ttft.count < _MIN_SAMPLES:
        return Observed(1, oldest_ms, oldest_ms) if oldest_ms > target_ms else None
    # Where those that are late are left to wait, how long does not matter, only how many; of one window's time.
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
    return Observed(ttft.count, mean / ttft.count, percentile)


def _tpot(metrics: AggregatedMetrics, constraints: SLOConstraints, spread: float) -> Observed | None:
    gaps = metrics.itl
    if metrics.tpot.count >= 10 * _MIN_SAMPLES:
        percentile = metrics.tpot.percentile(constraints.tpot_percentile)
    elif gaps.count < _MIN_SAMPLES:
        return None
    else:
        percentile = gaps.mean * math.exp(spread * NormalDist().inv_cdf(constraints.tpot_percentile / 100))
    count = max(metrics.tpot.count, round(metrics.decode.batch_size), 1)
    return Observed(count, gaps.mean if gaps.count else metrics.tpot.mean, percentile)


def _output_tokens(metrics: AggregatedMetrics) -> float:
    if metrics.output_length.count >= _MIN_SAMPLES:
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
