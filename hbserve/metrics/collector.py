"""The registry of all measurements: events go in, windows and histograms come out."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from hbserve.locking import synchronized
from hbserve.metrics.distribution import CountWindow, Histogram, SlidingWindow
from hbserve.metrics.request_metrics import RequestMetrics
from hbserve.metrics.window_metrics import LATENCIES, AggregatedMetrics, RoleMetrics, SystemMetrics

_GAPS_PER_REQUEST = 16  # ITL has a sample per step, every other latency one per request
_LENGTHS = ("input_length", "output_length")
_COUNTS = ("arrivals", "completed", "failed", "preemptions", "met", "missed")
_TOKENS = ("input_tokens", "admitted_tokens", "cached_tokens", "output_tokens")
_MAX_OPEN_REQUESTS = 1 << 17  # far beyond any queue; a caller that never completes requests must not fill memory

_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_S = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_E2E_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)
_POWERS_OF_TWO = tuple(float(1 << exponent) for exponent in range(18))
_BUCKETS = {
    "time_to_first_token_seconds": _TTFT_S,
    "time_per_output_token_seconds": _TOKEN_S,
    "inter_token_latency_seconds": _TOKEN_S,
    "e2e_request_latency_seconds": _E2E_S,
    "prefill_queue_seconds": _TTFT_S,
    "decode_queue_seconds": _TTFT_S,
    "prompt_length_tokens": _POWERS_OF_TWO,
    "output_length_tokens": _POWERS_OF_TWO,
    "prefill_batch_size": _POWERS_OF_TWO[:11],
    "decode_batch_size": _POWERS_OF_TWO[:11],
}


@synchronized
class SemiPDMetricsCollector:
    """The life of requests and the work of workers: over a sliding window, and since the start.

    The owner reports every event, and the collector times it by its one clock. Any thread may report or read: in a
    user's program the SLO controller reads while the program's threads report.

    Args:
        window_size_seconds: length of the window that `get_current_window_metrics` returns.
        max_history_size: how many ended requests, and how many samples of each latency, are kept. If a window has
            more, its percentiles are those of the latest samples; its counts stay exact.
        clock: seconds, monotonic.

    Attributes:
        lock: held during every call.
        open_requests: by id.
        history: requests that have ended, oldest first.
        system_metrics: the last state that was recorded. Until one is, windows have that of the open requests.
        histograms: since the start, by Prometheus' name without ``hbserve_``.
        num_with_targets: completed requests since the start that kept all their targets, or missed one.
    """

    def __init__(
        self,
        window_size_seconds: float = 30.0,
        max_history_size: int = 1000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lock = threading.RLock()
        self.window_size_seconds = window_size_seconds
        self.clock = clock
        self.open_requests: dict[str, RequestMetrics] = {}
        self.history: deque[RequestMetrics] = deque(maxlen=max_history_size)
        self._start = clock()
        self.system_metrics = SystemMetrics(timestamp=self._start)
        self._knows_system = False
        self._excluded: deque[tuple[float, float]] = deque(maxlen=64)
        self._exclusion_start: float | None = None

        self._samples = {name: SlidingWindow(max_history_size, clock) for name in LATENCIES + _LENGTHS}
        self._samples["itl"] = SlidingWindow(_GAPS_PER_REQUEST * max_history_size, clock)
        self._counts = CountWindow(window_size_seconds)
        self.histograms = {name: Histogram(bounds) for name, bounds in _BUCKETS.items()}
        self.num_with_targets = {"kept": 0, "missed": 0}

    # --- the life of a request -------------------------------------------------------------------

    def record_request_arrival(
        self,
        request_id: str,
        input_length: int,
        ttft_target_ms: float | None = None,
        tpot_target_ms: float | None = None,
        is_new: bool = True,
        is_batch: bool = False,
    ) -> RequestMetrics:
        """Record that a request has arrived.

        Args:
            input_length: prompt tokens.
            is_new: False if an earlier collector has counted the arrival.
            is_batch: whether the request is best-effort. The collector counts its end, but keeps its lengths and
                latencies out of all windows and histograms, because the system is not sized for such requests.

        Returns:
            The request's record, which later events complete.
        """
        now = self.clock()
        request = RequestMetrics(
            request_id,
            input_length,
            now,
            ttft_target_ms=ttft_target_ms,
            tpot_target_ms=tpot_target_ms,
            is_batch=is_batch,
        )
        if len(self.open_requests) >= _MAX_OPEN_REQUESTS:
            del self.open_requests[next(iter(self.open_requests))]
        self.open_requests[request_id] = request
        if is_new and not is_batch:
            self._samples["input_length"].add(input_length)
            self.histograms["prompt_length_tokens"].observe(input_length)
            counts = self._counts.at(now)
            counts["arrivals"] += 1
            counts["input_tokens"] += input_length
        return request

    def record_prefill_start(self, request_id: str, cached_tokens: int = 0) -> None:
        """Record that a request got its allocations. If it is put back and starts again, the first time counts.

        Args:
            cached_tokens: prompt tokens found in the prefix cache.
        """
        request = self.open_requests.get(request_id)
        if request is None or request.prefill_start_time is not None:
            return
        now = request.prefill_start_time = self.clock()
        request.cached_tokens = cached_tokens
        if request.is_batch:
            return
        counts = self._counts.at(now)
        counts["admitted_tokens"] += request.input_length
        counts["cached_tokens"] += cached_tokens
        self._add_latency("prefill_queue", request.prefill_queue_ms, request.arrival_time, now)

    def record_first_token(self, request_id: str, at: float | None = None) -> None:
        """Record a request's first token, which ends its TTFT.

        Args:
            at: time of the event; default: now.
        """
        request = self.open_requests.get(request_id)
        if request is None or request.first_token_time is not None:
            return
        now = request.first_token_time = self.clock() if at is None else at
        if not request.is_batch:
            self._add_latency("ttft", request.ttft_ms, request.arrival_time, now)

    def record_prefill_end(self, request_id: str, at: float | None = None) -> None:
        """Record that a request's prompt is computed; ``at`` as in `record_first_token`."""
        request = self.open_requests.get(request_id)
        if request is not None and request.prefill_end_time is None:
            request.prefill_end_time = self.clock() if at is None else at

    def record_decode_start(self, request_id: str, at: float | None = None) -> None:
        """Record that a request's KV is on its decode worker; ``at`` as in `record_first_token`."""
        request = self.open_requests.get(request_id)
        if request is None or request.decode_start_time is not None:
            return
        now = request.decode_start_time = self.clock() if at is None else at
        start = request.prefill_end_time
        if start is not None and not request.is_batch:
            self._add_latency("decode_queue", request.decode_queue_ms, start, now)

    def record_preemption(self, request_id: str) -> None:
        """Record that a request gave its place to an older one."""
        request = self.open_requests.get(request_id)
        if request is not None:
            request.num_preemptions += 1
            self._counts.at(self.clock())["preemptions"] += 1

    def record_request_completion(self, request_id: str, output_length: int, success: bool = True) -> None:
        """Record a request's end. If it failed, only its TTFT and queue times count.

        Args:
            output_length: generated tokens.
        """
        request = self.open_requests.pop(request_id, None)
        if request is None:
            return
        now = request.completion_time = self.clock()
        request.output_length, request.success = output_length, success
        self.history.append(request)
        if request.is_batch:
            self._counts.at(now)["completed" if success else "failed"] += 1
            return
        self._observe("time_to_first_token_seconds", request.ttft_ms)
        self._observe("prefill_queue_seconds", request.prefill_queue_ms)
        self._observe("decode_queue_seconds", request.decode_queue_ms)
        counts = self._counts.at(now)
        if not success:
            counts["failed"] += 1
            return
        counts["completed"] += 1
        if request.meets_targets is not None:
            counts["met" if request.meets_targets else "missed"] += 1
            self.num_with_targets["kept" if request.meets_targets else "missed"] += 1
        self._observe("time_per_output_token_seconds", request.tpot_ms)
        self._observe("e2e_request_latency_seconds", request.e2e_ms)
        self.histograms["output_length_tokens"].observe(output_length)
        self._samples["output_length"].add(output_length)
        self._add_latency("e2e", request.e2e_ms, request.arrival_time, now)
        if request.first_token_time is not None:
            self._add_latency("tpot", request.tpot_ms, request.first_token_time, now)

    def _observe(self, name: str, value_ms: float | None) -> None:
        if value_ms is not None:
            self.histograms[name].observe(value_ms / 1000)

    # --- workers and the system ------------------------------------------------------------------

    def record_token_gap(self, gap_s: float, count: int = 1) -> None:
        """Record that ``count`` requests got a token now, each ``gap_s`` after its last one (ITL)."""
        self.histograms["inter_token_latency_seconds"].observe(gap_s, count)
        now = self.clock()
        if not self._is_excluded(now - gap_s, now):
            self._samples["itl"].add(gap_s * 1000, count)

    def record_step(
        self, worker: str, prefill_rows: int, prefill_tokens: int, decode_rows: int, num_samples: int, busy_s: float
    ) -> None:
        """Record a finished step of a worker.

        Args:
            prefill_rows, prefill_tokens: prompts in the step, and their tokens in it.
            decode_rows: sequences that decoded a token.
            num_samples: output tokens, with first tokens, without discarded ones.
            busy_s: how long the device worked on the step.
        """
        counts = self._counts.at(self.clock())
        if prefill_rows:
            self.histograms["prefill_batch_size"].observe(prefill_rows)
            counts["prefill_steps"] += 1
            counts["prefill_rows"] += prefill_rows
            counts["prefill_tokens"] += prefill_tokens
            counts["prefill_busy/" + worker] += busy_s
        if decode_rows:
            self.histograms["decode_batch_size"].observe(decode_rows)
            counts["decode_steps"] += 1
            counts["decode_rows"] += decode_rows
            counts["decode_busy/" + worker] += busy_s
        counts["output_tokens"] += num_samples
        counts["busy/" + worker] += busy_s

    def record_system_metrics(self, system: SystemMetrics) -> None:
        """Record the present state of queues and memory.

        Raises:
            TypeError: if ``system`` is not a `SystemMetrics`.
        """
        if not isinstance(system, SystemMetrics):
            raise TypeError(f"system metrics must be a SystemMetrics, got {type(system).__name__}")
        self.system_metrics, self._knows_system = system, True

    def _state_of_open_requests(self, now: float) -> SystemMetrics:
        """Derive the state of a system that reports only its requests."""
        requests = list(self.open_requests.values())
        waiting = [request for request in requests if request.prefill_start_time is None]
        decoding = sum(request.first_token_time is not None for request in requests)
        return SystemMetrics(
            timestamp=now,
            prefill_queue_length=len(waiting),
            prefill_queue_tokens=sum(request.input_length for request in waiting),
            oldest_wait_s=max((now - request.arrival_time for request in waiting), default=0.0),
            running_prefill=len(requests) - len(waiting) - decoding,
            running_decode=decoding,
        )

    # --- exclusion and reset ---------------------------------------------------------------------

    def begin_exclusion(self) -> None:
        """Leave out latencies that overlap the time from now on, because the system is disturbed (by a rotation)."""
        if self._exclusion_start is None:
            self._exclusion_start = self.clock()

    def end_exclusion(self) -> None:
        """End the time whose latencies are left out."""
        if self._exclusion_start is not None:
            self._excluded.append((self._exclusion_start, self.clock()))
            self._exclusion_start = None

    def reset_window(self) -> None:
        """Begin a new window now, because measurements from before a change say nothing about the time after it.

        Open requests stay, and count in the window in which they end.
        """
        for samples in self._samples.values():
            samples.clear()
        self._counts = CountWindow(self.window_size_seconds)
        self._start = self.clock()

    def _is_excluded(self, start: float, end: float) -> bool:
        if self._exclusion_start is not None and end >= self._exclusion_start:
            return True
        return any(start < excluded_end and end > excluded_start for excluded_start, excluded_end in self._excluded)

    def _add_latency(self, name: str, value_ms: float | None, start: float, end: float) -> None:
        if value_ms is not None and not self._is_excluded(start, end):
            self._samples[name].add(value_ms)

    # --- reading ---------------------------------------------------------------------------------

    def get_current_window_metrics(self, seconds: float | None = None) -> AggregatedMetrics:
        """Return the last ``window_size_seconds``, or less if the window has begun later.

        Args:
            seconds: length of a shorter window; rounded to a sixtieth of ``window_size_seconds``.
        """
        now = self.clock()
        start = max(self._start, self._counts.start_of(now, seconds))
        counts = self._counts.totals(now, seconds)
        numbers: dict[str, Any] = {f"num_{name}": int(counts[name]) for name in _COUNTS}
        numbers |= {name: int(counts[name]) for name in _TOKENS}
        samples: dict[str, Any] = {name: window.since(start) for name, window in self._samples.items()}
        worker_busy = {
            name.removeprefix("busy/"): min(1.0, busy_s / (now - start))
            for name, busy_s in counts.items()
            if name.startswith("busy/") and now > start
        }
        return AggregatedMetrics(
            window_start_time=start,
            window_end_time=now,
            prefill=_role_metrics("prefill", counts, now - start),
            decode=_role_metrics("decode", counts, now - start),
            system=self.system_metrics if self._knows_system else self._state_of_open_requests(now),
            worker_busy=worker_busy,
            **numbers,
            **samples,
        )

    def get_real_time_metrics(self) -> dict[str, float]:
        """Return the window in plain numbers: see `AggregatedMetrics.as_numbers`."""
        return self.get_current_window_metrics().as_numbers()

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers: ``queues`` now, the ``window``, and ``histograms`` since the start."""
        state, window = self.system_metrics, self.get_current_window_metrics()
        return {
            "queues": {
                "requests": {
                    "waiting": state.prefill_queue_length,
                    "batch_waiting": state.batch_queue_length,
                    "prefilling": state.running_prefill,
                    "transferring": state.decode_queue_length,
                    "decoding": state.running_decode,
                },
                "waiting_tokens": state.prefill_queue_tokens,
                "oldest_wait_s": state.oldest_wait_s,
                "kv_usage": state.kv_usage,
            },
            "requests_with_targets": dict(self.num_with_targets),
            "window_s": self.window_size_seconds,
            "window": window.as_numbers(),
            "busy_share": window.worker_busy,
            "histograms": {name: histogram.as_dict() for name, histogram in self.histograms.items()},
        }


def _role_metrics(phase: str, counts: Mapping[str, float], duration_s: float) -> RoleMetrics:
    rows = counts[f"{phase}_rows"]
    busy_s = max((value for name, value in counts.items() if name.startswith(f"{phase}_busy/")), default=0.0)
    return RoleMetrics(
        num_steps=int(counts[f"{phase}_steps"]),
        num_rows=int(rows),
        num_tokens=int(counts["prefill_tokens"] if phase == "prefill" else rows),
        utilization=min(1.0, busy_s / duration_s) if duration_s > 0 else 0.0,
    )
