"""Which manager and which backend a name in the configuration means."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hbserve.errors import ConfigError
from hbserve.messages.transfer import TransferReply
from hbserve.pd_disagg.kv_transfer.base import KVTransferContext
from hbserve.pd_disagg.kv_transfer.direct_transfers import DirectTransfers
from hbserve.pd_disagg.kv_transfer.head_split import Shard
from hbserve.pd_disagg.kv_transfer.manager import KVTransferManager
from hbserve.pd_disagg.kv_transfer.mooncake import MooncakeKVTransfer
from hbserve.pd_disagg.kv_transfer.one_sided import ArenaSharing
from hbserve.pd_disagg.kv_transfer.shared_memory import SharedMemoryKVTransfer
from hbserve.pd_disagg.kv_transfer.staged_transfers import StagedTransfers, make_backend
from hbserve.pd_disagg.kv_transfer.torch_transfers import TorchTransfers


def make_manager(
    name: str,
    context: KVTransferContext,
    kv_blocks: torch.Tensor,
    report: Callable[[TransferReply], None],
    shard: Shard = Shard(),  # noqa: B008 - it is frozen
    sharing: ArenaSharing | None = None,
) -> KVTransferManager:
    """A manager with the backend that ``kv_transfer.backend`` names, not yet started.

    Args:
        sharing: for ``shm``.

    Raises:
        ConfigError: if it cannot be imported.
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
