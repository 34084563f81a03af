"""The workers that are there: registration, loss, instances that join and leave, and semi-PD's sets of workers."""

from __future__ import annotations

import logging
import math

from hbserve.config import Config, InstanceRole
from hbserve.errors import SupersededError
from hbserve.messages.admin import InstanceChanged, RemoveInstance
from hbserve.messages.membership import Join
from hbserve.messages.supervisor import ReportEvent, SetWorkers, WorkerLost, WorkerSpec
from hbserve.messages.tiers import FoundBlocks, TierResult
from hbserve.messages.transfer import LinkClosed, LinkOpened, TransferResult
from hbserve.messages.worker import (
    Hello,
    InstanceFailed,
    InstanceReply,
    Leaving,
    Shutdown,
    StepLost,
    StepRef,
    StepResult,
    Superseded,
    WantsToLeave,
)
from hbserve.scheduler.connections import WorkerConnections
from hbserve.scheduler.core_io import Clock, OutboxWriter
from hbserve.scheduler.drains import Drains
from hbserve.scheduler.instance import InstanceHandle, Instances
from hbserve.scheduler.learning.profile_learner import ProfileLearner
from hbserve.scheduler.membership import InstanceMembership
from hbserve.scheduler.metrics import EventLog
from hbserve.scheduler.phase_coverage import PhaseCoverage
from hbserve.scheduler.readiness import Readiness
from hbserve.scheduler.requests.lifecycle import RequestLifecycle
from hbserve.scheduler.transfer_tracker import TransferTracker
from hbserve.scheduler.worker import WorkerHandle


class WorkerRegistry:
    """Knows which workers can be given plans, and tells the other parts of the scheduler what workers report.

    Owner of `WorkerHandle.last_seen`.

    Args:
        instances: by id; instances that join or leave are added and removed here.
        requests: told of steps, transfers and losses.
        readiness: told which workers have registered, and which cannot.
        drains: told which instances want to leave, and which are gone.
        events: told the same, for operators.
        scheduler_epoch: see `WorkerConnections`.
        learner: told of each step; None: no profile is learnt.

    Attributes:
        connections: to the workers.
        coverage: of the phases by instances that are there.
    """

    def __init__(
        self,
        config: Config,
        instances: Instances,
        transfers: TransferTracker,
        requests: RequestLifecycle,
        readiness: Readiness,
        drains: Drains,
        events: EventLog,
        clock: Clock,
        outbox: OutboxWriter,
        scheduler_epoch: int,
        learner: ProfileLearner | None = None,
    ) -> None:
        self._learner = learner
        self._heartbeat_timeout_s = config.rpc.heartbeat_timeout_s
        self._step_timeout_s = config.rpc.step_timeout_s
        self._instances = instances
        self._transfers = transfers
        self._requests = requests
        self._readiness = readiness
        self._drains = drains
        self._events = events
        self._clock = clock
        self._outbox = outbox
        self._membership = InstanceMembership(config, instances, clock, outbox)
        self.connections = WorkerConnections(clock, outbox, scheduler_epoch)
        self.coverage = PhaseCoverage(config, instances, self._membership, readiness, clock)
        self._first_hello: Hello | None = None
        self._supervisors: dict[str, bytes] = {}
        for instance in instances.values():
            for worker in instance.workers.values():
                self.connections.listen(instance, worker)

    # --- heartbeats ------------------------------------------------------------------------------

    def check_heartbeats(self, was_asleep: bool) -> None:
        """Ping every worker, and give up on workers that were silent for too long and on instances that did not come.

        Args:
            was_asleep: the scheduler itself was suspended, so no silence counts this time.
        """
        for instance, worker in self.connections:
            self.connections.ping(worker)
            silence_s = self._clock.now - worker.last_seen
            if worker.ready and silence_s > self._heartbeat_timeout_s and not was_asleep:
                self._on_worker_lost(instance, worker, f"no sign of life for {silence_s:.1f} s")
        for instance in self._instances.values():
            for worker_id, deadline in instance.unsettled.items():
                if self._clock.now > deadline:
                    instance.unsettled[worker_id] = math.inf
                    reason = "it does not finish the steps of the scheduler before this one"
                    self._outbox.reply(self._supervisors[instance.id], WorkerLost(worker_id=worker_id, reason=reason))
        for instance in self._membership.overdue():
            self._outbox.log(logging.WARNING, f"{instance.id} wanted to join and did not come")
            self._on_instance_gone(instance)

    def on_connection_broke(self, connection: int) -> None:
        """A connection broke, which reveals the end of a process sooner than its silence does."""
        found = self.connections.find(connection)
        if found is not None and found[1].ready:  # otherwise it has been lost already, with its own reason
            self._on_worker_lost(*found, "its connection broke")

    # --- what workers report ---------------------------------------------------------------------

    def on_reply(self, connection: int, reply: InstanceReply) -> None:
        """A worker has sent a message."""
        found = self.connections.find(connection)
        if found is None:
            return  # closed meanwhile
        instance, worker = found
        worker.last_seen = self._clock.now
        if isinstance(reply, StepResult):
            if reply.epoch == worker.epoch:  # or from an incarnation that has been given up
                self._on_step_result(instance, worker, reply)
        elif isinstance(reply, Hello):
            self._register(instance, worker, reply)
        elif isinstance(reply, InstanceFailed):
            self._on_worker_lost(instance, worker, reply.error)
            self._readiness.on_failed(instance.id, reply.error)
        elif isinstance(reply, ReportEvent):
            self._events.note(reply.kind, reply.subject, reply.text, is_logged=True)
        elif isinstance(reply, Superseded):
            self._on_superseded(instance, worker)
        elif reply.epoch != worker.epoch:
            pass  # from an incarnation that has been given up
        elif isinstance(reply, TransferResult):
            self._requests.on_transfer_ended(reply)
        elif isinstance(reply, TierResult):
            self._requests.on_tier_result(worker, reply)
        elif isinstance(reply, FoundBlocks):
            self._requests.on_blocks_found(worker, reply)
        elif isinstance(reply, LinkOpened):
            self._transfers.on_link_opened(instance, reply)
            self._readiness.announce()
        elif isinstance(reply, LinkClosed):
            self._transfers.on_link_closed(instance, reply)
        elif isinstance(reply, WantsToLeave):
            self._drains.on_wants_to_leave(instance)
        elif isinstance(reply, Leaving):
            self._on_worker_lost(instance, worker, "it is ending")

    def _on_step_result(self, instance: InstanceHandle, worker: WorkerHandle, result: StepResult) -> None:
        error = f"a step failed: {result.error}" if result.error is not None else worker.misfit(result)
        if error is not None:
            self._on_worker_lost(instance, worker, error)
            return
        worker.results.append(result)
        self._confirm_steps(instance)

    def _on_superseded(self, instance: InstanceHandle, worker: WorkerHandle) -> None:
        """A worker obeys another scheduler. One that never obeyed this one may do so later, if the other is silent.

        Raises:
            SupersededError: if the worker obeyed this one before.
        """
        reason = f"{worker.id} at {worker.address} obeys a scheduler that was started later"
        if worker.ready or instance.num_restarts >= 0:
            raise SupersededError(f"this scheduler ends, because {reason}")
        instance.why_lost = reason

    def _confirm_steps(self, instance: InstanceHandle) -> None:
        """Confirm results of several workers in the order of their steps, whichever result comes first."""
        while (worker := instance.choice.next_to_confirm()) is not None:
            step, result = worker.inflight[0], worker.results.popleft()
            self._requests.on_step_done(worker, result)
            if self._learner is not None:
                self._learner.on_step_done(instance, step, result.busy_s)
        instance.wake()

    # --- registration and loss -------------------------------------------------------------------

    def _register(self, instance: InstanceHandle, worker: WorkerHandle, hello: Hello) -> None:
        if hello.epoch == worker.epoch:
            return
        problem = self._misfit(instance, worker, hello)
        if problem is not None:
            if not worker.is_told_to_end:
                if instance.why_lost != problem:
                    self._events.note("join_refused", worker.id, problem)
                instance.why_lost = problem
            if self._membership.is_member(instance) and not worker.is_told_to_end:
                worker.is_told_to_end = True
                worker.send(Shutdown(error=problem))  # when its connection breaks, the instance is forgotten
            return
        if worker.ready:
            self._on_worker_lost(instance, worker, "it started again")
            if worker.id not in instance.workers:
                return  # it will join again
        if worker.inflight:
            return  # it was lost, and other workers' steps wait until its process has ended
        self._first_hello = self._first_hello or hello
        self.coverage.on_registered(instance)
        self._membership.on_arrived(instance)
        if worker.id == instance.id and instance.num_restarts < 0 and hello.serves_as is not instance.role:
            instance.change_role(hello.serves_as)  # an earlier scheduler has changed it
        self._requests.on_copies_lost(worker)
        instance.register(worker, hello)
        self._requests.tiers.on_registered(instance, worker)
        self._transfers.connect(self._instances.values())
        self._readiness.on_hello(hello)
        self._events.note("ready", worker.id, f"{hello.device}, {hello.num_blocks} KV blocks")
        self._readiness.announce()

    def _misfit(self, instance: InstanceHandle, worker: WorkerHandle, hello: Hello) -> str | None:
        """Return why a worker cannot work with the others, those that are to come back included."""
        if hello.instance_id != worker.id or hello.role != worker.started_as:
            return f"{worker.address} is {hello.role} {hello.instance_id!r}, not {worker.started_as} {worker.id!r}"
        first = self._first_hello
        if first is None:
            return None
        names = "model", "dtype", "KV dtype", "block size", "bytes of a KV head", "vocabulary"
        found, expected = (
            (h.model, h.dtype, h.kv_dtype, h.block_size, h.head_bytes, h.vocab_size) for h in (hello, first)
        )
        if found != expected:
            pairs = zip(names, found, expected, strict=True)
            differs = ", ".join(f"{name} {f}, not {e}" for name, f, e in pairs if f != e)
            return f"{worker.id} does not fit to {first.instance_id}: {differs}"
        limit = self._readiness.max_model_len
        if self._membership.is_member(instance) and limit is not None and hello.max_model_len < limit:
            return f"{worker.id} takes {hello.max_model_len} tokens, the system {limit}: it needs more KV blocks"
        return None

    def _on_worker_lost(self, instance: InstanceHandle, worker: WorkerHandle, reason: str) -> None:
        """A worker is gone, or cannot be used any more."""
        if not worker.ready:
            instance.note_lost(reason)
            if self._membership.is_member(instance):
                self._on_instance_gone(instance)
            return
        self._note_end(instance, worker, reason)
        if worker.owns_memory:
            worker.hello = None
            worker.drop_steps()
            self._requests.on_memory_lost(instance, f"{instance.id} was lost: {reason}")
            self._on_instance_gone(instance, self._drains.on_gone(instance))
            return
        # The memory is intact, but the process may write to it until it has ended: see `set_workers`.
        worker.hello = None
        worker.results.clear()
        self._requests.on_worker_lost(instance, worker)
        self._confirm_steps(instance)
        instance.note_lost(reason)
        if not worker.is_draining:
            self._outbox.reply(self._supervisors[instance.id], WorkerLost(worker_id=worker.id, reason=reason))

    def _note_end(self, instance: InstanceHandle, worker: WorkerHandle, reason: str) -> None:
        if worker.is_told_to_end or self._drains.has_let_go(instance):
            self._events.note("retired", worker.id, "it has finished its work, and ended as it was told to")
        else:
            self._events.note("lost", worker.id, f"{reason} while it drained" if worker.is_draining else reason)

    def _on_instance_gone(self, instance: InstanceHandle, for_good: bool = False) -> None:
        """Forget an instance that is not there, unless the configuration says where it will come back.

        Args:
            for_good: it is not to come back.
        """
        was_member = self._membership.is_member(instance)
        if self._membership.on_gone(instance, for_good):
            self._transfers.forget(instance)
            self._readiness.announce()
            self._events.note("left", instance.id, instance.why_lost or "it is no instance of the system any more")
        elif not was_member:
            return
        self._forget_workers(instance)

    def _forget_workers(self, instance: InstanceHandle) -> None:
        for worker in list(instance.workers.values()):
            instance.forget_worker(worker)
            self.connections.close(worker)

    # --- instances that come and go --------------------------------------------------------------

    def join(self, client: bytes, message: Join) -> None:
        """Answer an instance that wants to join the system, and listen to it if it may."""
        known = {instance.id: instance for instance in (*self._membership.joining, *self._instances.values())}
        before = list(known[message.instance_id].workers.values()) if message.instance_id in known else []
        answer, instance = self._membership.join(message)
        self._outbox.reply(client, answer)
        if answer.error is not None:
            self._events.note("join_refused", message.instance_id, answer.error)
        if instance is None:
            return
        self._outbox.log(logging.INFO, f"{instance.id} joins as {instance.role}, at {message.address}")
        for worker in before:
            self.connections.close(worker)
        for worker in instance.workers.values():
            self.connections.listen(instance, worker)  # it has to load the model: heartbeats find it soon enough

    def remove(self, client: bytes, message: RemoveInstance) -> None:
        """Have an instance leave: at once if it is not there, else when it has nothing left to do."""
        instance = self._instances.get(message.instance_id)
        if instance is None or instance.ready or instance.role is InstanceRole.SEMI_PD:
            self._drains.remove(client, message)
            return
        problem = None if message.has_ended else self._drains.why_needed(instance)
        if problem is None:
            self._drains.on_gone(instance)
            self._on_instance_gone(instance, for_good=True)
        self._outbox.reply(client, InstanceChanged(query_id=message.query_id, error=problem))

    # --- workers on memory that another process holds --------------------------------------------

    def set_workers(self, supervisor: bytes, message: SetWorkers) -> None:
        """Set which workers an instance has: connect to new ones, drain those not named, forget those that ended."""
        instance = self._instances.get(message.instance_id)
        if instance is None or instance.id in instance.workers:
            text = f"dropped a list of workers for {message.instance_id!r}, which is no such instance"
            self._outbox.log(logging.ERROR, text)
            return
        self._supervisors[instance.id] = supervisor
        self._set_shares(instance, message)
        if instance.arena_epoch not in (0, message.arena_epoch):
            self._events.note("memory_lost", instance.id, message.reason)
            self._forget_workers(instance)
            self._requests.on_memory_lost(instance, f"the memory of {instance.id} was lost: {message.reason}")
        named = {spec.worker_id for spec in (*message.workers, *message.draining)}
        for worker in list(instance.workers.values()):
            if worker.id not in named:
                self._on_worker_ended(instance, worker, message.reason)
        for is_draining, specs in ((False, message.workers), (True, message.draining)):
            for spec in specs:
                if spec.worker_id not in instance.workers:
                    self._add_worker(instance, spec)
                instance.workers[spec.worker_id].is_draining = is_draining
        instance.wake()

    def _set_shares(self, instance: InstanceHandle, message: SetWorkers) -> None:
        shares = {InstanceRole.PREFILL: message.prefill_percentage, InstanceRole.DECODE: message.decode_percentage}
        if instance.choice.set_shares(shares, message.mixed):
            split = "mixed" if message.mixed else ", ".join(f"{phase} {share} %" for phase, share in shares.items())
            self._events.note("rotation", instance.id, f"{split}: {message.reason}" if message.reason else split)

    def _on_worker_ended(self, instance: InstanceHandle, worker: WorkerHandle, reason: str) -> None:
        """A worker's process has ended: plan its steps again, and let no other worker wait for them."""
        if worker.ready:
            self._note_end(instance, worker, reason)
        self._requests.on_worker_lost(instance, worker)  # the supervisor may know of its end before the connection
        unconfirmed = instance.forget_worker(worker)
        self._requests.on_steps_lost(unconfirmed)
        self._requests.on_copies_lost(worker)
        self.connections.close(worker)
        if unconfirmed and worker.cell is not None:
            lost = StepLost(step=StepRef(cell=worker.cell, step_id=unconfirmed[-1].step_id))
            for other in instance.workers.values():
                if other.ready and other.role is worker.role:
                    other.send(lost)
        self._confirm_steps(instance)
        self._readiness.announce()

    def _add_worker(self, instance: InstanceHandle, spec: WorkerSpec) -> None:
        worker = WorkerHandle(spec.worker_id, spec.role, spec.percentage, spec.address, self._clock, self._outbox)
        instance.workers[worker.id] = worker
        if not instance.arena_epoch:
            instance.unsettled[worker.id] = self._clock.now + self._step_timeout_s
        self.connections.listen(instance, worker)
        self.connections.begin_greeting(worker)

    def end_drained(self, instance: InstanceHandle) -> None:
        """Tell an instance's draining workers to end that have nothing in flight, where others can do their phase."""
        for worker in instance.workers.values():
            is_idle = not worker.inflight and not self._requests.tiers.has_jobs(worker)
            if worker.is_draining and worker.ready and not worker.is_told_to_end and is_idle:
                others = [other for other in instance.workers.values() if other.ready and not other.is_draining]
                are_there = any(other.role in (worker.role, InstanceRole.UNIFIED) for other in others)
                if are_there and not instance.choice.awaits_worker(worker.role):
                    worker.is_told_to_end = True
                    worker.send(Shutdown())
