"""The KV tiers of one rank over the epochs of its instance. Runs in the rank process, in its event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import torch

from hbserve.config import KVCacheConfig, StoreTierConfig
from hbserve.errors import StartupError
from hbserve.kv_tiers.base import KVTier, KVTierContext
from hbserve.kv_tiers.disk import DiskTier, DiskTierError
from hbserve.kv_tiers.host import HostTier
from hbserve.kv_tiers.lane import CopyJob, Lane
from hbserve.kv_tiers.lookups import Lookups
from hbserve.kv_tiers.named_lane import NamedLane
from hbserve.kv_tiers.sealed import SEAL_BYTES
from hbserve.kv_tiers.store import make_store
from hbserve.kv_transfer.block_parts import prepare_copies
from hbserve.messages.tiers import (
    FindBlocks,
    FoundBlocks,
    HostMemory,
    StoreBlocks,
    TierCommand,
    TierInfo,
    TierResult,
)
from hbserve.platform import Platform

_POLL_S = 0.002


class _Lanes(NamedTuple):
    store: Lane
    load: Lane


class RankTiers:
    """Starts the scheduler's jobs, and ends those that are late or of an epoch that is over.

    Args:
        host: memory of the host; None: there is no host tier.
        kv_blocks: the rank's arena, uint8 ``[block, byte]``.
        rank, num_ranks: of the instance.
        report: called in any thread with each result.
        name: equal only for workers whose blocks have the same bytes, see `hbserve.kv_tiers.base.namespace`.
        report_found: called in any thread with the answer to each lookup.

    Raises:
        HBServeError: if there is no such store, or a tier is too small for a block.

    Attributes:
        infos: the tiers, for the scheduler, as they are at the beginning of the epoch.
        problems: why tiers cannot be used here, in words.
    """

    def __init__(
        self,
        config: KVCacheConfig,
        host: HostMemory | None,
        platform: Platform,
        kv_blocks: torch.Tensor,
        rank: int,
        num_ranks: int,
        report: Callable[[TierResult], None],
        name: str = "",
        report_found: Callable[[FoundBlocks], None] = lambda found: None,
    ) -> None:
        self._timeout_s = config.timeout_s
        self._report = report
        self._epoch = 0
        self._jobs: dict[int, CopyJob] = {}
        self._lanes: dict[str, _Lanes] = {}
        self.infos: list[TierInfo] = []
        self.problems: list[str] = []
        self._disk: DiskTier | None = None
        self._lookups: Lookups | None = None
        self._prefixes = [f"{name}-{number}of{num_ranks}-" for number in range(num_ranks)]
        block_bytes = kv_blocks.shape[1]
        if host is not None or config.disk is not None or config.store is not None:
            prepare_copies(block_bytes, kv_blocks.device)
        if host is not None:
            slots = HostTier(host, platform, rank, num_ranks, block_bytes)
            _check_holds_a_block("host_bytes", slots.num_slots, num_ranks * block_bytes)
            self.infos.append(TierInfo(name="host", memory=host.name, num_slots=slots.num_slots))
            self._open("host", slots, kv_blocks, rank)
        if config.disk is not None:
            try:
                self._disk = DiskTier(config.disk, name, rank, num_ranks, block_bytes)
            except DiskTierError as error:
                self.problems.append(str(error))
            else:
                _check_holds_a_block("disk.bytes", self._disk.num_slots, num_ranks * block_bytes)
                info = TierInfo(name="disk", memory=self._disk.memory, num_slots=self._disk.num_slots)
                self.infos.append(info)
                self._open("disk", self._disk, kv_blocks, rank)
        if config.store is not None:
            self._open_store(config.store, f"{name}/{num_ranks}", kv_blocks, rank, report_found)

    def _open_store(
        self,
        config: StoreTierConfig,
        name: str,
        kv_blocks: torch.Tensor,
        rank: int,
        report_found: Callable[[FoundBlocks], None],
    ) -> None:
        value_bytes, num_ranks = kv_blocks.shape[1] + SEAL_BYTES, len(self._prefixes)
        num_slots = config.bytes // num_ranks // value_bytes
        _check_holds_a_block("store.bytes", num_slots, num_ranks * value_bytes)
        store = make_store(KVTierContext(config, value_bytes, self._timeout_s))
        memory = f"{config.backend}/{config.master}/{name}"
        self.infos.append(TierInfo(name="store", memory=memory, num_slots=num_slots, by_name=True))
        self._open("store", store, kv_blocks, rank)
        if rank == 0:
            self._lookups = Lookups(store, self._prefixes, self._timeout_s, report_found)

    def _open(self, name: str, tier: KVTier, kv_blocks: torch.Tensor, rank: int) -> None:
        kind = Lane if tier.has_slots else NamedLane
        store, load = (kind(tier, self._prefixes[rank], kv_blocks, rank, self._on_end) for _ in range(2))
        self._lanes[name] = _Lanes(store, load)

    def find(self, command: FindBlocks) -> None:
        """Look blocks up, on rank 0."""
        if command.epoch == self._epoch and self._lookups is not None:
            self._lookups.put(command)

    def handle(self, command: TierCommand) -> None:
        """Start a job of the scheduler, unless it is of another epoch."""
        if command.epoch != self._epoch:
            return
        job = self._jobs[command.job_id] = CopyJob(command)
        lanes = self._lanes.get(command.tier)
        if lanes is None:  # rank 0 can use the tier, this one cannot
            self._on_end(job, job.failed("backend", f"a rank cannot use {command.tier}: {', '.join(self.problems)}"))
            return
        (lanes.store if isinstance(command, StoreBlocks) else lanes.load).put(job)
        asyncio.get_running_loop().call_later(self._timeout_s, self._expire, job)

    def _on_end(self, job: CopyJob, result: TierResult) -> None:
        self._jobs.pop(job.command.job_id, None)
        self._report(result)

    def _expire(self, job: CopyJob) -> None:
        """Give a job up. If it copies at this moment, it is nearly done: look again a little later."""
        if job.is_over:
            return
        if not job.lock.acquire(blocking=False):
            asyncio.get_running_loop().call_later(_POLL_S, self._expire, job)
            return
        with_result = not job.is_over
        job.is_over = True
        job.lock.release()
        if with_result:
            self._on_end(job, job.failed("timeout", f"not done within {self._timeout_s:g} s"))

    async def begin_epoch(self, epoch: int) -> None:
        """End all jobs; when this returns, none touches the arena or a slot any more."""
        self._epoch = epoch
        await self.leave()
        if self._disk is not None:
            kept = await asyncio.to_thread(self._disk.kept)
            at = next(number for number, info in enumerate(self.infos) if info.name == "disk")
            self.infos[at] = msgspec.structs.replace(self.infos[at], kept=kept)

    async def leave(self) -> None:
        """End all jobs, before the process exits."""
        for job in list(self._jobs.values()):
            await asyncio.to_thread(job.lock.acquire)
            job.is_over = True
            job.lock.release()
        self._jobs.clear()


def _check_holds_a_block(key: str, num_slots: int, block_bytes: int) -> None:
    if not num_slots:
        text = f"kv_cache.{key}: a block has {block_bytes} bytes, and none fits; give more, or leave it out"
        raise StartupError(text)
