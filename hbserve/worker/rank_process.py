"""The process of a rank other than 0: its part of every plan and of every KV transfer.

It knows only rank 0: plans and commands come from there, and results of transfers go there. When rank 0 is gone the
process exits at once, since its results could not reach anything. It has the same threads as rank 0's process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import msgspec

from hbserve.config import Config, InstanceConfig
from hbserve.errors import HBServeError
from hbserve.messages.rank import BeginEpoch, CaptureGraph, EpochBegun, RankCommand, RankWork, Standby
from hbserve.messages.tiers import HostMemory, LoadBlocks, StoreBlocks
from hbserve.messages.transfer import TransferReply
from hbserve.messages.worker import InstanceFailed, StepLost, StepPlan
from hbserve.process import child, event_loop
from hbserve.rpc.rank_channel import RankLine
from hbserve.worker.events import (
    BlocksCopied,
    EventQueue,
    LayersStored,
    RankEvent,
    RoundDone,
    StepDone,
    StepFailed,
    StepsEnded,
    TransferReplied,
)
from hbserve.worker.loaded_rank import loaded_rank
from hbserve.worker.rank_group import END_OF_PLANS
from hbserve.worker.standby import stand_by
from hbserve.worker.step_pipeline import StepPipeline

if TYPE_CHECKING:
    from hbserve.engine.arenas import ArenaAttachment
    from hbserve.platform import Partition

logger = logging.getLogger(__name__)

EXIT_FAILED = 70
_FAREWELL_S = 30.0


class RankWorker:
    """One rank of an instance, commanded by rank 0.

    Args:
        config: of the system.
        instance: whose rank this is.
        tp_rank: its number, from 1.
        attachment: to arenas that another process holds; None: the rank makes its own.
        partition: its share of the device.
        plans: where encoded plans come from.
        control: this rank's end of the line to rank 0's event loop.
        host: memory of the host for KV blocks.
        defers_graphs: see `hbserve.engine.model_runner.ModelRunner`.
    """

    def __init__(
        self,
        config: Config,
        instance: InstanceConfig,
        tp_rank: int,
        attachment: ArenaAttachment | None,
        partition: Partition | None,
        plans: Connection,
        control: socket.socket,
        host: HostMemory | None,
        defers_graphs: bool,
    ) -> None:
        self._defers_graphs = defers_graphs
        self.config, self.instance, self.tp_rank = config, instance, tp_rank
        self._attachment, self._partition, self._host = attachment, partition, host
        self._plans = plans
        self._line: RankLine[RankCommand] = RankLine(control, RankCommand)
        self._events: EventQueue[RankEvent] = EventQueue(self._on_event)
        self._epoch = 0
        self._num_done = 0
        self._step_done = asyncio.Event()

    def run(self, port: int) -> int:
        """Load this rank's part of the model and serve to the end; return the exit code.

        Args:
            port: where the ranks of the instance meet.

        Raises:
            HBServeError: if the model cannot be served as configured.
        """
        with loaded_rank(
            self.config,
            self.instance,
            self.tp_rank,
            port,
            None,
            self._report,
            self._attachment,
            self._partition,
            host=self._host,
            report_copy=lambda result: self._events.post(BlocksCopied(self.tp_rank, result)),
            defers_graphs=self._defers_graphs,
        ) as rank:
            self._transfers, self._tiers, self._board = rank.transfers, rank.tiers, rank.runner.board
            io_thread = event_loop.start_thread(self._events.loop, self._serve)
            pipeline = StepPipeline(rank.runner, self._events.post)
            child.freeze_heap()
            child.report_status({"ready": True})
            decoder = msgspec.msgpack.Decoder(RankWork)
            while (payload := self._plans.recv_bytes()) != END_OF_PLANS:
                work = decoder.decode(payload)
                if isinstance(work, CaptureGraph):
                    for _ in rank.runner.capture(work):
                        pass
                elif not pipeline.launch(work):
                    threading.Event().wait(_FAREWELL_S)  # rank 0 gets the failure, and ends this process
                    return EXIT_FAILED
        pipeline.close()
        self._events.post(StepsEnded())
        io_thread.join()
        return 0

    # --- event loop thread -----------------------------------------------------------------------

    def _on_event(self, event: RankEvent) -> None:
        match event:
            case RoundDone():
                pass  # rank 0 reports it
            case StepDone(plan):
                self._num_done += 1
                self._step_done.set()
                self._send_blocks(plan)
            case LayersStored(plan, group):
                self._send_blocks(plan, group)
            case StepFailed():
                self._line.send(event.result())
            case StepsEnded():
                self._events.end()
            case TransferReplied(_, reply):
                self._line.send(reply)
            case BlocksCopied(_, result):
                self._line.send(result)
            case StoreBlocks() | LoadBlocks():
                self._tiers.handle(event)
            case StepLost(step):
                assert self._board is not None, "only workers with a board wait for each other's steps"
                self._board.on_step_lost(step)
            case _:  # a TransferCommand
                self._transfers.manager.handle(event)

    async def _serve(self) -> None:
        await self._line.open()
        await self._events.serve(self._receive_commands())
        await self._tiers.leave()
        await self._transfers.leave()
        await self._line.close()

    async def _receive_commands(self) -> None:
        """Handle rank 0's commands in order. `BeginEpoch` waits for steps, and later commands wait for that."""
        while True:
            try:
                command = await self._line.receive()
            except ConnectionError:
                return  # rank 0 is gone, and the life line ends this process
            if isinstance(command, BeginEpoch):
                await self._begin_epoch(command)
            else:
                self._events.handle(command)

    async def _begin_epoch(self, command: BeginEpoch) -> None:
        while self._num_done < command.num_plans:
            self._step_done.clear()
            await self._step_done.wait()
        self._epoch = command.epoch
        await self._tiers.begin_epoch(command.epoch)
        try:
            peer = await self._transfers.begin_epoch(command.epoch)
        except HBServeError as error:
            logger.error("%s", error)
            self._line.send(InstanceFailed(instance_id=self.instance.instance_id, error=str(error)))
            return
        self._line.send(EpochBegun(peer=peer))

    def _report(self, reply: TransferReply) -> None:
        self._events.handle(TransferReplied(self.tp_rank, reply))

    def _send_blocks(self, plan: StepPlan, group: int | None = None) -> None:
        if plan.epoch == self._epoch:
            self._transfers.send(plan.sends, group)


def main() -> None:
    """Entry of the process that rank 0 starts."""
    orders = child.read_orders()
    for number in (signal.SIGTERM, signal.SIGINT):
        # A signal to the whole process group must not end the ranks that rank 0 needs to finish its steps.
        signal.signal(number, signal.SIG_IGN)
    tp_rank = orders["tp_rank"]
    child.set_process_title(f"hbserve-{orders['name']}-TP{tp_rank}")
    wake_up = stand_by(msgspec.convert(orders["standby"], Standby))
    child.watch_parent(lambda: os._exit(EXIT_FAILED))
    from hbserve.engine.arenas import ArenaAttachment
    from hbserve.platform import Partition

    config = msgspec.convert(wake_up["config"], Config)
    instance = msgspec.convert(wake_up["instance"], InstanceConfig)
    attachment, partition = wake_up["attachment"], wake_up["partition"]
    child.set_process_title(f"hbserve-{instance.instance_id}-TP{tp_rank}")
    child.configure_logging(config.logging, f"{instance.instance_id} TP{tp_rank}")
    worker = RankWorker(
        config,
        instance,
        tp_rank,
        None if attachment is None else msgspec.convert(attachment, ArenaAttachment),
        None if partition is None else Partition(**partition),
        Connection(orders["plans_fd"]),
        socket.socket(fileno=orders["control_fd"]),
        msgspec.convert(wake_up["host"], HostMemory | None),
        wake_up["defers_graphs"],
    )
    child.exit_after(lambda: worker.run(wake_up["port"]))


if __name__ == "__main__":
    main()
