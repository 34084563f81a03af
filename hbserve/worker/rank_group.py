"""Rank 0's side of its instance's other ranks: it starts, commands, watches and ends them.

A comment above each group of methods names the thread that calls them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import msgspec

from hbserve.config import Config, InstanceConfig
from hbserve.errors import StartupError
from hbserve.messages.rank import BeginEpoch, CaptureGraph, EpochBegun, RankCommand, RankReply, RankWork, Standby
from hbserve.messages.tiers import HostMemory, TierResult
from hbserve.messages.transfer import Peer
from hbserve.messages.worker import InstanceFailed, StepPlan, StepResult
from hbserve.process import child
from hbserve.process.parent import ChildProcess
from hbserve.rpc.rank_channel import RankLine
from hbserve.worker.events import BlocksCopied, RankFailed, TransferReplied

if TYPE_CHECKING:
    from hbserve.engine.arenas import ArenaAttachment
    from hbserve.platform import Partition

EXIT_RANK_LOST = 72
_EXIT_TIMEOUT_S = 10.0
END_OF_PLANS = b""
"""On the line of plans: the rank finishes the plans before this one, and exits."""


class _Rank:
    """One other rank: its process, on standby at first, and rank 0's ends of the lines to it.

    The process is in the group of rank 0, so one signal can kill them all.
    """

    def __init__(self, number: int, orders: dict[str, Any], on_exit: Callable[[_Rank, int], None]) -> None:
        self.number = number
        self.ready = threading.Event()
        self.error: str | None = None
        plans, rank_plans = socket.socketpair()
        control, rank_control = socket.socketpair()
        self._inherited = (rank_plans, rank_control)
        plans_fd, control_fd = rank_plans.fileno(), rank_control.fileno()
        # All ranks inherit rank 0's status pipe: its parent sees the pipe's end only when all ranks have ended.
        status_fd = os.environ.get(child.STATUS_FD_VARIABLE)
        self.process = ChildProcess(
            f"rank {number}",
            "hbserve.worker.rank_process",
            orders | {"tp_rank": number, "plans_fd": plans_fd, "control_fd": control_fd},
            pass_fds=[plans_fd, control_fd] + ([] if status_fd is None else [int(status_fd)]),
            has_own_group=False,
            on_status=self._on_status,
            on_exit=lambda code: on_exit(self, code),
        )
        self.plans = Connection(plans.detach())
        self.control: RankLine[RankReply] = RankLine(control, RankReply)

    def start(self) -> None:
        """Start the process."""
        try:
            self.process.start()
        finally:
            for end in self._inherited:
                end.close()

    def _on_status(self, status: dict[str, Any]) -> None:
        self.error = status.get("error")
        if "ready" in status:
            self.ready.set()


class RankGroup:
    """The ranks 1, 2, ... of an instance; none if it has only one rank. They are on standby until `wake`.

    Args:
        size: how many ranks there are, with rank 0.
        name: of the instance, as far as it is known.
        how: what the ranks import on standby.
        on_lost: called in a watcher's thread with the reason when a rank ends on its own, or cannot start. The
            instance cannot serve any more then.
    """

    def __init__(self, size: int, name: str, how: Standby, on_lost: Callable[[str], None]) -> None:
        self.size = size
        self.on_lost = on_lost
        self._encoder = msgspec.msgpack.Encoder()
        self._num_plans = 0
        self._is_ending = False
        self._beginnings: dict[int, asyncio.Future[Peer]] = {}
        self.port = 0
        orders = {"name": name, "standby": msgspec.to_builtins(how)}
        self._ranks = [_Rank(number, orders, self._on_exit) for number in range(1, self.size)]
        for rank in self._ranks:
            rank.start()

    def wake(
        self,
        config: Config,
        instance: InstanceConfig,
        attachments: list[ArenaAttachment] | None,
        partition: Partition | None,
        host: HostMemory | None = None,
        defers_graphs: bool = False,
    ) -> None:
        """Send the ranks their second orders: what they are.

        Args:
            config: of the system.
            instance: whose ranks these are.
            attachments: to arenas that other processes hold, one per rank; None: each rank makes its own.
            partition: the share that each rank has of its device.
            host: memory of the host for KV blocks.
            defers_graphs: see `hbserve.engine.model_runner.ModelRunner`.
        """
        if not self._ranks:
            return
        # Rank 0 listens before a rank looks for it, and on the loopback interface only.
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        orders = {
            "config": msgspec.to_builtins(config),
            "instance": msgspec.to_builtins(instance),
            "port": self.port,
            "partition": None if partition is None else dataclasses.asdict(partition),
            "host": msgspec.to_builtins(host),
            "defers_graphs": defers_graphs,
        }
        for rank in self._ranks:
            attachment = None if attachments is None else msgspec.to_builtins(attachments[rank.number])
            rank.process.send(orders | {"attachment": attachment})  # False if it has ended, which its watcher reports

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks from 1 on."""
        return [rank.process.pid for rank in self._ranks]

    def take_listener(self) -> int | None:
        """Give the caller the socket that listens on `port`, where the ranks meet: a descriptor; None for one rank."""
        return self._listener.detach() if self._ranks else None

    # --- main thread -----------------------------------------------------------------------------

    def wait_ready(self, deadline: float) -> None:
        """Wait until every rank has loaded its part of the model.

        Args:
            deadline: on the monotonic clock.

        Raises:
            StartupError: at the deadline.
        """
        for rank in self._ranks:
            if not rank.ready.wait(max(0.0, deadline - time.monotonic())):
                raise StartupError(f"rank {rank.number} was not ready in time (rpc.start_timeout_s)")

    def forward(self, plan: StepPlan) -> None:
        """Have the other ranks launch a plan. Call this before rank 0 launches the plan itself, which waits for them.

        Raises:
            OSError: if a rank is gone.
        """
        self._send_work(plan)
        self._num_plans += 1

    def capture(self, graph: CaptureGraph) -> None:
        """Have the other ranks capture graphs, after the plans so far; as `forward`."""
        self._send_work(graph)

    def _send_work(self, work: RankWork) -> None:
        if self._ranks:
            payload = self._encoder.encode(work)
            for rank in self._ranks:
                rank.plans.send_bytes(payload)

    def end_plans(self) -> None:
        """Have the other ranks finish and exit."""
        self._is_ending = True
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.plans.send_bytes(END_OF_PLANS)

    def close(self) -> None:
        """Wait for the other ranks to exit, and kill those that do not."""
        deadline = time.monotonic() + _EXIT_TIMEOUT_S
        for rank in self._ranks:
            rank.process.wait_exit(max(0.0, deadline - time.monotonic()))
        self.kill()
        for rank in self._ranks:
            rank.process.join()

    # --- any thread ------------------------------------------------------------------------------

    def kill(self) -> None:
        """Kill the other ranks; when this returns, their processes have ended."""
        self._is_ending = True
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.wait_exit(_EXIT_TIMEOUT_S)

    # --- watchers' threads -----------------------------------------------------------------------

    def _on_exit(self, rank: _Rank, code: int) -> None:
        if not self._is_ending:
            self.on_lost(rank.error or f"rank {rank.number} ended with exit code {code}")

    # --- event loop thread -----------------------------------------------------------------------

    async def serve(self, on_event: Callable[[TransferReplied | BlocksCopied | RankFailed], None]) -> None:
        """Call ``on_event`` with what the ranks report, until all of them are gone."""

        async def listen(rank: _Rank) -> None:
            while True:
                try:
                    reply = await rank.control.receive()
                except ConnectionError:
                    return  # its watcher reports the reason
                match reply:
                    case EpochBegun(peer):
                        self._beginnings[rank.number].set_result(peer)
                    case StepResult() | InstanceFailed():
                        on_event(RankFailed(rank.number, reply))
                    case TierResult():
                        on_event(BlocksCopied(rank.number, reply))
                    case _:
                        on_event(TransferReplied(rank.number, reply))

        await asyncio.gather(*(listen(rank) for rank in self._ranks))

    async def open(self) -> None:
        """Attach to the running event loop. Call this before any other method of this thread."""
        for rank in self._ranks:
            await rank.control.open()

    def send(self, command: RankCommand) -> None:
        """Send a command to every other rank."""
        for rank in self._ranks:
            rank.control.send(command)

    async def begin_epoch(self, epoch: int, timeout_s: float) -> list[Peer]:
        """Have the other ranks begin an epoch, and return where each of them receives KV.

        Raises:
            StartupError: if a rank does not answer in time.
        """
        loop = asyncio.get_running_loop()
        self._beginnings = {rank.number: loop.create_future() for rank in self._ranks}
        self.send(BeginEpoch(epoch=epoch, num_plans=self._num_plans))
        try:
            async with asyncio.timeout(timeout_s):
                return [await self._beginnings[rank.number] for rank in self._ranks]
        except TimeoutError:
            silent = [str(number) for number, future in self._beginnings.items() if not future.done()]
            raise StartupError(f"rank {', '.join(silent)} did not begin anew within {timeout_s:g} s") from None
