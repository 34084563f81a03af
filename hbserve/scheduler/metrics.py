"""Events of requests and steps, as the scheduler reports them to the metrics and to operators."""

from __future__ import annotations

import itertools
import logging
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any, get_args

from hbserve.config import SchedulerConfig
from hbserve.messages.supervisor import EventKind, Predecessor
from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.metrics.window_metrics import SystemMetrics
from hbserve.policy.queue_policy import QueuePolicy
from hbserve.scheduler.core_io import Clock, EndedRequest, OutboxWriter
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.sequence import InflightStep, Phase, Sequence

MAX_EVENTS = 200
EVENT_KINDS: tuple[EventKind, ...] = get_args(EventKind)
_FIRST_FAULT = EVENT_KINDS.index("scheduler_lost")


class EventLog:
    """The last events of a system: instances that come and go, roles, rotations, faults."""

    def __init__(self, clock: Clock, outbox: OutboxWriter) -> None:
        self._clock = clock
        self._outbox = outbox
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._numbers = itertools.count(round(1000 * clock.unix_time))  # larger than those of earlier schedulers
        self.counts = dict.fromkeys(EVENT_KINDS, 0)
        """Number of events since the start, by kind."""

    def note(self, kind: EventKind, subject: str, text: str, is_logged: bool = False) -> None:
        """Add an event, and log it.

        Args:
            subject: the instance, worker or link that it is about.
            is_logged: the process that reports it has logged it.
        """
        self.counts[kind] += 1
        if not is_logged:
            level = logging.WARNING if EVENT_KINDS.index(kind) >= _FIRST_FAULT else logging.INFO
            self._outbox.log(level, f"{kind}: {subject}: {text}")
        now = self._clock.unix_time
        self._events.append(
            {"number": next(self._numbers), "time": now, "kind": kind, "subject": subject, "text": text}
        )

    def note_predecessor(self, before: Predecessor) -> None:
        """Add what has happened to the scheduler before this one, whose own events are forgotten."""
        for kind in ("scheduler_lost", "scheduler_restarted"):
            self.counts[kind] = before.num_restarts - 1  # so that the counters do not go back
            self.note(kind, "the scheduler", before.reason, is_logged=True)

    def as_list(self) -> list[dict[str, Any]]:
        """Return the events as plain data, oldest first; ``time`` in seconds since 1970."""
        return list(self._events)


class SchedulerMetrics:
    """Takes the events of a request's life and of each step. The cost is per request and per step, not per token.

    Args:
        collector: keeps the sliding window; its clock times everything.
        targets: holds the targets of requests that come without.
    """

    def __init__(
        self,
        collector: SemiPDMetricsCollector,
        targets: SchedulerConfig,
        outbox: OutboxWriter,
    ) -> None:
        self.collector = collector
        self._targets = targets
        self._outbox = outbox

    # --- requests --------------------------------------------------------------------------------

    def on_arrived(self, sequence: Sequence) -> None:
        """A request has been taken."""
        is_batch, targets = sequence.is_batch, self._targets
        sequence.metrics = self.collector.record_request_arrival(
            _name(sequence),
            sequence.num_prompt_tokens,
            None if is_batch else sequence.ttft_target_ms or targets.ttft_target_ms(sequence.num_prompt_tokens),
            None if is_batch else sequence.tpot_target_ms or targets.tpot_ms,
            is_new=sequence.request.resumed is None,
            is_batch=is_batch,
        )
        sequence.metrics.arrival_time = sequence.arrival_time
        sequence.metrics.first_token_time = sequence.first_token_time

    def on_admitted(self, sequence: Sequence) -> None:
        """A request has its allocations, and may be computed."""
        self.collector.record_prefill_start(_name(sequence), sequence.num_cached_tokens or 0)

    def on_cached(self, sequence: Sequence) -> None:
        """Another part of a request's prompt is cached than at its first admission."""
        sequence.metrics.cached_tokens = sequence.num_cached_tokens or 0

    def on_first_token(self, sequence: Sequence) -> None:
        """A request's first token is here, and so is its prompt's KV."""
        name, now = _name(sequence), self.collector.clock()
        self.collector.record_first_token(name, now)
        self.collector.record_prefill_end(name, now)
        if sequence.prefill_allocation is sequence.decode_allocation:
            self.collector.record_decode_start(name, now)

    def on_kv_arrived(self, sequence: Sequence) -> None:
        """A request's KV has arrived at the decode instance."""
        self.collector.record_decode_start(_name(sequence))

    def on_preempted(self, sequence: Sequence) -> None:
        """A request was put back to waiting, because an older one needs its blocks."""
        self.collector.record_preemption(_name(sequence))

    def on_retried(self, sequence: Sequence) -> None:
        """A request's attempt failed, and another begins."""
        sequence.metrics.num_retries += 1

    def on_ended(self, sequence: Sequence, outcome: str) -> None:
        """A request has ended: ``completed``, ``aborted`` or ``failed``."""
        num_tokens = len(sequence.tokens) - sequence.num_prompt_tokens
        self.collector.record_request_completion(_name(sequence), num_tokens, outcome == "completed")
        self._outbox.on_ended(EndedRequest(sequence.id, sequence.metrics, outcome))

    # --- steps -----------------------------------------------------------------------------------

    def on_step_done(
        self,
        worker_id: str,
        step: InflightStep,
        busy_s: float,
        now: float,
        last_token_times: Iterable[float | None],
        num_batch_tokens: int = 0,
    ) -> None:
        """A step has been confirmed.

        Args:
            busy_s: time of the device.
            now: the time of its tokens.
            last_token_times: for each sequence that got a token, the time of the token before; None: it is the first.
            num_batch_tokens: tokens of best-effort requests, which have no gaps to measure.
        """
        num_tokens = num_batch_tokens
        for last, count in Counter(last_token_times).items():
            num_tokens += count
            if last is not None:
                self.collector.record_token_gap(now - last, count)
        decode_rows = len(step.rows) - step.prefill_rows
        if step.prefill_rows:
            for row in step.rows:
                if row.end <= row.allocation.num_tokens_at_entry:
                    row.sequence.metrics.chunk_end_times.append(now)
        self.collector.record_step(worker_id, step.prefill_rows, step.prefill_tokens, decode_rows, num_tokens, busy_s)

    # --- the whole -------------------------------------------------------------------------------

    def observe_system(self, waiting: list[Sequence], instances: Iterable[InstanceHandle], policy: QueuePolicy) -> None:
        """Record the state of the queue, ordered by ``policy``, and of the pools."""
        now = self.collector.clock()
        phases: Counter[Phase] = Counter()
        kv_usage = 0.0
        for instance in instances:
            phases.update(sequence.phase for sequence in instance.allocations)
            phases[Phase.TRANSFERRING] += sum(s.phase is Phase.TRANSFERRING for s in instance.reserved)
            if instance.ready:
                kv_usage = max(kv_usage, 1 - instance.pool.num_free_blocks / instance.pool.total_blocks)
        num_batch = sum(sequence.is_batch for sequence in waiting)
        waiting = [sequence for sequence in waiting if not sequence.is_batch]
        late = [sequence for sequence in waiting if policy.has_missed_target(sequence, now)]
        self.collector.record_system_metrics(
            SystemMetrics(
                timestamp=now,
                late_requests=len(late),
                late_tokens=sum(len(sequence.tokens) for sequence in late),
                batch_queue_length=num_batch,
                prefill_queue_length=len(waiting),
                prefill_queue_tokens=sum(len(sequence.tokens) for sequence in waiting),
                oldest_wait_s=max((now - sequence.arrival_time for sequence in waiting), default=0.0),
                decode_queue_length=phases[Phase.TRANSFERRING],
                running_prefill=phases[Phase.PREFILLING],
                running_decode=phases[Phase.DECODING],
                kv_usage=kv_usage,
            )
        )


def _name(sequence: Sequence) -> str:
    """Return a name that is unique among all requests of all clients."""
    return str(sequence.arrival)
