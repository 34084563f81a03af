"""FP8 matrices in the arena: their values and scales, and where the checkpoint has both.

Scales of the arena are per row (a tensor's only scale is repeated), or per block. A stacked matrix is cut into blocks
of r x 128, where r is the largest divisor of 128 that divides the begins of all its parts. It is 128 unless a matrix is
small or many ranks share it. A block has 128 columns always, because inputs are quantised in groups of 128.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from hbserve.errors import ModelError
from hbserve.layers.fp8 import Quantised, quantise_weight
from hbserve.models.checkpoint_part import CheckpointNumber, CheckpointPart, Parameter, StackedExpertsPart
from hbserve.weight_format import BLOCK_SIZE, Fp8Format, Granularity


@dataclass(frozen=True)
class _Fp8Part(CheckpointPart):
    """FP8 values of the checkpoint."""

    arena_dtype: ClassVar[str | None] = "float8_e4m3fn"
    stored_dtypes: ClassVar[tuple[str, ...]] = ("F8_E4M3",)


@dataclass(frozen=True)
class _ScalePart(CheckpointPart):
    """Scales of the checkpoint.

    Attributes:
        weight: the weight's part.
        block_rows: rows of a block in the arena.
    """

    weight: CheckpointPart
    granularity: Granularity
    block_rows: int
    arena_dtype: ClassVar[str | None] = "float32"
    is_slice: ClassVar[bool] = False

    @property
    def local_shape(self) -> tuple[int, ...]:
        num_rows, num_columns = self.weight.local_shape
        if self.granularity != "block":
            return (num_rows,)
        return num_rows // self.block_rows, math.ceil(num_columns / BLOCK_SIZE)

    def has_shape(self, shape: tuple[int, ...]) -> bool:
        if self.granularity == "tensor":
            return math.prod(shape) == 1
        return shape == self.shape or (self.granularity == "channel" and shape == self.shape[:1])

    def read(self, source: Any, device: torch.device, companion: Any = None) -> Tensor:
        scales = cast(Tensor, source[...])
        if self.granularity == "tensor":
            return scales.reshape(1).expand(self.local_shape)
        weight = self.weight
        if self.granularity == "channel":
            rows = scales.reshape(-1)
            return rows[weight.start : weight.stop] if weight.dim == 0 else rows
        first_row, first_column = (weight.start, 0) if weight.dim == 0 else (0, weight.start)
        num_rows, num_columns = self.local_shape
        rows = torch.arange(first_row, first_row + num_rows * self.block_rows, self.block_rows) // BLOCK_SIZE
        columns = slice(first_column // BLOCK_SIZE, first_column // BLOCK_SIZE + num_columns)
        return scales[rows, columns]


@dataclass(frozen=True)
class _InputScalePart(CheckpointNumber):
    """The scale of a layer's inputs; every rank has it."""

    arena_dtype: ClassVar[str | None] = "float32"


@dataclass(frozen=True)
class _QuantisedPart(CheckpointPart):
    """FP8 values of an unquantised weight, with a scale for each whole row, whatever part of it a rank has."""

    arena_dtype: ClassVar[str | None] = "float8_e4m3fn"
    is_slice: ClassVar[bool] = False

    def read(self, source: Any, device: torch.device, companion: Any = None) -> Tensor:
        values = self._quantise(source, device).values
        return values[:, self.start : self.stop] if self.dim == 1 else values

    def _quantise(self, source: Any, device: torch.device) -> Quantised:
        rows = source[self.start : self.stop] if self.dim == 0 else source[:]
        return quantise_weight(cast(Tensor, rows).to(device))


@dataclass(frozen=True)
class _RowScalePart(_QuantisedPart):
    """The scales of a `_QuantisedPart`."""

    arena_dtype: ClassVar[str | None] = "float32"

    @property
    def local_shape(self) -> tuple[int, ...]:
        return (super().local_shape[0],)

    def read(self, source: Any, device: torch.device, companion: Any = None) -> Tensor:
        return self._quantise(source, device).scales[:, 0]


@dataclass(frozen=True)
class _QuantisedExpertsPart(CheckpointPart):
    """FP8 values of unquantised matrices that lie in one tensor; otherwise as `_QuantisedPart`."""

    experts: StackedExpertsPart
    arena_dtype: ClassVar[str | None] = "float8_e4m3fn"
    is_slice: ClassVar[bool] = False

    @property
    def local_shape(self) -> tuple[int, ...]:
        return self.experts.local_shape

    def read(self, source: Any, device: torch.device, companion: Any = None) -> Tensor:
        columns = slice(self.start, self.stop) if self.dim == 2 else slice(None)
        return torch.cat([matrix.values[:, columns] for matrix in self._quantised(source, device)])

    def _quantised(self, source: Any, device: torch.device) -> Iterator[Quantised]:
        """Quantise one expert after the other, because float32 takes much memory."""
        for expert in range(self.experts.first, self.experts.last):
            matrix = replace(self.experts.with_whole_rows(), first=expert, last=expert + 1)
            yield quantise_weight(matrix.read(source, device).to(device))


@dataclass(frozen=True)
class _ExpertsRowScalePart(_QuantisedExpertsPart):
    """The scales of a `_QuantisedExpertsPart`."""

    arena_dtype: ClassVar[str | None] = "float32"

    @property
    def local_shape(self) -> tuple[int, ...]:
        return (super().local_shape[0],)

    def read(self, source: Any, device: torch.device, companion: Any = None) -> Tensor:
        return torch.cat([matrix.scales[:, 0] for matrix in self._quantised(source, device)])


@dataclass(frozen=True)
class WidenedPart(CheckpointPart):
    """FP8 values of the checkpoint times their scales, in the serving dtype.

    Attributes:
        scale_name: name of the scales beside the weight.
    """

    granularity: Granularity
    scale_name: str
    stored_dtypes: ClassVar[tuple[str, ...]] = ("F8_E4M3",)
    is_slice: ClassVar[bool] = False

    @property
    def companion(self) -> CheckpointPart:
        shape = _scale_shape(self.granularity, self.shape)
        name = f"{self.name.removesuffix('weight')}{self.scale_name}"
        return _ScalePart(name, shape, 0, 0, shape[0], self, self.granularity, 1)

    def read(self, source: Any, device: torch.device, companion: Any = None) -> Tensor:
        rows, columns = (
            slice(self.start, self.stop) if dim == self.dim else slice(0, size) for dim, size in enumerate(self.shape)
        )
        values = cast(Tensor, source[rows, columns]).to(device).float()
        scales = cast(Tensor, companion[...]).to(device).float()
        if self.granularity == "tensor":
            return values * scales.reshape(1)
        if self.granularity == "channel":
            return values * scales.reshape(-1, 1)[rows]
        row_blocks, column_blocks = (
            torch.arange(part.start, part.stop, device=device) // BLOCK_SIZE for part in (rows, columns)
        )
        return values * scales[row_blocks[:, None], column_blocks]


def fp8_parameters(weight_format: Fp8Format, name: str, parts: tuple[CheckpointPart, ...]) -> Iterator[Parameter]:
    """Yield the parameters of a stacked matrix; see `hbserve.models.schemes.matrix_parameters`."""
    modules = [part.name.removesuffix(".weight") for part in parts]
    formats = [weight_format.of(module) for module in modules]
    own = formats[0]
    if any(other != own for other in formats):
        how = "quantised" if None in formats else "quantised in the same way"
        raise ModelError(f"only some of {', '.join(modules)} are {how}; HBServe computes them as one matrix")
    if own is None:
        yield name, parts
        return
    if isinstance(parts[0], StackedExpertsPart):
        yield from _stacked_experts(own, name, parts[0])
        return
    places = [(part.name, part.shape, part.dim, part.start, part.stop) for part in parts]
    if own.is_widened:
        yield name, tuple(WidenedPart(*place, own.granularity, own.scale_name) for place in places)
        return
    if own.is_on_load:
        yield name, tuple(_QuantisedPart(*place) for place in places)
        yield f"{name}_scale", tuple(_RowScalePart(*place) for place in places)
        return
    yield name, tuple(_Fp8Part(*place) for place in places)
    yield f"{name}_scale", tuple(_scale_parts(own, modules, parts))
    if own.is_static:
        scales = (_InputScalePart(f"{module}.input_scale", (1,), 0, 0, 1) for module in modules)
        yield f"{name}_input_scale", tuple(scales)


def _stacked_experts(weight_format: Fp8Format, name: str, experts: StackedExpertsPart) -> Iterator[Parameter]:
    """Yield the parameters of experts that lie in one tensor.

    Quantised checkpoints have them as they were: no linear layer has that tensor. Where one has quantised experts, each
    has tensors of its own.
    """
    if not weight_format.is_on_load:
        yield name, (experts,)
        return
    if experts.companion is not None:
        raise ModelError(f"{experts.name} is quantised already; leave model.quantization out")
    place = experts.name, experts.shape, experts.dim, experts.start, experts.stop, experts
    yield name, (_QuantisedExpertsPart(*place),)
    yield f"{name}_scale", (_ExpertsRowScalePart(*place),)


def head_part(weight_format: Fp8Format, head: CheckpointPart) -> CheckpointPart:
    """Return the LM head as the checkpoint has it: plain, or in FP8."""
    if not weight_format.has_head:
        return head
    own = weight_format.of(head.name.removesuffix(".weight")) or weight_format
    return WidenedPart(head.name, head.shape, head.dim, head.start, head.stop, own.granularity, own.scale_name)


def _scale_parts(
    weight_format: Fp8Format, modules: list[str], parts: tuple[CheckpointPart, ...]
) -> Iterator[_ScalePart]:
    granularity, block_rows = weight_format.granularity, 1
    if granularity == "block":
        block_rows = _common_block_rows(parts)
    for module, part in zip(modules, parts, strict=True):
        num_columns = part.shape[1]
        is_share = part.dim == 1 and part.stop - part.start < num_columns
        if granularity == "block" and is_share and (part.start % BLOCK_SIZE or part.stop % BLOCK_SIZE):
            raise ModelError(
                f"{part.name} has {num_columns} columns in blocks of {BLOCK_SIZE}, which cannot be shared by "
                f"{num_columns // (part.stop - part.start)} tensor-parallel ranks; use fewer"
            )
        shape = _scale_shape(granularity, part.shape)
        yield _ScalePart(f"{module}.{weight_format.scale_name}", shape, 0, 0, shape[0], part, granularity, block_rows)


def _scale_shape(granularity: Granularity, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the scales of a matrix in the checkpoint."""
    num_rows, num_columns = shape
    shapes: dict[Granularity, tuple[int, ...]] = {
        "tensor": (1,),
        "channel": (num_rows, 1),
        "block": (math.ceil(num_rows / BLOCK_SIZE), math.ceil(num_columns / BLOCK_SIZE)),
    }
    return shapes[granularity]


def _common_block_rows(parts: tuple[CheckpointPart, ...]) -> int:
    """Choose the rows of a block such that blocks begin where parts begin, here and in the checkpoint."""
    sizes = [part.local_shape[0] for part in parts]
    starts = [part.start if part.dim == 0 else 0 for part in parts]
    return math.gcd(BLOCK_SIZE, *starts, *accumulate(sizes))
