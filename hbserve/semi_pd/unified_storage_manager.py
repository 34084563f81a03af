"""Where users find the allocator of the KV pool that both phases share, under the names of the design documents."""

from __future__ import annotations

from hbserve.kv_cache.block_pool import BlockHandle, BlockPool

__all__ = ["BlockHandle", "UnifiedStorageManager"]


class UnifiedStorageManager(BlockPool):
    """`BlockPool` under its older names."""

    def deallocate_blocks(self, request_id: str) -> None:
        """See `BlockPool.free`."""
        self.free(request_id)
