"""The CPU scheduler: sole owner of every request and every block table.

It runs in a process of its own (`hbserve.scheduler.process`): one thread, one event loop, no locks. Messages change
the scheduler's records. After each batch of messages `CpuScheduler` plans.

A request's life, in order; each step runs in the function that is named:

1.  A client's `AddRequest` comes: `ClientServer.serve`. `validate` refuses what can never be computed.
2.  The request waits in the order of ``scheduler.policy``: `RequestLifecycle.add`, `WaitingQueue.insert`.
3.  It is admitted: `CpuScheduler._schedule_waiting_requests` -> `Admission.allocate` takes a slot and KV blocks for
    prefill and for decode, both or neither.
4.  Its prompt is planned in chunks: `CpuScheduler._fill_pipelines` -> `WorkerChoice.choose_workers` says which worker
    computes, `StepPlanner.plan_step` sends that worker a `StepPlan`.
5.  The KV of each chunk moves to the decode instance, if that is another one: `TransferTracker.open`.
6.  Results come: `WorkerConnections` -> `WorkerRegistry` -> `RequestLifecycle.on_step_done`. The last chunk brings the
    first token. The prefill allocation is freed; transfers keep its blocks pinned.
7.  The last transfer has arrived: `RequestLifecycle.on_transfer_ended`. The request decodes.
8.  One token is planned in each step (as 4) and comes as a result (as 6). `ClientServer.flush` sends all new tokens.
9.  The last token ends it: `RequestLifecycle._close`; its memory is freed: `RequestLifecycle.free_allocation`.

On the way it can go back to step 2: `RequestLifecycle.preempt` (an older request needs its blocks), `on_memory_lost`
(an instance was lost), or a transfer that failed.

A mode is only the roles of the instances and their pools: the code asks "is the decode allocation the prefill
allocation?", never "which mode is this?".
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from typing import Any

import zmq

from hbserve.config import Config
from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.metrics.tracing import RequestTracer
from hbserve.rpc.cluster_key import ClusterKey
from hbserve.scheduler.clients import ClientServer
from hbserve.scheduler.drains import Drains
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.metrics import EventLog, SchedulerMetrics
from hbserve.scheduler.readiness import Readiness
from hbserve.scheduler.request_lifecycle import RequestLifecycle
from hbserve.scheduler.sequence import Sequence
from hbserve.scheduler.stats import SystemStats
from hbserve.scheduler.step_planner import StepPlanner
from hbserve.scheduler.transfer_tracker import TransferTracker
from hbserve.scheduler.worker_registry import WorkerRegistry


class CpuScheduler:
    """Takes requests, plans steps, and sends tokens back.

    To schedule by another policy, subclass it, override `_schedule_waiting_requests` and name the
    class in the configuration as ``performance.scheduler: package.module:Class``.

    Args:
        client_address: where clients connect.
        instance_addresses: where each instance listens, by id; the workers of an instance without an address are
            announced by `SetWorkers`.

    Raises:
        StartupError: if the client address cannot be had.
    """

    def __init__(self, config: Config, client_address: str, instance_addresses: dict[str, str]) -> None:
        self.config = config
        self._wake = asyncio.Event()
        self._stop = asyncio.Event()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context = context
        key, wake = ClusterKey.of(config), self._wake.set
        self._clients = clients = ClientServer(config, context, client_address, self._on_client_gone)
        self.instances = instances = {
            instance.instance_id: InstanceHandle(
                instance, config, context, instance_addresses.get(instance.instance_id), key
            )
            for instance in config.gpu_instances
        }
        endpoint = config.telemetry.otlp_endpoint
        tracer = None if endpoint is None else RequestTracer(endpoint, time.monotonic)
        self._metrics = metrics = SchedulerMetrics(SemiPDMetricsCollector(), config.scheduler, tracer)
        events = EventLog()
        transfers = TransferTracker(config.kv_transfer.verify)
        self._requests = requests = RequestLifecycle(config, instances, transfers, metrics, events, clients.push, wake)
        self._planner = StepPlanner(config, transfers, requests.preempt, requests.policy)
        self._readiness = readiness = Readiness(instances, transfers, clients.reply)
        self._drains = drains = Drains(instances, transfers, self._planner, events, clients.reply)
        self._stats = SystemStats(instances, requests, transfers, metrics, events)
        self._workers = WorkerRegistry(
            config, context, instances, transfers, requests, readiness, drains, events, clients.reply, wake
        )

    @property
    def waiting(self) -> list[Sequence]:
        """Requests not yet admitted, in the order of ``scheduler.policy``. A policy may reorder it in place."""
        return self._requests.waiting

    @property
    def metrics(self) -> SchedulerMetrics:
        """Measurements; their ``collector`` has the window and the histograms, and a policy may read it."""
        return self._metrics

    @property
    def counts(self) -> defaultdict[str, int]:
        """Counts of what has happened since the start, by name; a policy may count, too."""
        return self._requests.counts

    # --- the process' life -----------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until `stop`."""
        clients = self._clients.serve(
            self._requests, self._readiness, self._stats, self._drains, self._workers, self._wake.set
        )
        loops = (self._workers.serve(), clients, self._tick(), self._run_schedule())
        tasks = [asyncio.create_task(loop) for loop in loops]
        stopped = asyncio.create_task(self._stop.wait())
        ends: list[asyncio.Task[Any]] = [stopped, *tasks]
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in ends:
            task.cancel()
        await asyncio.gather(*ends, return_exceptions=True)
        self._clients.close()
        self._context.term()
        self._metrics.close()
        for end in done:
            if end is not stopped:
                end.result()  # raises: a loop ends only by an error

    def stop(self) -> None:
        """Make `run` return."""
        self._stop.set()

    def _on_client_gone(self, client: bytes) -> None:
        self._readiness.on_client_gone(client)
        self._requests.abort_all_of(client)

    # --- scheduling ------------------------------------------------------------------------------

    async def _run_schedule(self) -> None:
        """Plan whenever something has changed: admit, fill every worker's pipeline, send clients their tokens."""
        loop = asyncio.get_running_loop()
        alarm: asyncio.TimerHandle | None = None
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                if alarm is not None:
                    alarm.cancel()
                await self._schedule_waiting_requests()
                wait_s = math.inf
                for instance in self.instances.values():
                    wait_s = min(wait_s, self._fill_pipelines(instance))
                    self._workers.end_drained(instance)
                alarm = loop.call_later(wait_s, self._wake.set) if wait_s < math.inf else None
                self._drains.proceed()
                self._clients.flush()
        finally:
            if alarm is not None:
                alarm.cancel()

    async def _schedule_waiting_requests(self) -> None:
        """Admit waiting requests in the order of ``scheduler.policy``: the hook for other policies.

        An override may reorder ``self.waiting`` and calls ``self._admit(sequence)``, which gives a
        request its allocations and removes it from ``self.waiting``, or returns False if nothing fits now.
        """
        now = time.monotonic()
        for sequence in list(self._requests.in_order(now)):
            if sequence.retry_at <= now and not self._admit(sequence):
                break

    def _admit(self, sequence: Sequence) -> bool:
        return self._requests.admit(sequence)

    def _fill_pipelines(self, instance: InstanceHandle) -> float:
        """Send an instance's workers steps until each has enough in flight, or there is nothing to do.

        While a worker computes a long step, its next step is planned as late as possible. Returns after how many
        seconds the next plan of the instance is due; infinity: no plan waits for that.
        """
        next_plan_s = math.inf
        choice = instance.choice
        for worker in instance.workers.values():
            if worker.ready and not worker.is_introduced:
                self._planner.introduce(instance, worker)
                worker.is_introduced = True
        for worker, phases in choice.choose_workers().items():
            if not choice.may_plan(phases):
                continue
            depth = worker.pipeline_depth(self.config.performance.pipeline_depth)
            ahead = choice.steps_ahead(worker)
            timings = {worker.timing, *(other.timing for other, _ in ahead)}
            while len(worker.inflight) + len(ahead) < choice.max_in_flight(phases, depth):
                if (wait_s := max(timing.wait_s(time.monotonic()) for timing in timings)) > 0:
                    next_plan_s = min(next_plan_s, wait_s)
                    break
                if not self._planner.plan_step(instance, worker, phases):
                    break
                choice.on_planned(worker, phases)
                if self.waiting:
                    self._wake.set()  # what this step took may leave room for more
        return next_plan_s

    async def _tick(self) -> None:
        """Check heartbeats and deadlines, at every heartbeat interval."""
        interval_s = self.config.rpc.heartbeat_interval_s
        last = time.monotonic()
        while True:
            now = time.monotonic()
            was_asleep = now - last > 4 * interval_s + 1.0  # the workers may seem silent only because this process was
            last = now
            self._workers.check_heartbeats(now, was_asleep)
            self._readiness.check_deadlines(now)
            if (reason := self._workers.missing_phase(now)) is not None:
                for sequence in list(self.waiting):
                    self._requests.fail(sequence, reason)
            self._stats.observe()
            self._wake.set()  # plan again what was lost, and send what was given up
            await asyncio.sleep(interval_s)
