"""Layout of the bytes of the KV cache, used in the workers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class KVLayout:
    """Shape of a block-major KV arena: ``[block, layer, k/v, token, kv head, head dim]``.

    Behind the layers a block has room for one more vector of each token if an EAGLE-3 head needs it. That room is as
    large as some layers, so that all that moves or cuts blocks takes it for layers.

    One block holds ``block_size`` tokens of all layers in one contiguous piece. A transfer moves such pieces;
    attention kernels take the strided view of one layer.

    Attributes:
        num_layers: of the model.
        num_kv_heads: KV heads of this rank.
        num_extra_layers: that the room behind the layers is as large as.
    """

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    num_extra_layers: int = 0

    def with_vectors(self, vector_bytes: int) -> KVLayout:
        """Return the layout with room for a vector of so many bytes for each token."""
        layer_bytes = self.block_bytes // self.num_stored_layers
        return replace(self, num_extra_layers=-(-self.block_size * vector_bytes // layer_bytes))

    @property
    def num_stored_layers(self) -> int:
        """Layers in a block, the room behind them included."""
        return self.num_layers + self.num_extra_layers

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """``[layer, k/v, token, kv head, head dim]``."""
        return (self.num_stored_layers, 2, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return math.prod(self.block_shape) * self.dtype.itemsize

    def view(self, arena: torch.Tensor, num_blocks: int) -> torch.Tensor:
        """Return the arena (uint8, contiguous) as ``[block, layer, k/v, token, kv head, head dim]``."""
        flat = arena[: num_blocks * self.block_bytes].view(self.dtype)
        return flat.view(num_blocks, *self.block_shape)

    def vectors(self, arena: torch.Tensor, num_blocks: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the vectors behind the layers, as ``[block, token, size]``."""
        blocks = self.block_bytes_view(arena, num_blocks)
        first = self.block_bytes // self.num_stored_layers * self.num_layers
        room = blocks[:, first : first + self.block_size * size * dtype.itemsize]
        return room.view(dtype).view(num_blocks, self.block_size, size)

    def block_bytes_view(self, arena: torch.Tensor, num_blocks: int) -> torch.Tensor:
        """Return the arena as ``[block, byte]``, the unit of transfers."""
        return arena[: num_blocks * self.block_bytes].view(num_blocks, self.block_bytes)
