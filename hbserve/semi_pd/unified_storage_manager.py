"""Public path of the allocator of the KV pool that both phases share, under the names of the design documents."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hbserve.config import InstanceRole
from hbserve.errors import InvalidRequestError
from hbserve.kv_cache.block_pool import BlockHandle, BlockPool
from hbserve.locking import synchronized

if TYPE_CHECKING:
    import torch

__all__ = ["BlockHandle", "UnifiedStorageManager"]


@synchronized
class UnifiedStorageManager(BlockPool):
    """`BlockPool` for the threads of a program with a scheduler of its own; here an owner is a request.

    Any thread may call any method: they run one at a time. `BlockPool` itself has no lock, because the CPU scheduler
    uses it from one thread.

    Args:
        total_blocks, block_size, device, enable_prefix_caching: see `BlockPool`.

    Attributes:
        lock: hold it around several operations that belong together.
    """

    def __init__(
        self,
        total_blocks: int,
        block_size: int,
        device: torch.device | None = None,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.lock = threading.RLock()
        _check("total_blocks", total_blocks, 1)
        _check("block_size", block_size, 1)
        super().__init__(total_blocks, block_size, device, enable_prefix_caching)

    def allocate_blocks(
        self,
        request_id: str,
        num_blocks: int,
        requester_role: InstanceRole = InstanceRole.DECODE,
        prefix_hashes: Sequence[bytes] = (),
    ) -> list[int] | None:
        """See `BlockPool.allocate_blocks`.

        Raises:
            InvalidRequestError: if ``num_blocks`` is no whole number from 0 on; if the request has been freed and is
                still pinned; or if it has blocks already and ``prefix_hashes`` match cached ones.
        """
        _check("num_blocks", num_blocks, 0)
        holding = self._holdings.get(request_id)
        if holding is not None and holding.is_freed:
            raise InvalidRequestError(f"{request_id} was freed and is still pinned; unpin it, or use another id")
        if holding is not None and holding.block_ids and self.count_cached_prefix(prefix_hashes[:num_blocks]):
            raise InvalidRequestError(f"{request_id} has blocks already; a cached prefix is for a new request")
        return super().allocate_blocks(request_id, num_blocks, InstanceRole(requester_role), prefix_hashes)

    def deallocate_blocks(self, request_id: str) -> None:
        """See `BlockPool.free`."""
        self.free(request_id)

    def share_blocks(self, source: str, target: str, *, only_sealed: bool = False) -> list[int]:
        """Give a new request all blocks of another, which may still be computing them.

        Each block is freed with its last request. The target may read a block when the source has written it, and must
        not write to it.

        Args:
            only_sealed: share the leading sealed blocks only, whose contents are final.

        Returns:
            The shared block ids, in order.

        Raises:
            InvalidRequestError: if the source has no blocks, or the target has.
        """
        holding = self._holdings.get(source)
        if holding is None or holding.is_freed:
            raise InvalidRequestError(f"{source} has no blocks to share; call allocate_blocks() first")
        if target in self._holdings:
            raise InvalidRequestError(f"{target} has blocks already; share_blocks() is for a new request")
        return super().share_blocks(source, target, only_sealed=only_sealed)

    def pin(self, owner: str) -> None:
        """See `BlockPool.pin`.

        Raises:
            InvalidRequestError: if the request has no blocks.
        """
        self._check_known(owner)
        super().pin(owner)

    def unpin(self, owner: str) -> None:
        """See `BlockPool.unpin`.

        Raises:
            InvalidRequestError: if the request has no pin.
        """
        self._check_known(owner)
        if not self._holdings[owner].pins:
            raise InvalidRequestError(f"{owner} is unpinned more often than pinned")
        super().unpin(owner)

    def seal_block(self, owner: str, index: int, block_hash: bytes) -> None:
        """See `BlockPool.seal_block`.

        Raises:
            InvalidRequestError: if the request has no block of that index.
        """
        num_blocks = len(self._check_known(owner))
        if not 0 <= index < num_blocks:
            raise InvalidRequestError(f"{owner} has {num_blocks} blocks, and none of index {index}")
        super().seal_block(owner, index, block_hash)

    def get_block_ids(self, owner: str) -> list[int]:
        """Return a copy of the request's block table.

        Raises:
            InvalidRequestError: if the request has no blocks.
        """
        return list(self._check_known(owner))

    def _check_known(self, request_id: str) -> list[int]:
        holding = self._holdings.get(request_id)
        if holding is None:
            raise InvalidRequestError(f"{request_id} has no blocks; it is unknown, or its blocks have been freed")
        return holding.block_ids


def _check(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidRequestError(f"{name} must be a whole number from {least} on, got {value!r}")
