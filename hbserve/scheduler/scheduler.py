"""The CPU scheduler: sole owner of every request and every block table.

`CpuScheduler` is a state machine. Each `step` takes what has happened, decides everything, and returns what is to be
done. It runs in a process of its own (`hbserve.scheduler.process`): one thread, one event loop, no locks. There
`hbserve.scheduler.shell` receives the messages, calls `step`, sends what it returns, and keeps its timer.

A request's life, in order; each step runs in the function that is named:

1.  A client's `AddRequest` comes: `ClientMessages.on_message`. `validate` refuses what can never be computed.
2.  The request waits in the order of ``scheduler.policy``: `RequestPhases.add`, `WaitingQueue.insert`.
3.  It is admitted: `CpuScheduler._schedule_waiting_requests` -> `Admission.allocate` takes a slot and KV blocks for
    prefill and for decode, both or neither.
4.  Its prompt is planned in chunks: `CpuScheduler._fill_pipelines` -> `WorkerChoice.choose_workers` says which worker
    computes, `StepPlanner.plan_step` sends that worker a `StepPlan`.
5.  The KV of each chunk moves to the decode instance, if that is another one: `TransferTracker.open`.
6.  Results come: `WorkerRegistry.on_reply` -> `StepResults.on_step_done`. The last chunk brings the first token.
    The prefill allocation is freed; transfers keep its blocks pinned.
7.  The last transfer has arrived: `RequestLifecycle.on_transfer_ended`. The request decodes.
8.  One token is planned in each step (as 4) and comes as a result (as 6). `OutboxWriter.take` batches all new tokens.
9.  The last token ends it: `RequestPhases._close`; its memory is freed: `RequestPhases.free_allocation`.

On the way it can go back to step 2: `RequestPhases.preempt` (an older request needs its blocks), `on_memory_lost`
(an instance was lost), or a transfer that failed.

A mode is only the roles of the instances and their pools: the code asks "is the decode allocation the prefill
allocation?", never "which mode is this?".
"""

from __future__ import annotations

import math
from collections import defaultdict

from hbserve.config import Config
from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.policy.profile_curves import ProfileCurves
from hbserve.scheduler.clients import ClientMessages
from hbserve.scheduler.core_io import (
    ClientGone,
    Clock,
    ConnectionBroke,
    ConnectionMade,
    FromClient,
    FromWorker,
    Inbox,
    InboxEvent,
    Outbox,
    OutboxWriter,
    Start,
)
from hbserve.scheduler.drains import Drains
from hbserve.scheduler.instance import InstanceHandle, Instances
from hbserve.scheduler.learning.profile_learner import ProfileLearner
from hbserve.scheduler.metrics import EventLog, SchedulerMetrics
from hbserve.scheduler.readiness import Readiness
from hbserve.scheduler.requests.lifecycle import RequestLifecycle
from hbserve.scheduler.sequence import Sequence
from hbserve.scheduler.stats import SystemStats
from hbserve.scheduler.steps.step_planner import StepPlanner
from hbserve.scheduler.transfer_tracker import TransferTracker
from hbserve.scheduler.worker_registry import WorkerRegistry


class CpuScheduler:
    """The scheduler's core: takes requests, plans steps, and answers, one `step` after the other.

    It does nothing but compute: it reads no clock and touches no socket, and the same inboxes at the same times give
    the same outboxes. `hbserve.scheduler.shell` connects it to the world.

    To schedule by another policy, subclass it, override `_schedule_waiting_requests` and name the
    class in the configuration as ``performance.scheduler: package.module:Class``.

    Args:
        instance_addresses: where each instance listens, by id; the workers of an instance without an address are
            announced by `SetWorkers`.
    """

    def __init__(self, config: Config, instance_addresses: dict[str, str], start: Start) -> None:
        self.config = config
        self._clock = clock = Clock(start)
        self._outbox = outbox = OutboxWriter()
        curves = None if start.profile is None else ProfileCurves(start.profile)
        self._next_tick = start.now
        self._has_settled = False
        removed = () if start.predecessor is None else start.predecessor.removed
        self.instances = instances = Instances(
            InstanceHandle(instance, config, instance_addresses.get(instance.instance_id), clock, outbox, curves)
            for instance in config.gpu_instances
            if instance.instance_id not in removed
        )
        self._metrics = metrics = SchedulerMetrics(SemiPDMetricsCollector(clock=clock), config.scheduler, outbox)
        self._events = events = EventLog(clock, outbox)
        if start.predecessor is not None:
            events.note_predecessor(start.predecessor)
        transfers = TransferTracker(config.kv_transfer.verify)
        self._requests = requests = RequestLifecycle(
            config, instances, transfers, metrics, events, clock, outbox, curves
        )
        self._planner = planner = StepPlanner(
            config, clock, transfers, requests.preempt, requests.policy, last_step_id=start.time_ns
        )
        self._readiness = readiness = Readiness(instances, transfers, clock, outbox, start)
        self._drains = drains = Drains(instances, transfers, planner, events, clock, outbox)
        self._learner = learner = None
        if start.learns_profile:
            self._learner = learner = ProfileLearner(config, instances, requests, planner, events, clock, outbox)
        self._stats = stats = SystemStats(instances, requests, transfers, metrics, events, clock, learner)
        self._workers = workers = WorkerRegistry(
            config, instances, transfers, requests, readiness, drains, events, clock, outbox, start.time_ns, learner
        )
        for name, reason in ({} if start.predecessor is None else start.predecessor.given_up).items():
            workers.coverage.on_given_up(name, reason)
        self._clients = ClientMessages(config, clock, outbox, requests, readiness, stats, drains, workers)

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

    @property
    def now(self) -> float:
        """The time of the step under way, on the clock of `Sequence.arrival_time`."""
        return self._clock.now

    # --- a step ----------------------------------------------------------------------------------

    def step(self, now: float, inbox: Inbox = ()) -> Outbox:
        """Take in what has happened, decide, and return what is to be done.

        Args:
            now: seconds, on the clock of `Start`; never less than in the step before. The scheduler takes it that it
                was asleep itself if ``now`` is long after the time to which the last outbox asked to be called.

        Raises:
            SupersededError: a worker obeys a scheduler that was started later; this one must end.
            RuntimeError: an override of `_schedule_waiting_requests` waits, which only `step_async` allows.
        """
        step = self.step_async(now, inbox)
        try:
            step.send(None)
        except StopIteration as end:
            outbox: Outbox = end.value
            return outbox
        step.close()
        raise RuntimeError(f"{type(self).__name__}._schedule_waiting_requests waits for something: use step_async")

    async def step_async(self, now: float, inbox: Inbox = ()) -> Outbox:
        """Do a `step`. It waits only if an override of `_schedule_waiting_requests` does."""
        self._clock.advance(now)
        for event in inbox:
            self._receive(event)
        self._expire_deadlines()
        self._drains.proceed()
        self._requests.expire_copies()
        self._has_settled = False
        while not self._has_settled:
            self._has_settled = True
            num_preemptions = self.counts["preemptions"]
            await self._schedule_waiting_requests()
            if self.counts["preemptions"] > num_preemptions:
                self._has_settled = False  # what gave its place to another may fit elsewhere
            for instance in self.instances.to_plan(now):  # the others have nothing new to plan, however many there are
                self._fill_pipelines(instance)
        if self._learner is not None:
            self._learner.proceed()
        self._requests.tiers.dispatch()
        return self._outbox.take(call_at=min(self.instances.plan_at, self._clock.next_call))

    def _receive(self, event: InboxEvent) -> None:
        """Change the records by what has happened."""
        match event:
            case FromWorker(connection, reply):
                self._workers.on_reply(connection, reply)
            case FromClient(client, message):
                self._clients.on_message(client, message)
            case ClientGone(client):
                self._clients.on_gone(client)
            case ConnectionMade(connection):
                self._workers.connections.on_made(connection)
            case ConnectionBroke(connection):
                self._workers.on_connection_broke(connection)

    def _expire_deadlines(self) -> None:
        """Greet new workers; at every heartbeat interval, ping all workers and give up what is overdue."""
        self._workers.connections.greet()
        now, interval_s = self._clock.now, self.config.rpc.heartbeat_interval_s
        if now < self._next_tick:
            return
        was_asleep = now - self._next_tick > 3 * interval_s + 1.0  # workers may seem silent only because this one was
        self._next_tick = now + interval_s
        self._clock.call_at(self._next_tick)
        self._workers.check_heartbeats(was_asleep)
        self._readiness.check_deadlines()
        if (reason := self._workers.coverage.find_missing()) is not None and self.waiting:
            text = f"{reason}; {len(self.waiting)} waiting requests fail"
            self._events.note("unserved", "the system", text)
            for sequence in list(self.waiting):
                self._requests.finish(sequence, "error", reason, "UnservedError")
        self._stats.observe()

    async def _schedule_waiting_requests(self) -> None:
        """Admit waiting requests in the order of ``scheduler.policy``: the hook for other policies.

        An override may reorder ``self.waiting`` and calls ``self._admit(sequence)``, which gives a
        request its allocations and removes it from ``self.waiting``, or returns False if nothing fits now.
        """
        now = self._clock.now
        for sequence in list(self._requests.in_order()):
            if sequence.retry_at <= now and not self._admit(sequence):
                break

    def _admit(self, sequence: Sequence) -> bool:
        return self._requests.admit(sequence)

    def _fill_pipelines(self, instance: InstanceHandle) -> None:
        """Send an instance's workers steps until each has enough in flight, or there is nothing to do.

        While a worker computes a long step, its next step is planned as late as possible (`InstanceHandle.wake_at`).
        """
        now, choice = self._clock.now, instance.choice
        instance.plan_at = math.inf
        for worker in instance.workers.values():
            if worker.ready and not worker.is_introduced:
                self._planner.introduce(instance, worker)
                worker.is_introduced = True
        for worker, phases in choice.choose_workers().items():
            if not choice.may_plan(phases):
                instance.wake_at(choice.overdue_at)
                continue
            depth = worker.pipeline_depth(self.config.performance.pipeline_depth)
            ahead = choice.steps_ahead(worker)
            timings = [worker.timing, *dict.fromkeys(other.timing for other, _ in ahead)]
            while len(worker.inflight) + len(ahead) < choice.max_in_flight(phases, depth):
                if (wait_s := max([timing.wait_s(now) for timing in timings])) > 0:
                    instance.wake_at(now + wait_s)
                    break
                if not self._planner.plan_step(instance, worker, phases):
                    break
                choice.on_planned(worker, phases)
                if self.waiting:
                    self._has_settled = False  # what this step took may leave room for more
        self._workers.end_drained(instance)
