"""The workers: who is there, who has been lost, and who comes and goes on memory that another process holds."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

import msgspec
import zmq

from hbserve.config import Config, InstanceRole
from hbserve.messages.admin import InstanceChanged, RemoveInstance
from hbserve.messages.membership import Join, Joined
from hbserve.messages.supervisor import SetWorkers, WorkerLost, WorkerSpec
from hbserve.messages.transfer import LinkClosed, LinkOpened, TransferResult
from hbserve.messages.worker import (
    Hello,
    InstanceFailed,
    InstanceReply,
    Leaving,
    Ping,
    Shutdown,
    StepLost,
    StepRef,
    StepResult,
    WantsToLeave,
)
from hbserve.rpc.cluster_key import ClusterKey
from hbserve.scheduler.drains import Drains
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.membership import Membership
from hbserve.scheduler.metrics import EventLog
from hbserve.scheduler.readiness import Readiness
from hbserve.scheduler.request_lifecycle import RequestLifecycle
from hbserve.scheduler.transfer_tracker import TransferTracker
from hbserve.scheduler.worker import WorkerHandle

logger = logging.getLogger(__name__)

_GREETING_INTERVAL_S = 0.02


class WorkerRegistry:
    """Talks to every worker, and knows which of them can be given plans.

    What a worker has done goes to the requests; what was there of them when one is lost does, too.

    Args:
        config: of the system.
        context: ZeroMQ's, for connections to workers that are announced later.
        instances: whose workers these are, by id.
        transfers: whose links workers open and close.
        requests: told of steps, transfers and losses.
        readiness: told who has come, and who cannot.
        drains: told who wants to leave, and who is gone.
        events: told likewise, for operators.
        reply: to a supervisor of workers, an operator, or an instance that joins.
        wake: has the scheduler plan again.
    """

    def __init__(
        self,
        config: Config,
        context: zmq.Context[zmq.Socket[bytes]],
        instances: dict[str, InstanceHandle],
        transfers: TransferTracker,
        requests: RequestLifecycle,
        readiness: Readiness,
        drains: Drains,
        events: EventLog,
        reply: Callable[[bytes, WorkerLost | InstanceChanged | Joined], None],
        wake: Callable[[], None],
    ) -> None:
        self._rpc = config.rpc
        self._key = ClusterKey.of(config)
        self._context = context
        self._instances = instances
        self._transfers = transfers
        self._requests = requests
        self._readiness = readiness
        self._drains = drains
        self._membership = Membership(config, context, instances)
        self._fit: Hello | None = None
        self._last_departure = 0.0
        self._events = events
        self._reply = reply
        self._wake = wake
        self._scheduler_epoch = secrets.randbits(62) + 1
        self._supervisors: dict[str, bytes] = {}
        self._tasks: dict[WorkerHandle, list[asyncio.Task[None]]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def _all(self) -> list[tuple[InstanceHandle, WorkerHandle]]:
        instances = (*self._instances.values(), *self._membership.joining)
        return [(instance, worker) for instance in instances for worker in instance.workers.values()]

    # --- connections -----------------------------------------------------------------------------

    async def serve(self) -> None:
        """Listen to all workers, those that come later included, until cancelled."""
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            for instance, worker in self._all():
                self._listen(instance, worker)
            await self._failure
        finally:
            for _, worker in self._all():
                await self._hang_up(worker)
            await asyncio.gather(*self._closing)

    def _listen(self, instance: InstanceHandle, worker: WorkerHandle) -> None:
        tasks = [
            asyncio.create_task(self._receive_from(instance, worker)),
            asyncio.create_task(self._watch_connection(instance, worker)),
        ]
        for task in tasks:
            task.add_done_callback(self._on_task_end)
        self._tasks[worker] = tasks

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        """None of them ends on its own."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._failure.done():
            self._failure.set_exception(error)

    async def _receive_from(self, instance: InstanceHandle, worker: WorkerHandle) -> None:
        while True:
            try:
                reply = await worker.rpc.receive()
            except msgspec.DecodeError as error:
                logger.error("dropped a message of %s that is no reply: %s", worker.id, error)
                continue
            self._on_reply(instance, worker, reply)
            self._wake()

    async def _watch_connection(self, instance: InstanceHandle, worker: WorkerHandle) -> None:
        while True:
            await worker.rpc.wait_disconnected()
            if worker.ready:  # or it has said itself why
                self._lose(instance, worker, "its connection broke")
                self._wake()

    async def _hang_up(self, worker: WorkerHandle) -> None:
        tasks = self._tasks.pop(worker, [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        worker.rpc.close()

    def _hang_up_later(self, worker: WorkerHandle) -> None:
        task = asyncio.create_task(self._hang_up(worker))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def check_heartbeats(self, now: float, was_asleep: bool) -> None:
        """Ask every worker for a sign of life, and give up on those that have given none for too long.

        Args:
            now: on the monotonic clock.
            was_asleep: nobody is given up on this time.
        """
        for instance, worker in self._all():
            self._ping(worker)
            silence = now - worker.last_seen
            if worker.ready and silence > self._rpc.heartbeat_timeout_s and not was_asleep:
                self._lose(instance, worker, f"no sign of life for {silence:.1f} s")
        for instance in self._membership.overdue(now):
            logger.warning("%s wanted to join and did not come", instance.id)
            self._gone(instance)

    def _ping(self, worker: WorkerHandle) -> None:
        worker.send(Ping(scheduler_epoch=self._scheduler_epoch, known_epoch=worker.epoch))

    def _on_reply(self, instance: InstanceHandle, worker: WorkerHandle, reply: InstanceReply) -> None:
        if isinstance(reply, Hello):
            self._register(instance, worker, reply)
            return
        if isinstance(reply, InstanceFailed):
            self._lose(instance, worker, reply.error)
            self._readiness.deny(f"{instance.id}: {reply.error}")
            return
        if reply.epoch != worker.epoch:
            return  # from an incarnation that has been given up
        worker.last_seen = time.monotonic()
        if isinstance(reply, StepResult):
            if reply.error is not None:
                self._lose(instance, worker, f"a step failed: {reply.error}")
            else:
                worker.results.append(reply)
                self._confirm_steps(instance)
        elif isinstance(reply, TransferResult):
            self._requests.transfer_ended(reply)
        elif isinstance(reply, LinkOpened):
            self._transfers.on_link_opened(instance, reply)
            self._readiness.announce()
        elif isinstance(reply, LinkClosed):
            self._transfers.on_link_closed(instance, reply)
        elif isinstance(reply, WantsToLeave):
            self._drains.wants_to_leave(instance)
        elif isinstance(reply, Leaving):
            self._lose(instance, worker, "it is ending")

    def _confirm_steps(self, instance: InstanceHandle) -> None:
        """Results of several workers in the order of their steps, whichever is heard of first."""
        while (worker := instance.whose_result_is_next()) is not None:
            self._requests.step_done(worker, worker.results.popleft())

    # --- who is there ----------------------------------------------------------------------------

    def _register(self, instance: InstanceHandle, worker: WorkerHandle, hello: Hello) -> None:
        if hello.epoch == worker.epoch:
            return
        problem = self._misfit(instance, worker, hello)
        if problem is not None:
            if not worker.is_told_to_end:
                logger.error("%s", problem)
                instance.why_lost = problem
            if self._membership.is_member(instance) and not worker.is_told_to_end:
                worker.is_told_to_end = True
                worker.send(Shutdown(error=problem))  # and when its connection breaks, it is forgotten
            return
        if worker.ready:
            self._lose(instance, worker, "it started again")
            if worker.id not in instance.workers:
                return  # it will join again
        if worker.inflight:
            return  # it was given up on, and its process is to end: until then others' steps wait for that
        self._fit = self._fit or hello
        self._membership.arrived(instance)
        instance.register(worker, hello)
        self._transfers.connect(self._instances.values())
        self._readiness.learn(hello)
        logger.info("%s registered: %s, %d KV blocks", worker.id, hello.device, hello.num_blocks)
        self._events.note("ready", worker.id, f"{hello.device}, {hello.num_blocks} KV blocks")
        self._readiness.announce()

    def _misfit(self, instance: InstanceHandle, worker: WorkerHandle, hello: Hello) -> str | None:
        """Why a worker cannot work with the others: those that are there, and those that are to come back."""
        if hello.instance_id != worker.id or hello.role != worker.started_as:
            return f"{worker.rpc.address} is {hello.role} {hello.instance_id!r}, not {worker.started_as} {worker.id!r}"
        if self._fit is None:
            return None
        what = "model", "dtype", "block size", "bytes of a KV head", "vocabulary"
        mine, theirs = (
            (each.model, each.dtype, each.block_size, each.head_bytes, each.vocab_size) for each in (hello, self._fit)
        )
        if mine != theirs:
            differs = ", ".join(f"{n} {m}, not {t}" for n, m, t in zip(what, mine, theirs, strict=True) if m != t)
            return f"{worker.id} does not fit to {self._fit.instance_id}: {differs}"
        most = self._readiness.max_model_len
        if self._membership.is_member(instance) and most is not None and hello.max_model_len < most:
            return f"{worker.id} takes {hello.max_model_len} tokens, the system {most}: it needs more KV blocks"
        return None

    def _lose(self, instance: InstanceHandle, worker: WorkerHandle, why: str) -> None:
        """A worker is gone, or as good as gone."""
        if not worker.ready:
            instance.note_lost(why)
            if self._membership.is_member(instance):
                self._gone(instance)
            return
        is_expected = worker.is_retiring or self._drains.has_let_go(instance)
        logger.log(logging.INFO if is_expected else logging.WARNING, "lost %s: %s", worker.id, why)
        self._events.note("retired" if is_expected else "lost", worker.id, why)
        if worker.owns_memory:
            worker.hello = None
            worker.inflight.clear()
            self._requests.memory_lost(instance, f"{instance.id} was lost: {why}")
            self._gone(instance, self._drains.gone(instance))
            return
        # The memory is intact, but until the process has ended it may still write: see `set_workers`.
        worker.hello = None
        worker.results.clear()
        self._requests.worker_lost(instance, worker)
        self._confirm_steps(instance)
        instance.note_lost(why)
        if not worker.is_retiring:
            self._reply(self._supervisors[instance.id], WorkerLost(worker_id=worker.id, reason=why))

    def _gone(self, instance: InstanceHandle, for_good: bool = False) -> None:
        """Let go of an instance that is not there, unless the configuration says where it will come back.

        Args:
            for_good: it is not to come back.
        """
        was_member = self._membership.is_member(instance)
        if self._membership.gone(instance, for_good):
            self._last_departure = time.monotonic()
            self._transfers.forget(instance)
            self._readiness.announce()
            self._events.note("left", instance.id, instance.why_lost)
            logger.info("%s is no instance of the system any more", instance.id)
        elif not was_member:
            return
        for worker in list(instance.workers.values()):
            instance.forget_worker(worker)
            self._hang_up_later(worker)

    # --- instances that come and go --------------------------------------------------------------

    def join(self, client: bytes, message: Join) -> None:
        """An instance wants to be one of the system's."""
        known = {each.id: each for each in (*self._membership.joining, *self._instances.values())}
        before = list(known[message.instance_id].workers.values()) if message.instance_id in known else []
        answer, instance = self._membership.take(message)
        self._reply(client, answer)
        if answer.error is not None:
            logger.warning("%s cannot join: %s", message.instance_id, answer.error)
        if instance is None:
            return
        logger.info("%s joins as %s, at %s", instance.id, instance.role, message.address)
        for worker in before:
            self._hang_up_later(worker)
        for worker in instance.workers.values():
            self._listen(instance, worker)  # it has to load the model: heartbeats find it soon enough

    def remove(self, client: bytes, message: RemoveInstance) -> None:
        """An operator wants an instance to leave: at once if it is not there, else when it has nothing left."""
        instance = self._instances.get(message.instance_id)
        if instance is None or instance.ready or instance.role is InstanceRole.SEMI_PD:
            self._drains.remove(client, message)
            return
        self._drains.gone(instance)
        self._gone(instance, for_good=True)
        self._reply(client, InstanceChanged(query_id=message.query_id))

    def nobody_came_back(self, now: float) -> str | None:
        """Which phase has had no worker for longer than requests shall wait for one, in words; None if all is well.

        Args:
            now: on the monotonic clock.
        """
        for does in ("prefills", "decodes"):
            instances = [instance for instance in self._instances.values() if getattr(instance.role, does)]
            since = [instance.lost_since for instance in instances if instance.lost_since is not None]
            last = max(since, default=self._last_departure)
            if len(since) == len(instances) and now - last >= self._rpc.recovery_timeout_s:
                return f"no instance that {does} came back: {self._readiness.who_is_missing()}"
        return None

    # --- workers on memory that another process holds --------------------------------------------

    def set_workers(self, supervisor: bytes, message: SetWorkers) -> None:
        """Which workers an instance has from now on: meet the new ones, retire those not named, drop the dead."""
        instance = self._instances.get(message.instance_id)
        if instance is None or instance.id in instance.workers:
            logger.error("dropped a list of workers for %r, which is no such instance", message.instance_id)
            return
        self._supervisors[instance.id] = supervisor
        self._set_shares(instance, message)
        if instance.arena_epoch not in (0, message.arena_epoch):
            logger.warning("lost the memory of %s: %s", instance.id, message.reason)
            for worker in list(instance.workers.values()):
                instance.forget_worker(worker)
                self._hang_up_later(worker)
            self._requests.memory_lost(instance, f"the memory of {instance.id} was lost: {message.reason}")
        for worker_id in message.gone:
            if worker_id in instance.workers:
                worker = instance.workers[worker_id]
                self._requests.worker_lost(instance, worker)  # its end may be heard of here first
                unconfirmed = instance.forget_worker(worker)
                self._requests.steps_lost(unconfirmed)
                self._hang_up_later(worker)
                if unconfirmed and worker.cell is not None:
                    lost = StepLost(step=StepRef(cell=worker.cell, step_id=unconfirmed[-1].step_id))
                    for other in instance.workers.values():
                        if other.ready and other.role is worker.role:
                            other.send(lost)
                self._confirm_steps(instance)
        named = {spec.worker_id for spec in message.workers}
        for worker in instance.workers.values():
            worker.is_retiring = worker.id not in named
        for spec in message.workers:
            if spec.worker_id not in instance.workers:
                self._meet(instance, spec)

    def _set_shares(self, instance: InstanceHandle, message: SetWorkers) -> None:
        shares = {
            InstanceRole.PREFILL: message.prefill_percentage,
            InstanceRole.DECODE: message.decode_percentage,
        }
        if shares != instance.shares or message.mixed != instance.is_mixed:
            split = "mixed" if message.mixed else ", ".join(f"{phase} {share} %" for phase, share in shares.items())
            self._events.note("rotation", instance.id, f"{split}: {message.reason}" if message.reason else split)
        instance.shares, instance.is_mixed = shares, message.mixed

    def _meet(self, instance: InstanceHandle, spec: WorkerSpec) -> None:
        worker = WorkerHandle(spec.worker_id, spec.role, spec.percentage, self._context, spec.address, self._key)
        instance.workers[worker.id] = worker
        self._listen(instance, worker)
        self._greet(worker)

    def _greet(self, worker: WorkerHandle) -> None:
        """Ask for its `Hello` until it comes: sooner than at the next heartbeat."""
        if worker in self._tasks and not worker.ready:
            self._ping(worker)
            asyncio.get_running_loop().call_later(_GREETING_INTERVAL_S, self._greet, worker)

    def end_retired(self, instance: InstanceHandle) -> None:
        """Have workers end that have nothing left to do, where others can do their phase."""
        for worker in instance.workers.values():
            if worker.ready and worker.is_retiring and not worker.is_told_to_end and not worker.inflight:
                others = [other for other in instance.workers.values() if other.ready and not other.is_retiring]
                are_there = any(other.role in (worker.role, InstanceRole.UNIFIED) for other in others)
                if are_there and not instance.awaits_worker(worker.role):
                    worker.is_told_to_end = True
                    worker.send(Shutdown())
