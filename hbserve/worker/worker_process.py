"""The worker: one instance of the model, or one phase of it on a shared GPU. This is the process of its rank 0.

The scheduler sends plans and commands, and the worker answers with tokens. With tensor parallelism the other ranks are
children of this process and end with it, so the scheduler sees one worker.

A worker holds nothing that the scheduler could not send again. `hbserve.worker.scheduler_session` says which scheduler
it obeys, and when it forgets everything.

`run` is in the main thread; a comment above each group of methods names the thread of the others. The package's
docstring has a picture of the threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from hbserve.config import Config, InstanceConfig
from hbserve.errors import HBServeError
from hbserve.kv_cache.host_memory import HostMemoryOwner
from hbserve.kv_tiers.joint_results import JointTierResults
from hbserve.kv_transfer.joint_results import JointResults
from hbserve.messages.supervisor import EventKind, ReportEvent
from hbserve.messages.tiers import FindBlocks, FoundBlocks, HostMemory, LoadBlocks, StoreBlocks
from hbserve.messages.transfer import CancelTransfer, LinkOpened, TransferReply
from hbserve.messages.worker import (
    InstanceFailed,
    Leaving,
    Shutdown,
    StepLost,
    StepPlan,
    StepResult,
    WantsToLeave,
)
from hbserve.process import child, event_loop
from hbserve.process.events import log_event
from hbserve.process.stopwatch import Stopwatch
from hbserve.rpc.instance_line import RpcServer
from hbserve.worker import events
from hbserve.worker.captures import Captures
from hbserve.worker.join_client import JoinClient
from hbserve.worker.loaded_rank import loaded_rank
from hbserve.worker.rank_group import EXIT_RANK_LOST, RankGroup
from hbserve.worker.scheduler_session import SchedulerSession
from hbserve.worker.step_pipeline import StepPipeline, UnfinishedSteps

if TYPE_CHECKING:
    from hbserve.engine.arenas import ArenaAttachment
    from hbserve.platform import Partition

logger = logging.getLogger(__name__)

EXIT_STEP_FAILED = 70
EXIT_STEP_HUNG = 71
EXIT_REFUSED = 1

_SCHEDULER_CHECK_INTERVAL_S = 0.25
_IDLE_S = 0.5
"""Time without work after which a worker captures graphs: the first requests after its start do not wait for them."""
_MIN_WAIT_S = 0.01
_PART_PAUSE_S = 1e-3
"""Time between two parts of a capture, for the other threads of this process."""
_MAX_LAST_WAIT_S = 5.0
"""How long an ending worker waits for another worker's step: that worker and the scheduler may have been killed."""


@dataclass(frozen=True, kw_only=True)
class SharedDevice:
    """What a worker gets that shares its device and its arenas with other workers.

    Attributes:
        attachments: to arenas that other processes hold, one per rank.
        partition: the worker's share of the device.
        is_awaited: the start of a system waits for the worker; else others serve until it has captured all graphs.
    """

    attachments: list[ArenaAttachment]
    partition: Partition
    is_awaited: bool


class WorkerProcess:
    """A worker: loads the model, listens for the scheduler, and serves until it is told to stop.

    Args:
        config: of the system.
        instance: which of its instances this is.
        rpc: listens for the scheduler.
        ranks: its other ranks, on standby.
        stopwatch: measures the parts of the start.
        shared: None: the worker makes its own arenas, and has its device for itself.
        host: memory of the host for KV blocks that another process owns; None: the worker makes its own, if
            ``kv_cache.host_bytes`` says so.
        join_client: of a worker that has joined the system; None: the system's configuration has the worker.

    Attributes:
        was_dismissed: the scheduler has told the worker to end.
    """

    def __init__(
        self,
        config: Config,
        instance: InstanceConfig,
        rpc: RpcServer,
        ranks: RankGroup,
        stopwatch: Stopwatch,
        shared: SharedDevice | None = None,
        join_client: JoinClient | None = None,
        host: HostMemory | None = None,
    ) -> None:
        self.config = config
        self.instance = instance
        self.was_dismissed = False
        self._join_client = join_client
        self._host = host
        self._own_host: HostMemoryOwner | None = None
        self._wants_to_leave = self._is_serving = False
        self._ranks, self._kill_ranks = ranks, ranks.kill
        self._stopwatch, self._shared = stopwatch, shared
        self._rpc = rpc
        self._plans: queue.SimpleQueue[tuple[StepPlan, float] | None] = queue.SimpleQueue()
        self._events: events.EventQueue[events.WorkerEvent] = events.EventQueue(self._on_event)
        self._unfinished = UnfinishedSteps()
        self._exit_code = 0

    def run(self) -> int:
        """Load the model and serve until told to stop; return the exit code.

        Raises:
            HBServeError: if the model cannot be served as configured.
        """
        started = time.monotonic()
        ranks, stopwatch = self._ranks, self._stopwatch
        ranks.on_lost = self._on_rank_lost
        attachments, partition = None, None
        if self._shared is not None:
            attachments, partition = self._shared.attachments, self._shared.partition
        elif self._host is None and self.config.kv_cache.host_bytes:
            self._own_host = HostMemoryOwner(self.config.kv_cache.host_bytes)
            self._own_host.reserve()
            self._host = self._own_host.memory
        defers_graphs = self._shared is None or self._shared.is_awaited
        ranks.wake(self.config, self.instance, attachments, partition, self._host, defers_graphs)
        stopwatch.lap("wake")
        with loaded_rank(
            self.config,
            self.instance,
            0,
            ranks.port,
            ranks.take_listener(),
            self._report,
            None if attachments is None else attachments[0],
            partition,
            stopwatch,
            self._host,
            lambda result: self._events.post(events.BlocksCopied(0, result)),
            defers_graphs,
            self._events.post,
        ) as rank:
            self._platform, self._runner, self._transfers = rank.platform, rank.runner, rank.transfers
            self._tiers, self._joint_copies = rank.tiers, JointTierResults(ranks.size, self._rpc.send)
            self._runner.grammars.set_on_event(self._report_event)
            ranks.wait_ready(started + self.config.rpc.start_timeout_s)
            stopwatch.lap("other_ranks")
            logger.info(
                "ready in %.1f s: %s on %s, %d KV blocks of %d tokens",
                *(time.monotonic() - started, self.instance.instance_type, self._platform.describe()),
                *(self._runner.num_blocks, self._runner.layout.block_size),
            )
            self._joint_results = JointResults(ranks.size, self._on_joint_reply, self._cancel_transfer)
            self._session = SchedulerSession(
                self.config,
                self.instance,
                self._rpc,
                rank,
                ranks,
                self._unfinished,
                None if attachments is None else attachments[0].epoch,
                self._own_host is not None,
                self._events.handle,
                self._on_new_epoch,
                self._report_tier_problems,
            )
            io_thread = event_loop.start_thread(self._events.loop, self._serve)
            self._is_serving = True
            pipeline = StepPipeline(self._runner, self._events.post)
            stopwatch.lap("threads")
            child.freeze_heap()
            memory_bytes = self._platform.held_memory_bytes()
            status = {"start_s": stopwatch.parts, "memory_bytes": memory_bytes, "rank_pids": ranks.pids}
            child.report_status({"ready": True, **status})
            captures = Captures(self._runner, ranks)
            self._launch_steps(pipeline, captures)
            captures.close()
        ranks.end_plans()
        pipeline.close()
        if self._exit_code:
            ranks.kill()  # they may wait for a part of a step that will not come
        self._events.post(events.StepsEnded())
        io_thread.join()
        ranks.close()
        return self._exit_code

    def _launch_steps(self, pipeline: StepPipeline, captures: Captures) -> None:
        self._worked_at = time.monotonic()
        while (item := self._next_item(pipeline, captures)) is not None:
            plan, came_at = item
            if not plan.is_probe:
                self._worked_at = time.monotonic()
            if (
                plan.epoch != self._session.epoch
            ):  # made for a scheduler that is gone, or before the scheduler lost this worker
                self._events.post(events.StepDropped(plan))
                continue
            try:
                captures.do_before(plan, lambda: not self._plans.empty())
                self._ranks.forward(plan)
            except OSError as error:
                self._events.post(events.StepFailed(plan, error))
                self.stop(EXIT_STEP_FAILED)
                return
            if not pipeline.launch(plan, came_at):
                self.stop(EXIT_STEP_FAILED)
                return

    def _next_item(self, pipeline: StepPipeline, captures: Captures) -> tuple[StepPlan, float] | None:
        """Wait for the next plan, or None for the end; capture graphs meanwhile.

        A plan that comes meanwhile waits for the part of a capture that is under way, and for no other. Where plans
        come faster than they are launched, each waits for one part, or the capture would never end.
        """
        while self._runner.lacks_graphs:
            idle_s = time.monotonic() - self._worked_at
            is_idle = idle_s >= _IDLE_S and pipeline.is_idle and self._plans.empty() and not self._transfers.is_busy
            try:
                if captures.do_part(is_idle):
                    wait_s = 0.0 if is_idle else _PART_PAUSE_S
                else:
                    wait_s = max(_MIN_WAIT_S, _IDLE_S - idle_s)
            except OSError:
                break  # the rank's watcher ends this process
            with contextlib.suppress(queue.Empty):
                return self._plans.get(wait_s > 0, wait_s or None)
        return self._plans.get()

    # --- any thread ------------------------------------------------------------------------------

    def stop(self, exit_code: int = 0) -> None:
        """Finish the steps in flight and return from `run`.

        While the model is being loaded, which may take minutes, the process ends here and now. A worker on other
        processes' memory does not: on a GPU, their steps in flight may not survive that.
        """
        self._exit_code = self._exit_code or exit_code
        if not self._is_serving and self._shared is None:
            self._exit_now(self._exit_code)
        if self._is_serving and self._runner.board is not None:
            self._runner.board.limit_waits(_MAX_LAST_WAIT_S)
        self._plans.put(None)

    def leave(self) -> None:
        """Ask the scheduler to dismiss this worker when its requests are done; at the second call, `stop`."""
        if self._wants_to_leave or not self._is_serving:
            self.stop()
        self._wants_to_leave = True

    def _on_rank_lost(self, why: str) -> None:
        """End the process here and now, in a watcher's thread: the main thread may wait for the lost rank forever."""
        logger.error("%s; exiting", why)
        child.report_status({"error": why})
        self._exit_now(EXIT_RANK_LOST)

    def _exit_now(self, exit_code: int) -> None:
        self._kill_ranks()
        child.exit_now(exit_code)

    def _report_event(self, kind: EventKind, subject: str, text: str) -> None:
        """Report an event to the scheduler, from any thread."""
        subject = f"{subject} of {self.instance.instance_id}"
        log_event(kind, subject, text)
        self._events.post(ReportEvent(kind=kind, subject=subject, text=text))

    # --- event loop thread -----------------------------------------------------------------------

    def _on_event(self, event: events.WorkerEvent) -> None:
        match event:
            case events.RoundDone(result):
                self._rpc.send(result)
            case events.StepDone(plan, result):
                self._session.serves_as = plan.role or self._session.serves_as
                self._rpc.send(result)
                self._send_blocks(plan)
                self._unfinished.end(plan)
            case events.LayersStored(plan, group):
                self._send_blocks(plan, group)
            case events.StepDropped(plan):
                self._unfinished.end(plan)
            case events.StepFailed():
                self._rpc.send(event.result())
                self.stop(EXIT_STEP_FAILED)
            case events.StepsEnded():
                self._events.end()
            case events.TransferReplied(rank, reply):
                if reply.epoch == self._session.epoch:
                    self._joint_results.add(rank, reply)
            case events.BlocksCopied(rank, result):
                if result.epoch == self._session.epoch:
                    self._joint_copies.add(rank, result)
            case StoreBlocks() | LoadBlocks():
                self._session.is_used = True
                self._ranks.send(event)
                self._tiers.handle(event)
            case FindBlocks():
                self._tiers.find(event)
            case FoundBlocks():
                self._rpc.send(event)
            case events.RankFailed(rank, report):
                self._on_rank_failed(f"rank {rank}: {report.error}", report)
            case ReportEvent():
                self._rpc.send(event)
            case StepPlan():
                self._session.is_used = True
                self._unfinished.begin(event)
                self._plans.put((event, time.perf_counter()))
            case StepLost(step):
                self._ranks.send(event)
                assert self._runner.board is not None, "only workers with a board wait for each other's steps"
                self._runner.board.on_step_lost(step)
            case Shutdown(error):
                self.was_dismissed = True
                if error is not None:
                    logger.error("the system does not take this instance: %s", error)
                self.stop(0 if error is None else EXIT_REFUSED)
            case _:  # a TransferCommand
                self._session.is_used = True
                self._ranks.send(event)
                self._transfers.manager.handle(event)

    async def _serve(self) -> None:
        await self._ranks.open()
        await self._events.serve(
            self._watch_steps(),
            self._receive_commands(),
            self._ranks.serve(self._events.handle),
            self._watch_scheduler(),
        )
        self._rpc.send(Leaving(epoch=self._session.epoch))
        await self._tiers.leave()
        await self._transfers.leave()
        self._rpc.close()

    async def _receive_commands(self) -> None:
        try:
            await self._session.receive_commands()
        except HBServeError as error:
            self._fail(str(error))

    def _on_new_epoch(self) -> None:
        self._joint_results.clear()
        self._joint_copies.clear()

    def _report_tier_problems(self) -> None:
        while self._tiers.problems:
            self._report_event("tier_failed", "a KV tier", self._tiers.problems.pop())

    def _report(self, reply: TransferReply) -> None:
        self._events.handle(events.TransferReplied(0, reply))

    def _send_blocks(self, plan: StepPlan, group: int | None = None) -> None:
        if plan.epoch == self._session.epoch:
            self._transfers.send(plan.sends, group)

    def _on_joint_reply(self, reply: TransferReply) -> None:
        if isinstance(reply, LinkOpened) and reply.error is not None:
            self._fail(reply.error)
        else:
            self._rpc.send(reply)

    def _cancel_transfer(self, transfer_id: str) -> None:
        self._ranks.send(CancelTransfer(transfer_id=transfer_id))
        self._transfers.manager.cancel(transfer_id)

    def _fail(self, error: str) -> None:
        logger.error("%s; exiting", error)
        child.report_status({"error": error})  # if the start is not over yet
        self._rpc.send(InstanceFailed(instance_id=self.instance.instance_id, error=error))
        self.stop(EXIT_STEP_FAILED)

    def _on_rank_failed(self, error: str, report: StepResult | InstanceFailed) -> None:
        """Pass the report on and end the process: the main thread may wait for the failed rank forever."""
        logger.error("%s; exiting", error)
        self._rpc.send(msgspec.structs.replace(report, error=error))
        self._rpc.close()
        self._exit_now(EXIT_STEP_FAILED)

    async def _watch_scheduler(self) -> None:
        """Join again when no scheduler knows this worker any more; leave when the worker is to leave."""
        rpc = self.config.rpc
        leaving_since: float | None = None
        while True:
            now = time.monotonic()
            is_forgotten = now - self._session.last_ping > 2 * rpc.heartbeat_interval_s + 1.0
            if self._wants_to_leave:
                leaving_since = leaving_since or now
                if is_forgotten or now - leaving_since > rpc.drain_timeout_s:
                    self.stop()  # there is no scheduler to ask, or it has not dismissed this worker in time
                self._rpc.send(WantsToLeave(epoch=self._session.epoch))
            elif self._join_client is not None and is_forgotten:
                try:
                    await self._join_client.join_again()
                except HBServeError as error:
                    logger.error("%s", error)
                    self.stop(EXIT_REFUSED)
            await asyncio.sleep(_SCHEDULER_CHECK_INTERVAL_S)

    async def _watch_steps(self) -> None:
        """End the process when a step hangs: a step cannot be interrupted, a process can."""
        timeout_s = self.config.rpc.step_timeout_s
        await self._unfinished.wait_for_hung_step(timeout_s)
        logger.error("a step did not end within %g s; exiting", timeout_s)
        self._exit_now(EXIT_STEP_HUNG)


GpuInstance = WorkerProcess  # the name that the design documents use
