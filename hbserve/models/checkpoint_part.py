"""A tensor of a checkpoint, and what a rank's arena holds of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

FLOAT_DTYPES = ("F64", "F32", "BF16", "F16")
"""Dtypes of unquantised tensors in a checkpoint, by safetensors' names."""


@dataclass(frozen=True)
class CheckpointPart:
    """A tensor of the checkpoint and the slice of it that a rank holds.

    Attributes:
        name, shape: name and whole shape in the checkpoint; `stored_shape` where another one is stored.
        dim: dimension that the ranks divide.
        start, stop: this rank's slice of that dimension.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    start: int
    stop: int

    arena_dtype: ClassVar[str | None] = None
    """Name of the dtype in the arena; None: the serving dtype."""

    stored_dtypes: ClassVar[tuple[str, ...]] = FLOAT_DTYPES
    """Dtypes that the tensor may have in the checkpoint, by safetensors' names."""

    is_slice: ClassVar[bool] = True
    """Whether the arena has the slice itself, maybe in another dtype; False: `read` computes what it has."""

    @property
    def companion(self) -> CheckpointPart | None:
        """Another whole tensor of the checkpoint that `read` needs, which no other part reads; None: there is none."""
        return None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the checkpoint."""
        return self.shape

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's slice in the arena."""
        return (*self.shape[: self.dim], self.stop - self.start, *self.shape[self.dim + 1 :])

    def has_shape(self, shape: tuple[int, ...]) -> bool:
        """Return whether the tensor may have that shape in the checkpoint."""
        return shape == self.stored_shape

    def read(self, source: Any, device: torch.device, companion: Any = None) -> Tensor:
        """Read this rank's slice, of `local_shape` and any dtype, on any device.

        Args:
            source: the tensor in the checkpoint, which reads the slice that it is indexed with.
            device: the arena's, where work on large tensors is done.
            companion: likewise the tensor `companion`, if there is one.
        """
        return cast(Tensor, source[(slice(None),) * self.dim + (slice(self.start, self.stop),)])


@dataclass(frozen=True)
class CheckpointVector(CheckpointPart):
    """A whole vector, which may have further dimensions of size 1 in the checkpoint."""

    is_slice: ClassVar[bool] = False

    def has_shape(self, shape: tuple[int, ...]) -> bool:
        return math.prod(shape) == max(shape, default=0) == self.shape[0]

    def read(self, source: Any, device: torch.device, companion: Any = None) -> Tensor:
        return cast(Tensor, source[...]).flatten()


@dataclass(frozen=True)
class CheckpointNumber(CheckpointPart):
    """A single number of the model's dtype; every rank has it."""

    is_slice: ClassVar[bool] = False

    def has_shape(self, shape: tuple[int, ...]) -> bool:
        return math.prod(shape) == 1

    def read(self, source: Any, device: torch.device, companion: Any = None) -> Tensor:
        return cast(Tensor, source[...]).reshape(1)


@dataclass(frozen=True)
class StackedExpertsPart(CheckpointPart):
    """The matrices of all experts in one tensor ``[experts, rows, columns]``; the arena has their rows, stacked.

    Attributes:
        dim: 1 or 2, the dimension that start and stop slice.
        num_stacked: matrices that the rows of an expert consist of, each sliced: 2 for ``gate | up``.
        first, last: this rank's experts.
    """

    num_stacked: int
    first: int
    last: int

    is_slice: ClassVar[bool] = False

    @property
    def local_shape(self) -> tuple[int, ...]:
        _, num_rows, num_columns = self.shape
        size, count = self.stop - self.start, self.last - self.first
        return (count * self.num_stacked * size, num_columns) if self.dim == 1 else (count * num_rows, size)

    def with_whole_rows(self) -> StackedExpertsPart:
        """Return the part without a slice of columns."""
        return replace(self, start=0, stop=self.shape[2]) if self.dim == 2 else self

    def read(self, source: Any, device: torch.device, companion: Any = None) -> Tensor:
        experts = cast(Tensor, source[self.first : self.last])
        if self.dim == 2:
            return experts[..., self.start : self.stop].reshape(self.local_shape)
        matrices = experts.view(len(experts), self.num_stacked, -1, self.shape[2])
        return matrices[:, :, self.start : self.stop].reshape(self.local_shape)


@dataclass(frozen=True)
class ColumnExpertsPart(StackedExpertsPart):
    """The matrices of all experts as ``[experts, inputs, outputs]``, or their biases as ``[experts, outputs]``.

    Outputs of the stacked matrices take turns. The arena has a row for each output, as of `StackedExpertsPart`.

    Attributes:
        dim: dimension of the rows ``[experts, outputs, inputs]`` that start and stop slice.
    """

    @property
    def local_shape(self) -> tuple[int, ...]:
        num_inputs, num_outputs = self.shape[1:-1], self.shape[-1]
        size, count = self.stop - self.start, self.last - self.first
        return (count * self.num_stacked * size, *num_inputs) if self.dim == 1 else (count * num_outputs, size)

    def with_whole_rows(self) -> StackedExpertsPart:
        return replace(self, start=0, stop=self.shape[1]) if self.dim == 2 else self

    def read(self, source: Any, device: torch.device, companion: Any = None) -> Tensor:
        rows: Tensor = source[self.first : self.last].movedim(-1, 1)
        if self.dim == 2:
            return rows[..., self.start : self.stop].reshape(self.local_shape)
        turns = rows.view(len(rows), -1, self.num_stacked, *rows.shape[2:])[:, self.start : self.stop]
        return turns.transpose(1, 2).reshape(self.local_shape)


@dataclass(frozen=True)
class KVScalePart(CheckpointPart):
    """Scales of a layer's keys or values: of each KV head, or of all; start and stop are this rank's heads.

    Attributes:
        growth: factor of the scales, for numbers that may be larger by it than those of the model.
    """

    growth: float

    arena_dtype: ClassVar[str | None] = "float32"
    is_slice: ClassVar[bool] = False

    @property
    def local_shape(self) -> tuple[int, ...]:
        return 1, self.stop - self.start

    def has_shape(self, shape: tuple[int, ...]) -> bool:
        return math.prod(shape) in (1, *self.shape)

    def read(self, source: Any, device: torch.device, companion: Any = None) -> Tensor:
        scales = cast(Tensor, source[...]).reshape(1, -1).expand(1, *self.shape)
        return scales[:, self.start : self.stop] * self.growth


@dataclass(frozen=True)
class NumbersPart(CheckpointPart):
    """A whole vector of integers."""

    arena_dtype: ClassVar[str | None] = "int64"
    stored_dtypes: ClassVar[tuple[str, ...]] = ("I64", "I32")


Parameter = tuple[str, tuple[CheckpointPart, ...]]
"""Name of a parameter in the arena, and the parts that are stacked in it, first to last row."""
