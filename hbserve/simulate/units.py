"""Units that serve requests in a simulation: semi-PD on a GPU, a unified worker, or GPUs of one phase each.

Unit                      queue, admission, KV accounts, metrics
  ├── UnifiedUnit         one `MixedPhase`
  └── _PhasedUnit         `PrefillPhase`s and `DecodePhase`s
        ├── SemiPDUnit         one of each on one GPU; a `MixedPhase` while the split is mixed
        └── DisaggregatedUnit  some of each, on GPUs of their own; KV moves between them
"""

from __future__ import annotations

import bisect
import itertools
from abc import ABC, abstractmethod
from operator import attrgetter

from hbserve.config.semi_pd import DECODE_PACE, MIXED_PACE
from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.metrics.window_metrics import SystemMetrics
from hbserve.policy.decode_throttle import DecodeThrottle
from hbserve.policy.queue_policy import Prompt, QueuePolicy
from hbserve.policy.step_time_predictor import StepTimePredictor
from hbserve.simulate.clock import SimulatedClock
from hbserve.simulate.mixing import MixedPhase
from hbserve.simulate.phases import DecodePhase, PrefillPhase
from hbserve.simulate.prompts import Chunks, PrefixCache, Prompts, Sizes
from hbserve.simulate.requests import SimulatedRequest
from hbserve.slo.constraints import SMAllocation

_KV_BYTES_PER_TOKEN = 131_072  # 32 layers, 8 KV heads of 128, two bytes
_TRANSFER_BYTES_PER_S = 357e9  # NCCL between two H200s, 256 MiB at a time
_WINDOW_S = 5.0  # of the metrics


class Unit(ABC):
    """One set of workers with one KV pool. It takes requests in the order of the scheduler's policy.

    Attributes:
        load_tokens: prompt tokens that are here and not computed. Placement compares units by it.
    """

    def __init__(self, clock: SimulatedClock, steps: StepTimePredictor, sizes: Sizes) -> None:
        self.clock, self.steps, self.sizes = clock, steps, sizes
        self.metrics = SemiPDMetricsCollector(_WINDOW_S, 4096, clock)
        self.waiting: list[SimulatedRequest] = []
        self.load_tokens = 0
        self._prefixes = PrefixCache(sizes.kv_tokens)
        self._num_pools = 1
        self._num_open = 0
        self._kv_tokens = 0

    def add(self, request: SimulatedRequest) -> None:
        """Queue a request that has arrived."""
        self.metrics.record_request_arrival(request.request_id, request.prompt_tokens)
        request.rank = self._policy.rank(request)
        bisect.insort(self.waiting, request, key=lambda other: other.rank)
        self._pump()

    def _pump(self) -> None:
        """Start the steps that can start. Every change of the unit's state ends with this call."""
        self._start()
        waiting = sum(request.prompt_tokens for request in self.waiting)
        self.load_tokens = waiting + sum(prompts.backlog_tokens for prompts in self.prompts)

    @abstractmethod
    def _start(self) -> None: ...

    @property
    @abstractmethod
    def prompts(self) -> list[Prompts]:
        """Prompts of each worker that prefills."""

    @property
    def _policy(self) -> QueuePolicy:
        return self.prompts[0].policy

    def _admit(self) -> None:
        max_open = self._num_pools * self.sizes.max_num_seqs
        max_kv_tokens = self._num_pools * self.sizes.kv_tokens
        admitted = []
        for request in self._policy.order(self.waiting, self.clock.now, self._admitted):
            tokens = request.prompt_tokens + request.output_tokens
            if self._num_open >= max_open or (self._num_open and self._kv_tokens + tokens > max_kv_tokens):
                break
            if all(prompts.has_enough(request) for prompts in self.prompts):
                break
            admitted.append(request)
            self._num_open += 1
            self._kv_tokens += tokens
            request.cached_tokens = self._prefixes.match(request)
            request.computed_tokens = request.planned_tokens = request.cached_tokens
            self.metrics.record_prefill_start(request.request_id, request.cached_tokens)
            min(self.prompts, key=lambda prompts: prompts.backlog_tokens).requests.append(request)
        for request in admitted:
            self.waiting.remove(request)

    def _admitted(self) -> tuple[list[tuple[Prompt, int]], int]:
        allocations = [(request, request.planned_tokens) for prompts in self.prompts for request in prompts.requests]
        return [(r, n) for r, n in allocations if n < r.prompt_tokens], len(self.prompts)

    def _first_token(self, request: SimulatedRequest) -> bool:
        """Note that a prompt is computed; return whether the request goes on to decode."""
        self._prefixes.insert(request)
        request.first_token_time = self.clock.now
        self.metrics.record_first_token(request.request_id)
        self.metrics.record_prefill_end(request.request_id)
        if request.output_tokens == 1:
            self._finish(request)
            return False
        return True

    def _finish(self, request: SimulatedRequest) -> None:
        request.completion_time = self.clock.now
        self._num_open -= 1
        self._kv_tokens -= request.prompt_tokens + request.output_tokens
        self.metrics.record_request_completion(request.request_id, request.output_tokens)

    def _mixing(self, prompts: Prompts, interval_s: float) -> MixedPhase:
        return MixedPhase(
            *(self.clock, self.steps, self.sizes, prompts, interval_s),
            *(self._on_mixed, self._first_token, self._finish, self._pump),
        )

    def _on_mixed(self, chunks: Chunks, batch: int, seconds: float) -> None:
        if batch:
            self.metrics.record_token_gap(seconds, batch)
        self.metrics.record_step("unified", len(chunks.parts), chunks.tokens, batch, batch, seconds)

    def record_state(self) -> None:
        """Report queues and memory to the metrics. Callers do this before they read the metrics."""
        without_token = self._without_token()
        oldest = min((request.arrival for request in without_token), default=self.clock.now)
        late = [request for request in without_token if self._policy.has_missed_target(request, self.clock.now)]
        self.metrics.record_system_metrics(
            SystemMetrics(
                timestamp=self.clock.now,
                prefill_queue_length=len(self.waiting),
                prefill_queue_tokens=self.load_tokens,
                oldest_wait_s=self.clock.now - oldest,
                late_requests=len(late),
                late_tokens=sum(request.prompt_tokens - request.computed_tokens for request in late),
                running_decode=self.num_decoding,
                kv_usage=min(1.0, self._kv_tokens / (self._num_pools * self.sizes.kv_tokens)),
            )
        )

    @property
    @abstractmethod
    def num_decoding(self) -> int:
        """Number of decoding sequences."""

    def _without_token(self) -> list[SimulatedRequest]:
        """Return the requests that wait for their first token."""
        return [*self.waiting, *(request for prompts in self.prompts for request in prompts.requests)]


class UnifiedUnit(Unit):
    """One worker that mixes prompt chunks into its decode steps."""

    def __init__(self, clock: SimulatedClock, steps: StepTimePredictor, sizes: Sizes) -> None:
        super().__init__(clock, steps, sizes)
        self._prompts = Prompts(clock, sizes)
        self._worker = self._mixing(self._prompts, 0.0)

    @property
    def prompts(self) -> list[Prompts]:
        return [self._prompts]

    @property
    def num_decoding(self) -> int:
        return len(self._worker.running)

    def _start(self) -> None:
        self._admit()
        if self._worker.step is None and (self._prompts or self._worker.running):
            self._worker.start()
            self._admit()
        self._worker.plan_ahead()


class _PhasedUnit(Unit):
    """Prefill workers and decode workers; a sequence has one of either.

    Args:
        num_prefill, num_decode: workers. Each decode worker has a KV pool of ``sizes.kv_tokens``.
    """

    def __init__(
        self, clock: SimulatedClock, steps: StepTimePredictor, sizes: Sizes, num_prefill: int = 1, num_decode: int = 1
    ) -> None:
        super().__init__(clock, steps, sizes)
        self._num_pools = num_decode
        self._prefills = [PrefillPhase(clock, steps, sizes, self._on_computed, self._pump) for _ in range(num_prefill)]
        self._decodes = [
            DecodePhase(clock, steps, self._on_decoded, self._finish, self._pump) for _ in range(num_decode)
        ]

    @property
    def prompts(self) -> list[Prompts]:
        return [prefill.prompts for prefill in self._prefills]

    @property
    def num_decoding(self) -> int:
        return sum(decode.num_sequences for decode in self._decodes)

    def _on_computed(self, request: SimulatedRequest) -> None:
        if self._first_token(request):
            self._join_decode(request)

    def _join_decode(self, request: SimulatedRequest) -> None:
        self.metrics.record_decode_start(request.request_id)
        decode = min(self._decodes, key=lambda decode: decode.num_sequences)
        decode.join(request, request.output_tokens - 1)

    def _on_decoded(self, steps: int, batch: int, seconds: float) -> None:
        self.metrics.record_token_gap(seconds / steps, steps * batch)
        for _ in range(steps):
            self.metrics.record_step("decode", 0, 0, batch, batch, seconds / steps)


class SemiPDUnit(_PhasedUnit):
    """Both phases on one GPU.

    Args:
        allocation: shares while both phases are busy.
        alone: shares of a phase while the other one is idle; None: the phase keeps its share (no ladder).
        decode_interval_s: mean time between decode steps while prefill is busy, see `DecodeThrottle`;
            0: no limit of their rate.

    Attributes:
        allocation: may be changed at any time. A change between mixed and side by side takes effect when
            the running and planned steps have ended.
    """

    def __init__(
        self,
        clock: SimulatedClock,
        steps: StepTimePredictor,
        sizes: Sizes,
        allocation: SMAllocation,
        alone: SMAllocation | None = SMAllocation(100, 100),  # noqa: B008  (immutable)
        decode_interval_s: float = 0.0,
    ) -> None:
        super().__init__(clock, steps, sizes)
        [self.prefill], [self.decode] = self._prefills, self._decodes
        self.allocation = allocation
        self.alone = alone
        self.decode_interval_s = decode_interval_s
        self._throttle = DecodeThrottle(decode_interval_s) if decode_interval_s else None
        self._beside = True  # decode has a turn beside the running prefill step
        self._mixed = self._mixing(self.prefill.prompts, decode_interval_s * MIXED_PACE / DECODE_PACE)
        self._is_mixing = allocation.mixed

    @property
    def num_decoding(self) -> int:
        return super().num_decoding + len(self._mixed.running)

    def _start(self) -> None:
        self._admit()
        if self.allocation.mixed != self._is_mixing:
            self._drain()
        elif self._is_mixing:
            self._mix()
        else:
            self._pump_side_by_side()

    def _mix(self) -> None:
        if self._mixed.step is None and (self.prefill.prompts or self._mixed.running):
            self._mixed.start()
            self._admit()
        self._mixed.plan_ahead()

    def _drain(self) -> None:
        """Let running and planned steps end, add none, then move the sequences to the other kind of worker."""
        if self._is_mixing:
            if self._mixed.step is None and self._mixed.has_planned:
                self._mixed.start()
            elif self._mixed.step is None:
                for request, left in self._mixed.running.items():
                    self.decode.join(request, left)
                self._mixed.running.clear()
        else:
            self.decode.end_burst_at_step()
            if self.prefill.step is None and self.prefill.has_planned:
                self.prefill.start(self.prefill.percentage)
            elif self.prefill.step is None and self.decode.burst is None:
                self._mixed.running = self.decode.leave()
            self._set_speeds()
        is_idle = self._mixed.step is None and self.prefill.step is None and self.decode.burst is None
        if is_idle:
            self._is_mixing = self.allocation.mixed
            self._pump()

    def _pump_side_by_side(self) -> None:
        prefills = self.prefill.step is not None or bool(self.prefill.prompts)
        decodes = self.decode.burst is not None or self.decode.num_sequences > 0
        if self._throttle is not None and not (prefills and decodes):
            self._throttle.on_idle(self.clock.now)
        alone = self.alone or self.allocation
        shares_next = decodes
        if self._throttle is not None and (prefills and decodes):
            interval_s = self.decode_interval_s
            min_slack_s = self.decode.min_slack_s(interval_s / DECODE_PACE, interval_s)
            shares_next = self._throttle.update(self.clock.now, None, min_slack_s, self.prefill.last_busy_s)
        if self.prefill.step is None and prefills:
            if self._throttle is not None:
                self._beside = shares_next
            share = (self.allocation if shares_next else alone).prefill_percentage
            self.prefill.start(self.prefill.percentage if self.prefill.has_planned else share)
        share = (self.allocation if prefills else alone).decode_percentage
        takes_turns = prefills and self._throttle is not None
        if self.decode.burst is not None:
            if takes_turns or self.decode.percentage != share:
                self.decode.end_burst_at_step()
        elif decodes and not takes_turns:
            self.decode.start(share)
        elif decodes and self._throttle is not None and (self._beside or self._throttle.is_overdue):
            waits = not self._throttle.is_behind
            self._throttle.on_decode_step()
            self.decode.start(share, 1, waits)
        self._admit()
        self.prefill.plan_ahead((self.allocation if shares_next else alone).prefill_percentage)
        self._set_speeds()

    def _set_speeds(self) -> None:
        step, burst = self.prefill.step, self.decode.burst
        if step is not None and burst is not None:
            assert self.prefill.chunks is not None
            split = self.prefill.percentage, self.decode.percentage
            slowdown = self.steps.slowdown(*split, self.decode.alone_s, self.prefill.chunks.tokens)
            step.set_speed(1 / slowdown.prefill)
            burst.set_speed(1 / slowdown.decode)
        elif step is not None:
            step.set_speed(1.0)
        elif burst is not None:
            burst.set_speed(1.0)


class DisaggregatedUnit(_PhasedUnit):
    """Prefill GPUs and decode GPUs. The KV moves between them."""

    def _on_computed(self, request: SimulatedRequest) -> None:
        if not self._first_token(request):
            return
        delay_s = request.prompt_tokens * _KV_BYTES_PER_TOKEN / _TRANSFER_BYTES_PER_S
        self.clock.at(self.clock.now + delay_s, lambda: self._on_arrived(request))

    def _on_arrived(self, request: SimulatedRequest) -> None:
        self._join_decode(request)
        self._pump()

    def _start(self) -> None:
        self._admit()
        for prefill in self._prefills:
            if prefill.step is None and prefill.prompts:
                prefill.start(100)
                self._admit()
            prefill.plan_ahead(100)
        for decode in self._decodes:
            if decode.burst is None and decode.num_sequences:
                decode.start(100)


def serve(clock: SimulatedClock, units: list[Unit], requests: list[SimulatedRequest]) -> None:
    """Send each request, when it arrives, to the unit with the fewest prompt tokens to compute; run to the end."""
    numbers = itertools.count()

    def arrive(request: SimulatedRequest) -> None:
        request.request_id = str(next(numbers))
        min(units, key=attrgetter("load_tokens")).add(request)

    for request in requests:
        clock.at(request.arrival, lambda request=request: arrive(request))  # type: ignore[misc]
    clock.run()
