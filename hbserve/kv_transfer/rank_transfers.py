"""The KV transfers of one rank over the epochs of its instance. Runs in the rank process, in its event loop.

This module also chooses manager and backend by the name in the configuration.
"""

from __future__ import annotations

import asyncio

import torch

from hbserve.config import Config, InstanceConfig
from hbserve.errors import ConfigError, StartupError
from hbserve.kv_transfer.base import KVTransferContext
from hbserve.kv_transfer.block_parts import prepare_copies
from hbserve.kv_transfer.head_split import Route, Shard
from hbserve.kv_transfer.manager import KVTransferManager, Report
from hbserve.kv_transfer.one_sided.base import ArenaSharing
from hbserve.kv_transfer.one_sided.mooncake import MooncakeKVTransfer
from hbserve.kv_transfer.one_sided.shared_memory import SharedMemoryKVTransfer
from hbserve.kv_transfer.one_sided.transfers import DirectTransfers
from hbserve.kv_transfer.two_sided.staged_transfers import StagedTransfers, make_backend
from hbserve.kv_transfer.two_sided.torch_transfers import TorchTransfers
from hbserve.messages.transfer import Peer, ReceiveBlocks, SendBlocks


def make_manager(
    name: str,
    context: KVTransferContext,
    kv_blocks: torch.Tensor,
    report: Report,
    shard: Shard = Shard(),  # noqa: B008 - it is frozen
    sharing: ArenaSharing | None = None,
) -> KVTransferManager:
    """Make a manager with the backend that ``kv_transfer.backend`` names; it is not started yet.

    Args:
        sharing: needed for ``shm``.

    Raises:
        ConfigError: if the backend cannot be imported, or the arena cannot be shared.
    """
    if name == "mooncake":
        return DirectTransfers(MooncakeKVTransfer(context, kv_blocks), report, shard)
    if name == "shm":
        if sharing is None or sharing.handle is None:
            raise ConfigError("kv_transfer.backend: shm: this instance's KV arena cannot be shared")
        return DirectTransfers(SharedMemoryKVTransfer(context, kv_blocks, sharing), report, shard)
    if name == "nccl":
        return TorchTransfers(context, kv_blocks, report, shard)
    return StagedTransfers(make_backend(name, context), kv_blocks, report, shard)


class NoTransfers(KVTransferManager):
    """Manager of a system of one ``unified`` instance: no KV moves, so it listens nowhere and holds no buffers."""

    one_sided = False
    endpoint = ""

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def _send(self, command: SendBlocks, target: Peer, route: Route) -> float:
        raise AssertionError("a unified instance sends nothing")

    async def _receive(self, command: ReceiveBlocks, source: Peer, route: Route) -> None:
        raise AssertionError("a unified instance receives nothing")

    async def _open_receive_window(self, sources: list[Peer], routes: list[Route]) -> str:
        raise AssertionError("a unified instance has no links")

    async def _close_receive_window(self, sources: list[Peer], senders_done: bool) -> None:
        raise AssertionError("a unified instance has no links")


class RankTransfers:
    """Owner of the current epoch's transfer manager; each epoch gets a new one.

    Args:
        shard: number of the rank in its instance, and the KV heads that it holds.
        kv_blocks: the rank's arena as ``[block, byte]``, uint8.
        report: called with each reply, in the event loop.
        sharing: how the arena is opened to other processes of this host.
    """

    manager: KVTransferManager
    """Manager of the epoch that began last."""

    def __init__(
        self,
        config: Config,
        instance: InstanceConfig,
        shard: Shard,
        kv_blocks: torch.Tensor,
        report: Report,
        sharing: ArenaSharing,
    ) -> None:
        self._sharing = sharing
        assert instance.kv_rank is not None
        self._config, self._instance, self._shard = config.kv_transfer, instance, shard
        self._are_needed = config.mode != "unified" or len(config.gpu_instances) > 1  # roles may change
        self._rank = instance.kv_rank * config.max_ranks + shard.rank
        self._kv_blocks = kv_blocks
        if self._are_needed and config.kv_transfer.verify:
            prepare_copies(kv_blocks.shape[1], kv_blocks.device)
        self._report = report
        self._has_begun = False

    async def begin_epoch(self, epoch: int) -> Peer:
        """End the epoch before, begin a new one, and return the rank's new address.

        Raises:
            HBServeError: if the backend cannot be made or started.
        """
        await self.end_epoch()
        config = self._config
        context = KVTransferContext(
            rank=self._rank,
            epoch=epoch,
            host=self._instance.kv_ip or config.ip or self._instance.host,
            port=None if config.port is None else config.port + self._rank,
            device=self._kv_blocks.device,
            timeout_s=config.timeout_s,
            buffer_size=config.buffer_size // self._shard.size,
            host_is_given=(self._instance.kv_ip or config.ip) is not None,
            mooncake_protocol=config.mooncake_protocol,
            mooncake_device=config.mooncake_device,
        )
        manager: KVTransferManager
        if self._are_needed:
            manager = make_manager(config.backend, context, self._kv_blocks, self._report, self._shard, self._sharing)
        else:
            manager = NoTransfers(context, self._kv_blocks, self._report, self._shard)
        try:
            async with asyncio.timeout(config.timeout_s):
                await manager.start()
        except TimeoutError:
            raise StartupError(
                f"kv_transfer.backend {config.backend} did not start within {config.timeout_s:g} s"
            ) from None
        self.manager, self._has_begun = manager, True
        return Peer(rank=self._rank, epoch=epoch, endpoint=manager.endpoint)

    @property
    def is_busy(self) -> bool:
        """Whether a transfer is under way. Callable from any thread."""
        return self._has_begun and self.manager.is_busy

    def send(self, commands: list[SendBlocks], group: int | None) -> None:
        """Start the transfers of a group of layers, or (None) those that leave only when the whole step is done."""
        for command in commands:
            if group == (command.layers.index if command.layers.count > 1 else None):
                self.manager.send(command)

    async def end_epoch(self) -> None:
        """Cancel all transfers and stop the manager; nothing is written to the arena after this."""
        if self._has_begun:
            self._has_begun = False
            await self.manager.cancel_all()
            await self.manager.stop()

    async def leave(self) -> None:
        """Cancel all transfers before the process exits; the exit closes what is still open."""
        if self._has_begun:
            await self.manager.cancel_all()
