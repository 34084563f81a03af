"""A worker process: plans in, results out.

Three threads: the main one launches steps, one waits for their results (on a GPU they come later),
and one runs the event loop for RPC and KV transfers, so that heartbeats and transfers go on while a
step computes. An instance keeps nothing that the scheduler could not give it again: a scheduler
that does not know its epoch gets a new one, with empty tables.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import signal
import threading
import time
from typing import TYPE_CHECKING

import msgspec

from hbserve.config import Config, InstanceConfig
from hbserve.errors import HBServeError
from hbserve.messages import (
    CancelTransfer,
    Hello,
    InstanceCommand,
    InstanceFailed,
    Leaving,
    Peer,
    Ping,
    Pong,
    ReceiveBlocks,
    StepPlan,
    StepResult,
)
from hbserve.pd_disagg import child
from hbserve.pd_disagg.kv_transfer.base import KVTransferBase, KVTransferContext
from hbserve.pd_disagg.kv_transfer.manager import KVTransferManager, make_backend
from hbserve.pd_disagg.rpc import RpcServer

if TYPE_CHECKING:
    from hbserve.engine.model_runner import ModelRunner, PendingStep

logger = logging.getLogger(__name__)

EXIT_STEP_FAILED = 70
EXIT_STEP_HUNG = 71


class GpuInstance:
    """One instance of the model, listening for its scheduler.

    Args:
        config: of the system.
        instance: which of its instances this is.
        address: where to listen for the scheduler.
    """

    def __init__(self, config: Config, instance: InstanceConfig, address: str) -> None:
        self.config = config
        self.instance = instance
        self._rpc = RpcServer(address)
        self._transfers: KVTransferManager  # made anew with every epoch, as is its backend
        self._backend: KVTransferBase
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._pending: queue.SimpleQueue[tuple[StepPlan, PendingStep] | None] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._scheduler_epoch = 0
        self._epoch = 0
        self._used = False  # whether the scheduler has put anything into this epoch
        self._unfinished: dict[tuple[int, int], float] = {}  # (epoch, step) of plans here -> when it became first
        self._idle = asyncio.Event()
        self._idle.set()
        self._exit_code = 0

    def run(self) -> int:
        """Load the model and serve until told to stop; returns the exit code.

        Raises:
            HBServeError: if the model cannot be served as configured.
        """
        import torch

        from hbserve.engine.model_runner import ModelRunner
        from hbserve.platform import make_platform

        started = time.monotonic()
        self._platform = make_platform(
            self.config.model.device,
            self.instance.gpu_id,
            self.instance.num_threads,
            len(self.config.gpu_instances),
        )
        self._platform.activate()
        with torch.inference_mode():
            self._runner: ModelRunner = ModelRunner(self.config, self.instance, self._platform)
            logger.info(
                "ready in %.1f s: %s on %s, %d KV blocks of %d tokens",
                time.monotonic() - started,
                self.instance.instance_type,
                self._platform.describe(),
                self._runner.num_blocks,
                self._runner.layout.block_size,
            )
            io_thread = threading.Thread(target=self._run_io, name="io")
            collector = threading.Thread(target=self._collect, name="collector")
            io_thread.start()
            collector.start()
            child.report_status({"ready": True})
            self._launch_steps()
        self._pending.put(None)
        collector.join()
        self._loop.call_soon_threadsafe(self._stop_io.set)
        io_thread.join()
        return self._exit_code

    def stop(self, exit_code: int = 0) -> None:
        """Finish what is in flight and return from `run`. Callable from any thread and from signal handlers."""
        self._exit_code = self._exit_code or exit_code
        self._plans.put(None)

    # --- main thread -----------------------------------------------------------------------------

    def _launch_steps(self) -> None:
        while (plan := self._plans.get()) is not None:
            if plan.epoch != self._epoch:  # made for a scheduler that has gone, or before it lost us
                self._loop.call_soon_threadsafe(self._step_is_over, plan)
                continue
            try:
                self._pending.put((plan, self._runner.launch(plan)))
            except Exception as error:
                self._fail_step(plan, error)
                return

    # --- collector thread ------------------------------------------------------------------------

    def _collect(self) -> None:
        while (item := self._pending.get()) is not None:
            plan, pending = item
            try:
                result = pending.result()
            except Exception as error:
                self._fail_step(plan, error)
                return
            self._loop.call_soon_threadsafe(self._on_step_done, plan, result)

    def _fail_step(self, plan: StepPlan, error: Exception) -> None:
        """A step that fails leaves the device in an unknown state: say so and exit."""
        logger.error("step %d failed", plan.step_id, exc_info=error)
        result = StepResult(
            epoch=plan.epoch, step_id=plan.step_id, token_ids=[], logprobs=None, busy_s=0.0, error=repr(error)
        )
        self._loop.call_soon_threadsafe(self._rpc.send, result)
        self.stop(EXIT_STEP_FAILED)

    # --- event loop thread -----------------------------------------------------------------------

    def _run_io(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException:
            logger.exception("the event loop failed; exiting")
            os._exit(1)
        self._loop.close()

    async def _serve(self) -> None:
        self._stop_io = asyncio.Event()
        watchdog = asyncio.create_task(self._watch_steps())
        commands = asyncio.create_task(self._serve_commands())
        await self._stop_io.wait()
        self._rpc.send(Leaving(epoch=self._epoch))
        for task in (commands, watchdog):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self._epoch:
            await self._transfers.cancel_all()
            await self._backend.stop()
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
            self._idle.clear()
            self._unfinished[command.epoch, command.step_id] = time.monotonic()
            self._plans.put(command)
        elif isinstance(command, ReceiveBlocks):
            self._used = True
            self._transfers.receive(command)
        elif isinstance(command, CancelTransfer):
            self._transfers.cancel(command.transfer_id)
        else:
            self.stop()

    async def _on_ping(self, peer: bytes, ping: Ping) -> None:
        self._rpc.answer_to(peer)
        if ping.scheduler_epoch == self._scheduler_epoch and ping.known_epoch == self._epoch:
            self._rpc.send(Pong(epoch=self._epoch))
            return
        if ping.scheduler_epoch != self._scheduler_epoch or self._used:
            await self._begin_epoch()
            self._scheduler_epoch = ping.scheduler_epoch
        self._hello()

    async def _begin_epoch(self) -> None:
        """Forget everything; only when nothing of the old epoch can touch the arena any more."""
        old, self._epoch = self._epoch, time.time_ns()
        await self._idle.wait()  # plans of the old epoch are dropped by now, the launched ones finish
        if old:
            await self._transfers.cancel_all()
            await self._backend.stop()
        transfer = self.config.kv_transfer
        assert self.instance.kv_rank is not None
        context = KVTransferContext(
            rank=self.instance.kv_rank,
            epoch=self._epoch,
            host=transfer.ip or self.instance.host,
            port=None if transfer.port is None else transfer.port + self.instance.kv_rank,
            device=self._platform.device,
            timeout_s=transfer.timeout_s,
            buffer_size=transfer.buffer_size,
        )
        self._backend = make_backend(transfer.backend, context)
        await self._backend.start()
        self._transfers = KVTransferManager(self._backend, self._runner.kv_blocks, self._rpc.send)
        self._used = False

    def _hello(self) -> None:
        runner = self._runner
        self._rpc.send(
            Hello(
                instance_id=self.instance.instance_id,
                role=self.instance.instance_type,
                epoch=self._epoch,
                pid=os.getpid(),
                num_blocks=runner.num_blocks,
                block_size=runner.layout.block_size,
                block_bytes=runner.layout.block_bytes,
                max_model_len=runner.max_model_len,
                vocab_size=runner.spec.vocab_size,
                device=self._platform.describe(),
                peer=Peer(rank=self._backend.context.rank, epoch=self._epoch, endpoint=self._backend.endpoint),
            )
        )

    def _on_step_done(self, plan: StepPlan, result: StepResult) -> None:
        self._rpc.send(result)
        if plan.epoch == self._epoch:
            for command in plan.sends:
                self._transfers.send(command)
        self._step_is_over(plan)

    def _step_is_over(self, plan: StepPlan) -> None:
        del self._unfinished[plan.epoch, plan.step_id]
        if self._unfinished:  # the clock of the next one starts now: it could not begin before
            first = next(iter(self._unfinished))
            self._unfinished[first] = time.monotonic()
        else:
            self._idle.set()

    async def _watch_steps(self) -> None:
        """A step that never ends cannot be interrupted; the process can."""
        timeout_s = self.config.rpc.step_timeout_s
        while True:
            await asyncio.sleep(min(timeout_s / 4, 5.0))
            first = next(iter(self._unfinished.values()), None)
            if first is not None and time.monotonic() - first > timeout_s:
                logger.error("a step did not end within %g s; exiting", timeout_s)
                os._exit(EXIT_STEP_HUNG)


def run_instance(config: Config, instance_id: str, address: str) -> int:
    """Run one instance in this process until SIGTERM or SIGINT; returns the exit code.

    Raises:
        HBServeError: if it cannot start.
    """
    instance = config.instance(instance_id)
    name = instance.instance_id
    child.set_process_title(f"hbserve-{name}-TP0")
    child.configure_logging(config.logging.level, name)
    worker = GpuInstance(config, instance, address)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    if child.STATUS_FD_VARIABLE in os.environ:
        child.watch_parent(worker.stop)
    return worker.run()


def main() -> None:
    """Entry of the process that a launcher starts."""
    orders = child.read_orders()
    config = msgspec.convert(orders["config"], Config)
    code = 1
    try:
        code = run_instance(config, orders["instance_id"], orders["address"])
    except HBServeError as error:
        child.report_status({"error": str(error)})
        logger.error("%s", error)
    child.exit_now(code)


if __name__ == "__main__":
    main()
