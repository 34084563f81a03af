"""The process of an instance's rank 0: plans in, results out.

Three threads: the main one launches steps, one waits for their results (on a GPU they come later),
and one runs the event loop for RPC and KV transfers, so that heartbeats and transfers go on while a
step computes. With tensor parallelism the other ranks are children of this process, and live and
die with it: the scheduler sees one instance.

An instance keeps nothing that the scheduler could not give it again: a scheduler that does not know
its epoch gets a new one, with empty tables.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from hbserve.config import Config, InstanceConfig
from hbserve.errors import HBServeError
from hbserve.kv_transfer.joint_results import JointResults
from hbserve.messages.rank import EpochBegun, RankReply, Standby
from hbserve.messages.transfer import CancelTransfer, LinkClosed, LinkOpened, Peer, TransferReply, TransferResult
from hbserve.messages.worker import (
    Hello,
    InstanceCommand,
    InstanceFailed,
    Leaving,
    Ping,
    Pong,
    Shutdown,
    StepLost,
    StepPlan,
    StepResult,
    WantsToLeave,
)
from hbserve.process import child, event_loop
from hbserve.process.stopwatch import Stopwatch
from hbserve.rpc.cluster_key import ClusterKey
from hbserve.rpc.instance_line import RpcServer, bind_address
from hbserve.worker.join_client import JoinClient
from hbserve.worker.loaded_rank import loaded_rank
from hbserve.worker.rank_group import RankGroup
from hbserve.worker.step_pipeline import StepPipeline, UnfinishedSteps, failed_result

if TYPE_CHECKING:
    from hbserve.engine.arenas import ArenaAttachment
    from hbserve.platform import Partition

logger = logging.getLogger(__name__)

EXIT_STEP_FAILED = 70
EXIT_STEP_HUNG = 71
EXIT_RANK_LOST = 72
EXIT_REFUSED = 1

_SCHEDULER_CHECK_INTERVAL_S = 0.25
_LAST_WAIT_S = 5.0
"""For another worker's step, when this process is to end: that worker may have been killed, and the scheduler too."""


@dataclass(frozen=True, kw_only=True)
class SharedDevice:
    """What a worker has that does not have its device for itself.

    Attributes:
        attachments: to arenas that other processes hold, one per rank.
        partition: its share of the device.
        ranks: its other ranks, asleep.
        stopwatch: running since it was woken.
    """

    attachments: list[ArenaAttachment]
    partition: Partition
    ranks: RankGroup
    stopwatch: Stopwatch = field(default_factory=Stopwatch)


class WorkerProcess:
    """One instance of the model, listening for its scheduler.

    Args:
        config: of the system.
        instance: which of its instances this is.
        address: where to listen for the scheduler.
        shared: None: it has its own arenas, its device for itself, and starts its other ranks.
        join_client: in a system that it has joined; None: the system's configuration has it.

    Attributes:
        was_dismissed: the scheduler has told it to end.
    """

    def __init__(
        self,
        config: Config,
        instance: InstanceConfig,
        address: str,
        shared: SharedDevice | None = None,
        join_client: JoinClient | None = None,
    ) -> None:
        self.config = config
        self.instance = instance
        self.was_dismissed = False
        self._join_client = join_client
        self._wants_to_leave = self._is_serving = False
        self._kill_ranks: Callable[[], None] = lambda: None
        self._shared = shared
        self._rpc = RpcServer(bind_address(instance, address), ClusterKey.of(config))
        self._peers: list[Peer] = []
        self._plans: queue.SimpleQueue[tuple[StepPlan, float] | None] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._scheduler_epoch = 0
        self._epoch = 0
        self._used = False  # whether the scheduler has put anything into this epoch
        self._unfinished = UnfinishedSteps()
        self._stop_io = asyncio.Event()
        self._exit_code = 0

    def run(self) -> int:
        """Load the model and serve until told to stop; returns the exit code.

        Raises:
            HBServeError: if the model cannot be served as configured.
        """
        started = time.monotonic()
        shared = self._shared
        stopwatch = Stopwatch() if shared is None else shared.stopwatch
        if shared is None:
            attachments = partition = None
            how = Standby(model=self.config.model.path, on_gpu=False, yields=False)
            ranks = RankGroup(self.instance.num_ranks, self.instance.instance_id, how, self._on_rank_lost)
        else:
            attachments, partition, ranks = shared.attachments, shared.partition, shared.ranks
            ranks.on_lost = self._on_rank_lost
        self._ranks, self._kill_ranks = ranks, ranks.kill
        ranks.wake(self.config, self.instance, attachments, partition)
        stopwatch.lap("wake")
        with loaded_rank(
            self.config,
            self.instance,
            0,
            ranks.port,
            ranks.take_listener(),
            lambda reply: self._on_transfer_reply(0, reply),
            None if attachments is None else attachments[0],
            partition,
            stopwatch,
        ) as rank:
            self._platform, self._runner, self._transfers = rank.platform, rank.runner, rank.transfers
            ranks.wait_ready(started + self.config.rpc.start_timeout_s)
            stopwatch.lap("other_ranks")
            logger.info(
                "ready in %.1f s: %s on %s, %d KV blocks of %d tokens",
                time.monotonic() - started,
                self.instance.instance_type,
                self._platform.describe(),
                self._runner.num_blocks,
                self._runner.layout.block_size,
            )
            self._model = rank.model_fingerprint
            self._joint_results = JointResults(ranks.size, self._on_joint_reply, self._cancel_transfer)
            io_thread = event_loop.start_thread(self._loop, self._serve)
            self._is_serving = True
            pipeline = StepPipeline(self._runner, self._on_result, self._on_layers_stored, self._on_step_failed)
            stopwatch.lap("threads")
            child.freeze_heap()
            child.report_status(
                {
                    "ready": True,
                    "start_s": stopwatch.parts,
                    "memory_bytes": self._platform.held_memory_bytes(),
                    "rank_pids": self._ranks.pids,
                }
            )
            self._launch_steps(pipeline)
        ranks.end_plans()
        pipeline.close()
        if self._exit_code:
            ranks.kill()  # they may wait for a part of a step that will not come
        self._loop.call_soon_threadsafe(self._stop_io.set)
        io_thread.join()
        ranks.close()
        return self._exit_code

    def stop(self, exit_code: int = 0) -> None:
        """Finish what is in flight and return from `run`. Callable from any thread.

        Where nothing has begun yet the process ends here and now: loading a model may take minutes. But not
        with memory that others work on: on a GPU, what they have in flight may not survive it.
        """
        self._exit_code = self._exit_code or exit_code
        if not self._is_serving and self._shared is None:
            self._die(self._exit_code)
        if self._is_serving and self._runner.board is not None:
            self._runner.board.end_waits_in(_LAST_WAIT_S)
        self._plans.put(None)

    def leave(self) -> None:
        """Have the scheduler let it go when its requests are done; at the second call, `stop`. Callable as that."""
        if self._wants_to_leave or not self._is_serving:
            self.stop()
        self._wants_to_leave = True

    # --- main thread -----------------------------------------------------------------------------

    def _launch_steps(self, pipeline: StepPipeline) -> None:
        while (item := self._plans.get()) is not None:
            plan, came_at = item
            if plan.epoch != self._epoch:  # made for a scheduler that has gone, or before it lost us
                self._loop.call_soon_threadsafe(self._unfinished.end, plan)
                continue
            try:
                self._ranks.forward(plan)
            except OSError as error:
                self._on_step_failed(plan, error)
                return
            if not pipeline.launch(plan, came_at):
                return

    # --- collector thread, and main thread where a launch fails ----------------------------------

    def _on_result(self, plan: StepPlan, result: StepResult) -> None:
        self._loop.call_soon_threadsafe(self._on_step_done, plan, result)

    def _on_layers_stored(self, plan: StepPlan, group: int) -> None:
        self._loop.call_soon_threadsafe(self._send_blocks, plan, group)

    def _on_step_failed(self, plan: StepPlan, error: Exception) -> None:
        self._loop.call_soon_threadsafe(self._rpc.send, failed_result(plan, repr(error)))
        self.stop(EXIT_STEP_FAILED)

    # --- watchers' threads -----------------------------------------------------------------------

    def _on_rank_lost(self, why: str) -> None:
        """The main thread may wait for the lost rank for good, so the process ends here and now."""
        logger.error("%s; exiting", why)
        child.report_status({"error": why})
        self._die(EXIT_RANK_LOST)

    def _die(self, exit_code: int) -> None:
        self._kill_ranks()
        child.exit_now(exit_code)

    # --- event loop thread -----------------------------------------------------------------------

    async def _serve(self) -> None:
        self._last_ping = time.monotonic()
        await self._ranks.open()
        tasks = [
            asyncio.create_task(task)
            for task in (
                self._watch_steps(),
                self._serve_commands(),
                self._ranks.serve(self._on_rank_reply),
                self._watch_scheduler(),
            )
        ]
        stopped = asyncio.create_task(self._stop_io.wait())
        done, _ = await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopped}:
            task.result()  # raises: none of them ends on its own otherwise
        self._rpc.send(Leaving(epoch=self._epoch))
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._transfers.leave()
        self._rpc.close()

    async def _serve_commands(self) -> None:
        while True:
            try:
                peer, command = await self._rpc.receive()
            except msgspec.DecodeError as error:
                logger.error("dropped a message that is no command: %s", error)
                continue
            try:
                await self._on_command(peer, command)
            except HBServeError as error:
                logger.error("%s", error)
                self._rpc.send(InstanceFailed(instance_id=self.instance.instance_id, error=str(error)))
                self.stop(EXIT_STEP_FAILED)

    async def _on_command(self, peer: bytes, command: InstanceCommand) -> None:
        if isinstance(command, Ping):
            await self._on_ping(peer, command)
        elif isinstance(command, StepPlan):
            self._used = True
            self._unfinished.begin(command)
            self._plans.put((command, time.perf_counter()))
        elif isinstance(command, StepLost):
            self._ranks.send(command)
            assert self._runner.board is not None, "a worker that is alone waits for nobody"
            self._runner.board.note_lost(command.step)
        elif isinstance(command, Shutdown):
            self.was_dismissed = True
            if command.error is not None:
                logger.error("the system does not take this instance: %s", command.error)
            self.stop(0 if command.error is None else EXIT_REFUSED)
        else:
            self._used = True
            self._ranks.send(command)
            self._transfers.manager.handle(command)

    async def _on_ping(self, peer: bytes, ping: Ping) -> None:
        self._rpc.answer_to(peer)
        self._last_ping = time.monotonic()
        if ping.scheduler_epoch == self._scheduler_epoch and ping.known_epoch == self._epoch:
            self._rpc.send(Pong(epoch=self._epoch))
            return
        if ping.scheduler_epoch != self._scheduler_epoch or self._used:
            await self._begin_epoch()
            self._scheduler_epoch = ping.scheduler_epoch
        self._hello()

    async def _begin_epoch(self) -> None:
        """Forget everything; only when nothing of the old epoch can touch the arena any more."""
        self._epoch = time.time_ns()
        await self._unfinished.wait_until_none()  # plans of the old epoch are dropped by now, the launched ones finish
        mine = await self._transfers.begin_epoch(self._epoch)
        self._peers = [mine, *await self._ranks.begin_epoch(self._epoch, self.config.rpc.step_timeout_s)]
        self._joint_results.clear()
        self._used = False

    def _hello(self) -> None:
        runner = self._runner
        self._rpc.send(
            Hello(
                instance_id=self.instance.instance_id,
                role=self.instance.instance_type,
                epoch=self._epoch,
                arena_epoch=self._epoch if self._shared is None else self._shared.attachments[0].epoch,
                pid=os.getpid(),
                model=self._model,
                dtype=str(runner.layout.dtype).removeprefix("torch."),
                num_blocks=runner.num_blocks,
                block_size=runner.layout.block_size,
                block_bytes=runner.layout.block_bytes * self._ranks.size,
                num_layers=runner.layout.num_layers,
                head_bytes=runner.layout.block_bytes // runner.layout.num_kv_heads,
                max_model_len=runner.max_model_len,
                vocab_size=runner.spec.vocab_size,
                device=self._platform.describe(),
                peers=self._peers,
                one_sided=self._transfers.manager.one_sided,
            )
        )

    def _on_step_done(self, plan: StepPlan, result: StepResult) -> None:
        self._rpc.send(result)
        self._send_blocks(plan)
        self._unfinished.end(plan)

    def _send_blocks(self, plan: StepPlan, group: int | None = None) -> None:
        if plan.epoch == self._epoch:
            self._transfers.send(plan.sends, group)

    def _on_transfer_reply(self, number: int, reply: TransferReply) -> None:
        if reply.epoch == self._epoch:
            self._joint_results.add(number, reply)

    def _on_joint_reply(self, reply: TransferReply) -> None:
        if isinstance(reply, LinkOpened) and reply.error is not None:
            logger.error("%s; exiting", reply.error)
            self._rpc.send(InstanceFailed(instance_id=self.instance.instance_id, error=reply.error))
            self.stop(EXIT_STEP_FAILED)
        else:
            self._rpc.send(reply)

    def _cancel_transfer(self, transfer_id: str) -> None:
        self._ranks.send(CancelTransfer(transfer_id=transfer_id))
        self._transfers.manager.cancel(transfer_id)

    def _on_rank_reply(self, number: int, reply: RankReply) -> None:
        if isinstance(reply, TransferResult | LinkOpened | LinkClosed):
            self._on_transfer_reply(number, reply)
            return
        # A failed step, or an epoch that cannot begin: the main thread may wait for that rank for good.
        assert not isinstance(reply, EpochBegun)
        error = f"rank {number}: {reply.error}"
        logger.error("%s; exiting", error)
        self._rpc.send(msgspec.structs.replace(reply, error=error))
        self._rpc.close()
        self._die(EXIT_STEP_FAILED)

    async def _watch_scheduler(self) -> None:
        """Joins again where no scheduler knows it any more, and leaves when that is wanted."""
        rpc = self.config.rpc
        leaving_since: float | None = None
        while True:
            now = time.monotonic()
            is_forgotten = now - self._last_ping > 2 * rpc.heartbeat_interval_s + 1.0
            if self._wants_to_leave:
                leaving_since = leaving_since or now
                if is_forgotten or now - leaving_since > rpc.drain_timeout_s:
                    self.stop()  # nobody is there to ask, or has let it go in time
                self._rpc.send(WantsToLeave(epoch=self._epoch))
            elif self._join_client is not None and is_forgotten:
                try:
                    await self._join_client.renew()
                except HBServeError as error:
                    logger.error("%s", error)
                    self.stop(EXIT_REFUSED)
            await asyncio.sleep(_SCHEDULER_CHECK_INTERVAL_S)

    async def _watch_steps(self) -> None:
        """A step that never ends cannot be interrupted; the process can."""
        timeout_s = self.config.rpc.step_timeout_s
        await self._unfinished.watch(timeout_s)
        logger.error("a step did not end within %g s; exiting", timeout_s)
        self._die(EXIT_STEP_HUNG)


GpuInstance = WorkerProcess  # the name that the design documents use
