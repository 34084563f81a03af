"""The CPU scheduler: sole owner of every request and every block table.

One event loop, no locks. Messages change the books; after each batch of messages `_run_schedule`
admits waiting requests, fills every worker's pipeline with plans and sends clients what is new.

    clients ──► ClientDesk ──► Intake ──┐                      ┌──► StepPlanner ──► workers
                    │                   ▼                      │
                    └───────────►  RequestLifecycle  ◄──────  CpuScheduler (when something has changed)
                    │                   ▲
                    └──► WorkerRegistry ┘  ◄── workers

A mode is nothing but the roles of the instances and the pools behind them: the code asks "is the
decode allocation the prefill allocation?", never "which mode is this?".
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import defaultdict
from typing import Any

import zmq

from hbserve.config import Config
from hbserve.import_path import load_class
from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.metrics.tracing import RequestTracer
from hbserve.policy.decode_throttle import DecodeThrottle
from hbserve.policy.mixed_step_budget import MixedStepBudget
from hbserve.rpc.cluster_key import ClusterKey
from hbserve.scheduler.clients import ClientDesk, ClientPort, Intake
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
    """Requests in, plans out, tokens back.

    To schedule by another policy, subclass it, override `_schedule_waiting_requests` and name the
    class in the configuration as ``performance.scheduler: package.module:Class``.

    Args:
        config: of the system.
        client_address: where clients connect.
        instance_addresses: where each instance listens, by id; an instance without an address has
            its workers announced by `SetWorkers`.

    Raises:
        StartupError: if the client address cannot be had.
    """

    def __init__(self, config: Config, client_address: str, instance_addresses: dict[str, str]) -> None:
        self.config = config
        self._wake = asyncio.Event()
        self._stop = asyncio.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        key, wake = ClusterKey.of(config), self._wake.set
        self._clients = port = ClientPort(self._context, client_address, self._on_client_gone, key)
        self.instances = instances = {
            instance.instance_id: InstanceHandle(
                instance, config.performance, self._context, instance_addresses.get(instance.instance_id), key
            )
            for instance in config.gpu_instances
        }
        slo = config.semi_pd.slo
        for handle in instances.values():
            handle.tpot_target_ms = config.scheduler.tpot_ms if slo is None else slo.tpot_target_ms
            if slo is not None and slo.holds_back_decode:
                handle.turns = DecodeThrottle(slo.decode_interval_ms / 1000)
            elif slo is not None:
                handle.mixed_steps = MixedStepBudget(holds_back_decode=False)
        endpoint = config.telemetry.otlp_endpoint
        tracer = None if endpoint is None else RequestTracer(endpoint, time.monotonic)
        self._metrics = metrics = SchedulerMetrics(SemiPDMetricsCollector(), config.scheduler, tracer)
        events = EventLog()
        transfers = TransferTracker(config.kv_transfer.verify)
        self._requests = requests = RequestLifecycle(config, instances, transfers, metrics, events, port.push, wake)
        self._planner = StepPlanner(config, transfers, requests.preempt, requests.policy)
        self._readiness = readiness = Readiness(instances, transfers, port.reply)
        self._drains = drains = Drains(instances, transfers, self._planner, events, port.reply)
        self._stats = stats = SystemStats(instances, requests, transfers, metrics, events)
        self._workers = workers = WorkerRegistry(
            config, self._context, instances, transfers, requests, readiness, drains, events, port.reply, wake
        )
        intake = Intake(config, requests, readiness)
        self._desk = ClientDesk(port, intake, requests, readiness, stats, drains, workers, wake)

    @property
    def waiting(self) -> list[Sequence]:
        """Requests not yet admitted, in the order of ``scheduler.policy``. A policy may reorder it in place."""
        return self._requests.waiting

    @property
    def counts(self) -> defaultdict[str, int]:
        """What has happened since the start, by name; a policy may count, too."""
        return self._requests.counts

    # --- life ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until `stop`."""
        work = (self._workers.serve(), self._desk.serve(), self._tick(), self._run_schedule())
        tasks = [asyncio.create_task(each) for each in work]
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
                end.result()  # raises: none of them ends on its own otherwise

    def stop(self) -> None:
        """Make `run` return."""
        self._stop.set()

    async def _tick(self) -> None:
        """Heartbeats and deadlines."""
        interval = self.config.rpc.heartbeat_interval_s
        last = time.monotonic()
        while True:
            now = time.monotonic()
            was_asleep = now - last > 4 * interval + 1.0  # then the workers' silence may be ours
            last = now
            self._workers.check_heartbeats(now, was_asleep)
            self._readiness.check_deadlines(now)
            if (why := self._workers.nobody_came_back(now)) is not None:
                for sequence in list(self.waiting):
                    self._requests.fail(sequence, why)
            self._stats.observe()
            self._wake.set()  # what was lost or given up just now must be planned again, and said
            await asyncio.sleep(interval)

    def _on_client_gone(self, client: bytes) -> None:
        self._readiness.forget(client)
        self._requests.abort_all_of(client)

    # --- scheduling ------------------------------------------------------------------------------

    async def _run_schedule(self) -> None:
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
                    self._workers.end_retired(instance)
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

        Returns in how many seconds there is more to be sent: what a worker with a long step in flight does next is
        not decided before it must be.
        """
        soonest_s = math.inf
        for worker in instance.workers.values():
            if worker.ready and not worker.is_introduced:
                self._planner.introduce(instance, worker)
                worker.is_introduced = True
        for worker, phases in instance.choose_workers().items():
            depth = worker.pipeline_depth(self.config.performance.pipeline_depth)
            if instance.takes_turns(phases) and not instance.decode_has_turn():
                continue
            ahead = instance.steps_ahead(worker)
            timings = {worker.timing, *(other.timing for other, _ in ahead)}
            while len(worker.inflight) + len(ahead) < instance.max_in_flight(phases, depth):
                if (wait_s := max(timing.wait_s(time.monotonic()) for timing in timings)) > 0:
                    soonest_s = min(soonest_s, wait_s)
                    break
                if not self._planner.plan_step(instance, worker, phases):
                    break
                instance.note_planned(worker, phases)
                if self.waiting:
                    self._wake.set()  # what this step took may leave room for more
        return soonest_s


async def serve(config: Config, client_address: str, instance_addresses: dict[str, str], stop: asyncio.Event) -> None:
    """Run the configured scheduler until ``stop`` is set."""
    scheduler_class: type[CpuScheduler] = CpuScheduler
    if config.performance.scheduler is not None:
        scheduler_class = load_class(config.performance.scheduler, CpuScheduler, "performance.scheduler")
    scheduler = scheduler_class(config, client_address, instance_addresses)
    running = asyncio.create_task(scheduler.run())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([running, stopped], return_when=asyncio.FIRST_COMPLETED)
    scheduler.stop()
    stopped.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await stopped
    await running
