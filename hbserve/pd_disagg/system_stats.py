"""The scheduler's books as plain numbers: what ``get_system_stats()`` returns."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hbserve.pd_disagg.cpu_scheduler import CpuScheduler
    from hbserve.pd_disagg.instance_handle import InstanceHandle, WorkerHandle


def collect(scheduler: CpuScheduler) -> dict[str, Any]:
    """Snapshot of a scheduler.

    Returns:
        ``cpu_scheduler``: request and token counts since the start, and what is open now;
        ``gpu_instances``: per instance its status, load, KV blocks and work done;
        ``metrics``: latencies, rates and queues, see docs/metrics.md;
        ``kv_transfer``: per link ``source->target`` the transfers, bytes, times and failures.
    """
    counts = scheduler.counts
    scheduler.metrics.observe_system(scheduler.waiting, scheduler.instances.values())
    metrics = scheduler.metrics.as_dict()
    ended = counts["completed"] + counts["failed"]
    return {
        "cpu_scheduler": {
            "total_requests": counts["requests"],
            "completed_requests": counts["completed"],
            "failed_requests": counts["failed"],
            "aborted_requests": counts["aborted"],
            "refused_requests": counts["refused"],
            "success_rate": counts["completed"] / ended if ended else 1.0,
            "waiting_requests": len(scheduler.waiting),
            "open_requests": scheduler.num_open_requests,
            "preemptions": counts["preemptions"],
            "retries": counts["retries"],
            "prompt_tokens": counts["prompt_tokens"],
            "cached_prompt_tokens": counts["cached_prompt_tokens"],
            "generated_tokens": counts["generated_tokens"],
            "uptime_s": time.monotonic() - scheduler.start_time,
        },
        "gpu_instances": {
            instance.id: _instance(instance, metrics["busy_share"]) for instance in scheduler.instances.values()
        },
        "metrics": metrics,
        "kv_transfer": {
            "open_transfers": len(scheduler.transfers),
            "links": {
                f"{source}->{target}": {
                    "open": scheduler.transfers.is_open(source, target),
                    "transfers": link.num_transfers,
                    "bytes": link.num_bytes,
                    "seconds": link.seconds,
                    "gb_per_s": link.num_bytes / link.seconds / 1e9 if link.seconds else 0.0,
                    "queued": scheduler.transfers.num_open(source, target),
                    "queued_s": link.queued_s,
                    "exposed_s": link.exposed_s,
                    "failures": dict(link.failures),
                }
                for (source, target), link in scheduler.transfers.links.items()
            },
        },
    }


def _instance(instance: InstanceHandle, busy_share: dict[str, float]) -> dict[str, Any]:
    work = instance.work
    stats: dict[str, Any] = {
        "status": "ready" if instance.ready else "lost",
        "role": str(instance.role),
        "active_requests": len(instance.seats) + len(instance.reserved),
        "steps_in_flight": instance.num_steps_in_flight,
        "steps": work.num_steps,
        "generated_tokens": work.num_tokens,
        "busy_s": work.busy_s,
        "busy_share": max((busy_share.get(worker, 0.0) for worker in instance.workers), default=0.0),
        "restarts": max(0, instance.num_restarts),
    }
    if instance.id not in instance.workers:
        stats["shares"] = {str(phase): share for phase, share in instance.shares.items()}
        stats["workers"] = {worker.id: _worker(instance, worker) for worker in instance.workers.values()}
    if instance.hello is None:
        stats["why_lost"] = instance.why_lost
    else:
        stats["device"] = instance.hello.device
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
        "status": "lost" if not worker.ready else "retiring" if worker.is_retiring else "ready",
        "is_current": instance.current(worker.role) is worker,
        "steps": worker.work.num_steps,
        "steps_in_flight": len(worker.inflight),
        "generated_tokens": worker.work.num_tokens,
        "busy_s": worker.work.busy_s,
        "pid": worker.hello.pid if worker.hello is not None else None,
        "device": worker.hello.device if worker.hello is not None else None,
    }
