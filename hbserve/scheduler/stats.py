"""The scheduler's records as plain numbers: the result of ``get_system_stats()``, and the recent past."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import msgspec

from hbserve.config import InstanceRole
from hbserve.messages.admin import LoadEntry
from hbserve.messages.supervisor import ReportEvent
from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.metrics.request_metrics import RequestMetrics
from hbserve.scheduler.core_io import Clock
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.learning.profile_learner import ProfileLearner
from hbserve.scheduler.metrics import EventLog, SchedulerMetrics
from hbserve.scheduler.requests.lifecycle import RequestLifecycle
from hbserve.scheduler.transfer_tracker import TransferTracker
from hbserve.scheduler.worker import WorkerHandle
from hbserve.speculation import DRAFTERS

MAX_REQUESTS = 40


def recent_requests(collector: SemiPDMetricsCollector) -> list[dict[str, Any]]:
    """Return open requests and those that ended last, newest first; all times are milliseconds before now."""
    now = collector.clock()
    newest_open = islice(reversed(collector.open_requests.values()), MAX_REQUESTS)
    newest_ended = islice(reversed(collector.history), MAX_REQUESTS)
    requests = sorted([*newest_open, *newest_ended], key=lambda request: -request.arrival_time)
    return [_request(request, now) for request in requests[:MAX_REQUESTS]]


def _request(request: RequestMetrics, now: float) -> dict[str, Any]:
    def ago_ms(moment: float | None) -> float | None:
        return None if moment is None else round((now - moment) * 1000, 2)

    return {
        "id": request.request_id,
        "prompt_tokens": request.input_length,
        "cached_tokens": request.cached_tokens,
        "output_tokens": request.output_length,
        "arrived": ago_ms(request.arrival_time),
        "admitted": ago_ms(request.prefill_start_time),
        "chunks": [ago_ms(moment) for moment in request.chunk_end_times],
        "prefilled": ago_ms(request.prefill_end_time),
        "decode_began": ago_ms(request.decode_start_time),
        "ended": ago_ms(request.completion_time),
        "success": request.success,
        "ttft_ms": request.ttft_ms,
        "tpot_ms": request.tpot_ms,
        "preemptions": request.num_preemptions,
        "retries": request.num_retries,
    }


_WINDOW_VALUES = 256
"""Values of each latency in a window that is sent."""


class SystemStats:
    """Reads the records of the other parts; clients report rotations and events through it."""

    def __init__(
        self,
        instances: Mapping[str, InstanceHandle],
        requests: RequestLifecycle,
        transfers: TransferTracker,
        metrics: SchedulerMetrics,
        events: EventLog,
        clock: Clock,
        learner: ProfileLearner | None = None,
    ) -> None:
        self._learner = learner
        self._instances = instances
        self._requests = requests
        self._transfers = transfers
        self._metrics = metrics
        self._events = events
        self._clock = clock
        self._start_time = clock.now

    def observe(self) -> None:
        """Record the queues and pools as they are now."""
        self._metrics.observe_system(self._requests.waiting, self._instances.values(), self._requests.policy)

    def collect(self, recent: bool) -> dict[str, Any]:
        """Return a snapshot of everything.

        Args:
            recent: add ``recent``: the last requests and events.

        Returns:
            ``cpu_scheduler``: request and token counts since the start, and what is open now;
            ``gpu_instances``: per instance its status, load, KV blocks and work done;
            ``metrics``: latencies, rates and queues, see docs/metrics.md;
            ``kv_transfer``: per link ``source->target`` the transfers, bytes, times and failures;
            ``kv_tiers``: per tier its blocks, what was stored and loaded, and failures;
            ``events``: their numbers since the start, by kind;
            ``profile``: if one is learnt, its ``state`` (``learning``, ``learnt``) and its ``points`` so far.
        """
        self.observe()
        metrics = self._metrics.collector.as_dict()
        stats = {
            "cpu_scheduler": self._scheduler(),
            "gpu_instances": {
                instance.id: _instance(instance, metrics["busy_share"]) for instance in self._instances.values()
            },
            "metrics": metrics,
            "kv_transfer": self._kv_transfer(),
            "kv_tiers": self._kv_tiers(),
            "events": dict(self._events.counts),
        }
        if self._learner is not None:
            stats["profile"] = self._learner.state
        if recent:
            requests = recent_requests(self._metrics.collector)
            stats["recent"] = {"requests": requests, "events": self._events.as_list()}
        return stats

    def window(self, seconds: float) -> dict[str, Any]:
        """Return the last ``seconds``, as an `AggregatedMetrics` in plain data."""
        self.observe()
        window = self._metrics.collector.get_current_window_metrics(seconds).thinned(_WINDOW_VALUES)
        plain: dict[str, Any] = msgspec.to_builtins(window)
        return plain

    def load(self, seconds: float) -> list[LoadEntry]:
        """Return the requests that have come in the last ``seconds`` and have ended well, by arrival."""
        since = self._clock.now - seconds
        ended = [
            request
            for request in self._metrics.collector.history
            if request.success and not request.is_batch and request.arrival_time >= since
        ]
        ended.sort(key=lambda request: request.arrival_time)
        return [
            LoadEntry(
                arrival_s=round(request.arrival_time - ended[0].arrival_time, 6),
                prompt_tokens=request.input_length,
                cached_tokens=request.cached_tokens,
                output_tokens=request.output_length,
            )
            for request in ended
        ]

    def report_event(self, event: ReportEvent) -> None:
        """Keep an event that another process has seen."""
        self._events.note(event.kind, event.subject, event.text, is_logged=True)

    def mark_rotation(self, begins: bool) -> None:
        """Leave what happens from now on out of windows; or, if not ``begins``, end that."""
        if begins:
            self._metrics.collector.begin_exclusion()
        else:
            self._metrics.collector.end_exclusion()

    def _scheduler(self) -> dict[str, Any]:
        counts = self._requests.counts
        ended = counts["completed"] + counts["failed"]
        return {
            "total_requests": counts["requests"],
            "completed_requests": counts["completed"],
            "failed_requests": counts["failed"],
            "aborted_requests": counts["aborted"],
            "refused_requests": counts["refused"],
            "success_rate": counts["completed"] / ended if ended else 1.0,
            "waiting_requests": len(self._requests.waiting),
            "open_requests": len(self._requests),
            "preemptions": counts["preemptions"],
            "retries": counts["retries"],
            "prompt_tokens": counts["prompt_tokens"],
            "cached_prompt_tokens": counts["cached_prompt_tokens"],
            "generated_tokens": counts["generated_tokens"],
            "speculation": {
                name: {
                    "drafts": counts[f"drafts_{name}"],
                    "drafted_tokens": counts[f"drafted_{name}"],
                    "accepted_tokens": counts[f"accepted_{name}"],
                }
                for name in DRAFTERS
            },
            "uptime_s": self._clock.now - self._start_time,
        }

    def _kv_tiers(self) -> dict[str, Any]:
        """Add up the memories of each tier."""
        tiers: dict[str, dict[str, Any]] = {}
        for directory in self._requests.tiers.directories:
            totals = tiers.setdefault(directory.name, {"slots": 0, "blocks": 0, "failures": {}})
            numbers = msgspec.to_builtins(directory.stats)
            failures = numbers.pop("failures")
            numbers |= {"slots": directory.num_slots, "blocks": len(directory)}
            for key, number in numbers.items():
                totals[key] = totals.get(key, 0) + number
            for kind, number in failures.items():
                totals["failures"][kind] = totals["failures"].get(kind, 0) + number
        return tiers

    def _kv_transfer(self) -> dict[str, Any]:
        return {
            "open_transfers": len(self._transfers),
            "links": {
                f"{source}->{target}": {
                    "open": self._transfers.is_open(source, target),
                    "transfers": link.num_transfers,
                    "bytes": link.num_bytes,
                    "seconds": link.seconds,
                    "gb_per_s": link.num_bytes / link.seconds / 1e9 if link.seconds else 0.0,
                    "queued": self._transfers.num_open(source, target),
                    "queued_s": link.queued_s,
                    "exposed_s": link.exposed_s,
                    "failures": dict(link.failures),
                }
                for (source, target), link in self._transfers.links.items()
            },
        }


def _instance(instance: InstanceHandle, busy_share: dict[str, float]) -> dict[str, Any]:
    work = instance.work
    stats: dict[str, Any] = {
        "status": "ready" if instance.ready else "lost",
        "role": str(instance.role),
        "ranks": instance.config.num_ranks,
        "active_requests": instance.num_sequences,
        "steps_in_flight": instance.num_steps_in_flight,
        "steps": work.num_steps,
        "generated_tokens": work.num_tokens,
        "busy_s": work.busy_s,
        "host_s": work.host_s,
        "busy_share": max((busy_share.get(worker, 0.0) for worker in instance.workers), default=0.0),
        "restarts": max(0, instance.num_restarts),
    }
    loads = {str(layer): tokens for layer, tokens in enumerate(work.expert_tokens) if any(tokens)}
    if loads:
        stats["expert_tokens"] = {
            layer: {"max": max(tokens), "mean": sum(tokens) / len(tokens), "min": min(tokens)}
            for layer, tokens in loads.items()
        }
    if instance.role is InstanceRole.SEMI_PD:
        stats["shares"] = {str(phase): share for phase, share in instance.choice.shares.items()}
        stats["is_mixed"] = instance.choice.is_mixed
        stats["workers"] = {worker.id: _worker(instance, worker) for worker in instance.workers.values()}
    if instance.hello is None:
        stats["why_lost"] = instance.why_missing
    else:
        stats["device"] = instance.hello.device
        stats["formats"] = instance.hello.formats
        stats["pid"] = instance.hello.pid
        stats["kv_blocks"] = {
            "total": instance.pool.total_blocks,
            "free": instance.pool.num_free_blocks,
            "cached": instance.pool.num_cached_blocks,
            "block_size": instance.pool.block_size,
            "block_bytes": instance.hello.block_bytes,
        }
    return stats


def _worker(instance: InstanceHandle, worker: WorkerHandle) -> dict[str, Any]:
    return {
        "role": str(worker.role),
        "percentage": worker.percentage,
        "status": "lost" if not worker.ready else "retiring" if worker.is_draining else "ready",
        "is_current": instance.choice.is_current(worker),
        "steps": worker.work.num_steps,
        "steps_in_flight": len(worker.inflight),
        "generated_tokens": worker.work.num_tokens,
        "busy_s": worker.work.busy_s,
        "pid": worker.hello.pid if worker.hello is not None else None,
        "device": worker.hello.device if worker.hello is not None else None,
    }
