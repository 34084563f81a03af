"""Experts in MXFP4, as checkpoints of gpt-oss have them: they are widened while they are loaded.

MXFP4 (Rouhani et al. 2023, Microscaling) has 4-bit numbers (e2m1), and a power of two for 32 of them::

    blocks    uint8 [experts, outputs, inputs / 32, 16]   two numbers a byte, the first in the low bits
    scales    uint8 [experts, outputs, inputs / 32]       the exponent plus 127
    matrix    [experts, outputs, inputs]                  number * 2 ** (scale - 127), exact in bfloat16
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hbserve.errors import ModelError
from hbserve.models.checkpoint_part import CheckpointPart, StackedExpertsPart

_BLOCK, _EXPONENT_BIAS = 32, 127
_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_NUMBERS, *(-number for number in _NUMBERS)])


@dataclass(frozen=True)
class _BytesPart(CheckpointPart):
    """A whole tensor of bytes."""

    stored_dtypes: ClassVar[tuple[str, ...]] = ("U8",)


@dataclass(frozen=True)
class Mxfp4ExpertsPart(StackedExpertsPart):
    """The matrices of all experts in MXFP4; outputs of stacked ones take turns.

    Attributes:
        name: that of the matrices; blocks and scales have suffixes.
        shape: ``[experts, outputs, inputs]`` of the matrices.
    """

    stored_dtypes: ClassVar[tuple[str, ...]] = ("U8",)

    def __post_init__(self) -> None:
        if self.shape[2] % _BLOCK:
            raise ModelError(f"experts in MXFP4 have inputs in blocks of {_BLOCK}, but {self.name} has {self.shape[2]}")
        object.__setattr__(self, "name", f"{self.name}_blocks")

    @property
    def companion(self) -> CheckpointPart:
        name, shape = f"{self.name.removesuffix('_blocks')}_scales", self._shape_of_scales
        return _BytesPart(name, shape, 0, 0, shape[0])

    @property
    def _shape_of_scales(self) -> tuple[int, ...]:
        return (*self.shape[:2], self.shape[2] // _BLOCK)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return (*self._shape_of_scales, _BLOCK // 2)

    def read(self, source: Any, device: torch.device, companion: Any = None) -> Tensor:
        rows = torch.empty(self.local_shape, dtype=torch.bfloat16, device=device)
        for place, expert in zip(rows.chunk(self.last - self.first), range(self.first, self.last), strict=True):
            blocks, scales = (tensor[expert : expert + 1][0].to(device) for tensor in (source, companion))
            matrix = _widened(blocks, scales)
            if self.dim == 2:
                place.copy_(matrix[:, self.start : self.stop])
            else:
                turns = matrix.view(-1, self.num_stacked, matrix.shape[1])[self.start : self.stop]
                place.copy_(turns.transpose(0, 1).reshape(place.shape))
        return rows


def _widened(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return a matrix ``[outputs, inputs]`` in float32."""
    numbers = torch.stack((blocks & 0xF, blocks >> 4), dim=-1).flatten(2).int()
    values = _VALUES.to(blocks.device)[numbers]
    return torch.ldexp(values, scales.int()[..., None] - _EXPONENT_BIAS).flatten(1)
