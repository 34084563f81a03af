"""From events to windows: the collector that schedulers report to and controllers read."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from hbserve.metrics.distribution import CountWindow, SlidingWindow
from hbserve.metrics.request_metrics import RequestMetrics
from hbserve.metrics.window_metrics import AggregatedMetrics, RoleMetrics, SystemMetrics

_GAPS_PER_REQUEST = 16  # ITL has samples for every step, the others for every request
_PER_REQUEST = ("ttft", "tpot", "e2e", "prefill_queue", "decode_queue", "input_length", "output_length")
_MAX_OPEN_REQUESTS = 1 << 17  # far beyond any queue; a caller that never completes requests must not fill memory


class SemiPDMetricsCollector:
    """The life cycle of requests and the work of workers, over a sliding window.

    Everything is told to it and timed by its one clock; it asks nobody. Not thread-safe: one event
    loop or one thread owns it.

    Args:
        window_size_seconds: how far back `get_current_window_metrics` looks.
        max_history_size: ended requests, and samples of each latency, that are kept at most. Where
            more come within a window, its percentiles are those of the latest; counts stay right.
        clock: seconds, never running back.
    """

    def __init__(
        self,
        window_size_seconds: float = 30.0,
        max_history_size: int = 1000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.window_size_seconds = window_size_seconds
        self.clock = clock
        self.open_requests: dict[str, RequestMetrics] = {}
        self.history: deque[RequestMetrics] = deque(maxlen=max_history_size)
        """Requests that have ended, oldest first."""
        self._since = clock()
        self.system_metrics = SystemMetrics(timestamp=self._since)
        """The last state that was recorded."""
        self._excluded: deque[tuple[float, float]] = deque(maxlen=64)
        self._exclusion_start: float | None = None

        self._latencies = {name: SlidingWindow(max_history_size, clock) for name in _PER_REQUEST}
        self._latencies["itl"] = SlidingWindow(_GAPS_PER_REQUEST * max_history_size, clock)
        self._counts = CountWindow(window_size_seconds)

    # --- the life of a request -------------------------------------------------------------------

    def record_request_arrival(
        self,
        request_id: str,
        input_length: int,
        ttft_target_ms: float | None = None,
        tpot_target_ms: float | None = None,
    ) -> RequestMetrics:
        """A request is here; returns its record, which grows with what is recorded later.

        Args:
            input_length: prompt tokens.
            ttft_target_ms, tpot_target_ms: its targets, if it has any.
        """
        now = self.clock()
        request = RequestMetrics(
            request_id, input_length, now, ttft_target_ms=ttft_target_ms, tpot_target_ms=tpot_target_ms
        )
        if len(self.open_requests) >= _MAX_OPEN_REQUESTS:
            del self.open_requests[next(iter(self.open_requests))]
        self.open_requests[request_id] = request
        self._latencies["input_length"].add(input_length)
        counts = self._counts.at(now)
        counts["arrivals"] += 1
        counts["input_tokens"] += input_length
        return request

    def record_prefill_start(self, request_id: str, cached_tokens: int = 0) -> None:
        """It has got its allocations. Of a request that is put back only the first time counts.

        Args:
            cached_tokens: prompt tokens that the prefix cache had.
        """
        request = self.open_requests.get(request_id)
        if request is None or request.prefill_start_time is not None:
            return
        now = request.prefill_start_time = self.clock()
        request.cached_tokens = cached_tokens
        counts = self._counts.at(now)
        counts["admitted_tokens"] += request.input_length
        counts["cached_tokens"] += cached_tokens
        self._add_latency("prefill_queue", request.prefill_queue_ms, request.arrival_time, now)

    def record_first_token(self, request_id: str, at: float | None = None) -> None:
        """Its first token is here: TTFT.

        Args:
            at: when; default: now.
        """
        request = self.open_requests.get(request_id)
        if request is None or request.first_token_time is not None:
            return
        now = request.first_token_time = self.clock() if at is None else at
        self._add_latency("ttft", request.ttft_ms, request.arrival_time, now)

    def record_prefill_end(self, request_id: str, at: float | None = None) -> None:
        """Its prompt has been computed; ``at`` as in `record_first_token`."""
        request = self.open_requests.get(request_id)
        if request is not None and request.prefill_end_time is None:
            request.prefill_end_time = self.clock() if at is None else at

    def record_decode_start(self, request_id: str, at: float | None = None) -> None:
        """Its KV is where it decodes; ``at`` as in `record_first_token`."""
        request = self.open_requests.get(request_id)
        if request is None or request.decode_start_time is not None:
            return
        now = request.decode_start_time = self.clock() if at is None else at
        start = request.prefill_end_time
        if start is not None:
            self._add_latency("decode_queue", request.decode_queue_ms, start, now)

    def record_preemption(self, request_id: str) -> None:
        """It gave its place to an older one."""
        request = self.open_requests.get(request_id)
        if request is not None:
            request.num_preemptions += 1
            self._counts.at(self.clock())["preemptions"] += 1

    def record_request_completion(self, request_id: str, output_length: int, success: bool = True) -> None:
        """It has ended; of one that did not succeed no latency but TTFT is counted.

        Args:
            output_length: tokens generated.
        """
        request = self.open_requests.pop(request_id, None)
        if request is None:
            return
        now = request.completion_time = self.clock()
        request.output_length, request.success = output_length, success
        self.history.append(request)
        counts = self._counts.at(now)
        if not success:
            counts["failed"] += 1
            return
        counts["completed"] += 1
        if request.meets_targets is not None:
            counts["met" if request.meets_targets else "missed"] += 1
        self._latencies["output_length"].add(output_length)
        self._add_latency("e2e", request.e2e_ms, request.arrival_time, now)
        if request.first_token_time is not None:
            self._add_latency("tpot", request.tpot_ms, request.first_token_time, now)

    # --- workers and the whole -------------------------------------------------------------------

    def record_token_gap(self, gap_s: float, count: int = 1) -> None:
        """So many requests got a token now, each ``gap_s`` after its one before: ITL."""
        now = self.clock()
        if not self._is_excluded(now - gap_s, now):
            self._latencies["itl"].add(gap_s * 1000, count)

    def record_step(
        self, worker: str, prefill_rows: int, prefill_tokens: int, decode_rows: int, num_samples: int, busy_s: float
    ) -> None:
        """A worker's step is done.

        Args:
            prefill_rows, prefill_tokens: prompts in it, and tokens of them.
            decode_rows: sequences that were to decode a token.
            num_samples: output tokens that came of it, first ones included, discarded ones not.
            busy_s: how long the device worked on it.
        """
        counts = self._counts.at(self.clock())
        if prefill_rows:
            counts["prefill_steps"] += 1
            counts["prefill_rows"] += prefill_rows
            counts["prefill_tokens"] += prefill_tokens
            counts["prefill_busy/" + worker] += busy_s
        if decode_rows:
            counts["decode_steps"] += 1
            counts["decode_rows"] += decode_rows
            counts["decode_busy/" + worker] += busy_s
        counts["output_tokens"] += num_samples
        counts["busy/" + worker] += busy_s

    def record_system_metrics(self, system: SystemMetrics) -> None:
        """The state of queues and memory.

        Raises:
            TypeError: if it is something else.
        """
        if not isinstance(system, SystemMetrics):
            raise TypeError(f"system metrics must be a SystemMetrics, got {type(system).__name__}")
        self.system_metrics = system

    # --- what is left out ------------------------------------------------------------------------

    def begin_exclusion(self) -> None:
        """From now on the system is not itself (a rotation): latencies that overlap this time are left out."""
        if self._exclusion_start is None:
            self._exclusion_start = self.clock()

    def end_exclusion(self) -> None:
        """The system is itself again."""
        if self._exclusion_start is not None:
            self._excluded.append((self._exclusion_start, self.clock()))
            self._exclusion_start = None

    def reset_window(self) -> None:
        """Begin a new window now: what was measured before a change says nothing about after it.

        Open requests stay, and count where they end.
        """
        for latencies in self._latencies.values():
            latencies.clear()
        self._counts = CountWindow(self.window_size_seconds)
        self._since = self.clock()

    def _is_excluded(self, start: float, end: float) -> bool:
        if self._exclusion_start is not None and end >= self._exclusion_start:
            return True
        return any(start < until and end > since for since, until in self._excluded)

    def _add_latency(self, name: str, value_ms: float | None, start: float, end: float) -> None:
        if value_ms is not None and not self._is_excluded(start, end):
            self._latencies[name].add(value_ms)

    # --- reading ---------------------------------------------------------------------------------

    def get_current_window_metrics(self, seconds: float | None = None) -> AggregatedMetrics:
        """The last ``window_size_seconds``, or less where the window has begun later.

        Args:
            seconds: only so many; rounded to a sixtieth of ``window_size_seconds``.
        """
        now = self.clock()
        start = max(self._since, self._counts.start_of(now, seconds))
        counts = self._counts.totals(now, seconds)
        worker_busy = {
            name.removeprefix("busy/"): min(1.0, busy_s / (now - start))
            for name, busy_s in counts.items()
            if name.startswith("busy/") and now > start
        }
        latencies = {name: window.since(start) for name, window in self._latencies.items()}
        return AggregatedMetrics(
            window_start_time=start,
            window_end_time=now,
            num_arrivals=int(counts["arrivals"]),
            num_completed=int(counts["completed"]),
            num_failed=int(counts["failed"]),
            num_preemptions=int(counts["preemptions"]),
            num_met=int(counts["met"]),
            num_missed=int(counts["missed"]),
            input_tokens=int(counts["input_tokens"]),
            admitted_tokens=int(counts["admitted_tokens"]),
            cached_tokens=int(counts["cached_tokens"]),
            output_tokens=int(counts["output_tokens"]),
            prefill=_role_metrics("prefill", counts, now - start),
            decode=_role_metrics("decode", counts, now - start),
            system=self.system_metrics,
            worker_busy=worker_busy,
            **latencies,
        )

    def get_real_time_metrics(self) -> dict[str, float]:
        """The window in plain numbers: see `numbers_of`."""
        return numbers_of(self.get_current_window_metrics())


def _role_metrics(phase: str, counts: Mapping[str, float], duration_s: float) -> RoleMetrics:
    steps = counts[f"{phase}_steps"]
    rows = counts[f"{phase}_rows"]
    busy_s = max((value for name, value in counts.items() if name.startswith(f"{phase}_busy/")), default=0.0)
    return RoleMetrics(
        num_steps=int(steps),
        num_rows=int(rows),
        num_tokens=int(counts["prefill_tokens"] if phase == "prefill" else rows),
        utilization=min(1.0, busy_s / duration_s) if duration_s > 0 else 0.0,
    )


def numbers_of(metrics: AggregatedMetrics) -> dict[str, float]:
    """A window in plain numbers, for people and logs; ``_ms`` are milliseconds, throughputs per second."""
    numbers: dict[str, float] = {
        "arrival_rate": metrics.arrival_rate,
        "request_throughput": metrics.request_throughput,
        "prefill_throughput": metrics.prefill_throughput,
        "decode_throughput": metrics.decode_throughput,
        "prefill_utilization": metrics.prefill.utilization,
        "decode_utilization": metrics.decode.utilization,
        "prefill_batch_size": metrics.prefill.batch_size,
        "decode_batch_size": metrics.decode.batch_size,
        "prefix_hit_rate": metrics.prefix_hit_rate,
        "num_requests": metrics.num_completed,
        "num_met": metrics.num_met,
        "num_missed": metrics.num_missed,
    }
    for name in ("ttft", "tpot", "itl", "e2e", "prefill_queue", "decode_queue"):
        latencies = getattr(metrics, name)
        numbers[f"{name}_mean_ms"] = latencies.mean
        for percent in (50, 95, 99):
            numbers[f"{name}_p{percent}_ms"] = latencies.percentile(percent)
    return numbers
