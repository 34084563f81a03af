"""The worker's session with the scheduler that it obeys, and its epoch. Runs in the event loop's thread.

An epoch begins when another scheduler pings, or one that does not know the present epoch. The worker then forgets
everything, introduces itself, and drops what was sent to it before. If several schedulers ping, it obeys the one that
was started last.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

import msgspec

from hbserve.config import Config, InstanceConfig
from hbserve.messages.transfer import Peer
from hbserve.messages.worker import Hello, Ping, Pong, StepLost, Superseded
from hbserve.rpc.instance_line import RpcServer
from hbserve.worker.events import WorkerEvent
from hbserve.worker.loaded_rank import LoadedRank
from hbserve.worker.rank_group import RankGroup
from hbserve.worker.step_pipeline import UnfinishedSteps

logger = logging.getLogger(__name__)


class SchedulerSession:
    """Obeys one scheduler at a time, and passes its commands on.

    Args:
        ranks: the other ranks, which begin each epoch too.
        arena_epoch: of arenas that another process holds; None: the worker has its own, which end with the epoch.
        owns_host: whether the memory of the host for KV blocks is this worker's.
        handle: called with each command of the scheduler that is obeyed, but for pings.
        on_new_epoch: called when an epoch begins, after the last work of the epoch before.
        on_introduced: called when the scheduler has been sent a `Hello`.

    Attributes:
        epoch: number of the present epoch; 0: none has begun. Any thread may read it.
        is_used: whether the scheduler has sent anything for this epoch that the worker must forget before the next.
        serves_as: role that the worker has now.
        last_ping: when the scheduler that is obeyed last sent a ping, on the monotonic clock.
    """

    def __init__(
        self,
        config: Config,
        instance: InstanceConfig,
        rpc: RpcServer,
        rank: LoadedRank,
        ranks: RankGroup,
        unfinished: UnfinishedSteps,
        arena_epoch: int | None,
        owns_host: bool,
        handle: Callable[[WorkerEvent], None],
        on_new_epoch: Callable[[], None],
        on_introduced: Callable[[], None],
    ) -> None:
        self._config, self._instance = config, instance
        self._rpc = rpc
        self._rank, self._ranks = rank, ranks
        self._unfinished = unfinished
        self._arena_epoch, self._owns_host = arena_epoch, owns_host
        self._handle = handle
        self._on_new_epoch, self._on_introduced = on_new_epoch, on_introduced
        self.epoch = 0
        self.is_used = False
        self.serves_as = instance.instance_type
        self.last_ping = time.monotonic()
        self._scheduler_epoch = 0
        self._peers: list[Peer] = []

    async def receive_commands(self) -> None:
        """Handle commands in order, for ever. A `Ping` may begin an epoch, and later commands wait for that.

        Raises:
            HBServeError: if an epoch cannot begin. It has no transfers then, so no later command can be obeyed.
        """
        self.last_ping = time.monotonic()
        while True:
            peer, command = await self._rpc.receive()
            if isinstance(command, Ping):
                await self._on_ping(peer, command)
            elif self._rpc.is_answering(peer):
                self._handle(command)
            else:
                logger.error("dropped a %s of a peer that has sent no Ping", type(command).__name__)

    async def _on_ping(self, peer: bytes, ping: Ping) -> None:
        silence_s = time.monotonic() - self.last_ping
        # A silent newer scheduler may have ended. Or the clock, which orders schedulers, has been put back.
        if ping.scheduler_epoch < self._scheduler_epoch and silence_s < self._config.rpc.heartbeat_timeout_s:
            self._rpc.send_to(peer, Superseded(scheduler_epoch=self._scheduler_epoch))
            return
        self._rpc.answer_to(peer)
        self.last_ping = time.monotonic()
        if ping.scheduler_epoch == self._scheduler_epoch and ping.known_epoch == self.epoch:
            self._rpc.send(Pong(epoch=self.epoch))
            return
        is_another = ping.scheduler_epoch != self._scheduler_epoch
        self._scheduler_epoch = ping.scheduler_epoch
        if is_another or self.is_used:
            await self._begin_epoch(is_another)
        self._send_hello()

    async def _begin_epoch(self, for_another: bool) -> None:
        """Forget everything, as soon as nothing of the old epoch can touch the arena any more.

        Args:
            for_another: the scheduler of the old epoch has ended, or is not obeyed any more.
        """
        self.epoch = time.time_ns()
        # The main thread drops plans of the old epoch from here on; launched steps finish. They must not wait for
        # steps of other workers: the old scheduler may have ended before it sent those.
        for step in self._unfinished.awaited if for_another else ():
            self._handle(StepLost(step=step))
        await self._unfinished.wait_until_none()
        await self._rank.tiers.begin_epoch(self.epoch)
        peer = await self._rank.transfers.begin_epoch(self.epoch)
        self._peers = [peer, *await self._ranks.begin_epoch(self.epoch, self._config.rpc.step_timeout_s)]
        self._on_new_epoch()
        self.is_used = False

    def _send_hello(self) -> None:
        runner, layout = self._rank.runner, self._rank.runner.layout
        self._rpc.send(
            Hello(
                instance_id=self._instance.instance_id,
                role=self._instance.instance_type,
                serves_as=self.serves_as,
                epoch=self.epoch,
                arena_epoch=self.epoch if self._arena_epoch is None else self._arena_epoch,
                pid=os.getpid(),
                model=self._rank.model_fingerprint,
                dtype=str(runner.dtype).removeprefix("torch."),
                kv_dtype=str(layout.dtype).removeprefix("torch."),
                weights=runner.spec.weights_name,
                num_blocks=runner.num_blocks,
                block_size=layout.block_size,
                block_bytes=layout.block_bytes * self._ranks.size,
                num_layers=layout.num_stored_layers,
                head_bytes=layout.block_bytes // layout.num_kv_heads,
                max_model_len=runner.max_model_len,
                vocab_size=runner.spec.vocab_size,
                device=self._rank.platform.describe(),
                peers=self._peers,
                one_sided=self._rank.transfers.manager.one_sided,
                has_eagle_head=runner.has_eagle_head,
                tiers=[
                    msgspec.structs.replace(info, is_own=info.name == "host" and self._owns_host)
                    for info in self._rank.tiers.infos
                ],
            )
        )
        self._on_introduced()
