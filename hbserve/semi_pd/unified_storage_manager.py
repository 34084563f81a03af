"""Public path of the allocator of the KV pool that both phases share, under the names of the design documents."""

from __future__ import annotations

from collections.abc import Sequence

from hbserve.config import InstanceRole
from hbserve.kv_cache.block_pool import BlockHandle, BlockPool

__all__ = ["BlockHandle", "UnifiedStorageManager"]


class UnifiedStorageManager(BlockPool):
    """`BlockPool` under its older names: here an owner is a request."""

    def allocate_blocks(
        self,
        request_id: str,
        num_blocks: int,
        requester_role: InstanceRole = InstanceRole.DECODE,
        prefix_hashes: Sequence[bytes] = (),
    ) -> list[int] | None:
        """See `BlockPool.allocate_blocks`."""
        return super().allocate_blocks(request_id, num_blocks, requester_role, prefix_hashes)

    def deallocate_blocks(self, request_id: str) -> None:
        """See `BlockPool.free`."""
        self.free(request_id)
