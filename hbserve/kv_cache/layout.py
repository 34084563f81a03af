"""Layout of the bytes of the KV cache, used in the workers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KVLayout:
    """Shape of a block-major KV arena: ``[block, layer, k/v, token, kv head, head dim]``.

    One block holds ``block_size`` tokens of all layers in one contiguous piece. A transfer moves such pieces;
    attention kernels take the strided view of one layer.

    Attributes:
        num_kv_heads: KV heads of this rank.
    """

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """``[layer, k/v, token, kv head, head dim]``."""
        return (self.num_layers, 2, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return math.prod(self.block_shape) * self.dtype.itemsize

    def view(self, arena: torch.Tensor, num_blocks: int) -> torch.Tensor:
        """Return the arena (uint8, contiguous) as ``[block, layer, k/v, token, kv head, head dim]``."""
        flat = arena[: num_blocks * self.block_bytes].view(self.dtype)
        return flat.view(num_blocks, *self.block_shape)

    def block_bytes_view(self, arena: torch.Tensor, num_blocks: int) -> torch.Tensor:
        """Return the arena as ``[block, byte]``, the unit of transfers."""
        return arena[: num_blocks * self.block_bytes].view(num_blocks, self.block_bytes)
