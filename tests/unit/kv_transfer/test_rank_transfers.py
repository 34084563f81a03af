"""The transfers of a rank over epochs: what they open in which mode."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from hbserve.config import from_dict
from hbserve.kv_transfer.head_split import Shard
from hbserve.kv_transfer.one_sided.base import ArenaSharing
from hbserve.kv_transfer.rank_transfers import RankTransfers
from hbserve.platform.cpu import CpuPlatform


def sockets() -> set[str]:
    """Return the sockets of this process."""
    links = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links.add(os.readlink(entry))
        except FileNotFoundError:  # the folder itself
            continue
    return {link for link in links if link.startswith("socket:")}


@pytest.mark.parametrize(("mode", "listens"), [("unified", False), ("disaggregated", True)])
async def test_a_unified_instance_opens_no_listener(tmp_path: Path, mode: str, listens: bool) -> None:
    config = from_dict({"mode": mode, "model": {"path": str(tmp_path)}})
    blocks = torch.zeros(4, 64, dtype=torch.uint8)
    sharing = ArenaSharing(None, CpuPlatform(1).open_arena)
    transfers = RankTransfers(config, config.gpu_instances[0], Shard(), blocks, lambda reply: None, sharing)
    before = sockets()
    peer = await transfers.begin_epoch(1)
    assert bool(sockets() - before) is bool(peer.endpoint) is listens
    await transfers.begin_epoch(2)
    await transfers.end_epoch()
    await transfers.leave()
