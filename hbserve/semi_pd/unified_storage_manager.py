"""The allocator of the KV pool that both phases share: `hbserve.kv_cache.storage_manager`, under this room's name."""

from __future__ import annotations

from hbserve.kv_cache.storage_manager import BlockHandle, UnifiedStorageManager

__all__ = ["BlockHandle", "UnifiedStorageManager"]
