"""Checksums of KV blocks, the same on every device."""

from __future__ import annotations

from functools import lru_cache

import torch

_BLOCKS_AT_ONCE = 64
"""Bounds the memory that products take."""


def block_checksums(kv_blocks: torch.Tensor, block_ids: list[int]) -> list[int]:
    """One 64-bit number for each block.

    The sum of the block's words times random odd numbers, modulo 2^64 (multiply-add hashing, Carter
    and Wegman 1979): any change of one word changes it, other changes and swapped words all but
    surely. Found out by whom it may concern: it guards against faults, not against an adversary.

    Args:
        kv_blocks: ``[block, byte]``, uint8; the byte number must be a multiple of 8.
    """
    words = kv_blocks.view(torch.int64)
    weights = _weights(words.shape[1], words.device)
    sums: list[int] = []
    for start in range(0, len(block_ids), _BLOCKS_AT_ONCE):
        index = torch.tensor(block_ids[start : start + _BLOCKS_AT_ONCE], device=words.device)
        sums += (words.index_select(0, index) * weights).sum(1).tolist()
    return sums


@lru_cache(maxsize=4)
def _weights(count: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(20261121)
    return (torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1).to(device)
