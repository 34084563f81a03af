"""The place of each parameter in the weight arena, and the tensors of the checkpoint that it is made of.

Both follow from the `ModelSpec` alone, so another process can attach to an arena that it has not filled. Matrices
that read the same input are stacked into one: q, k and v; gate and up. Shares of one rank among several::

    embedding, lm_head       rows: `vocab_shard`
    qkv, gate_up             rows: heads, or inner units; biases likewise     (column parallel)
    o, down                  columns: heads, or inner units; whole biases     (row parallel)
    norms                    all
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from hbserve.errors import ModelError
from hbserve.layers.parallel import vocab_shard
from hbserve.model_spec import DTYPES, EMBEDDING, LM_HEAD, ModelSpec

ALIGNMENT_BYTES = 256
"""Alignment of every parameter in the arena: it suits vectorised loads and the tensor memory accelerator."""


@dataclass(frozen=True)
class CheckpointPart:
    """A tensor of the checkpoint and the slice of it that a rank holds.

    Attributes:
        name, shape: name and whole shape in the checkpoint.
        dim: dimension that the ranks divide.
        start, stop: this rank's slice of that dimension.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    start: int
    stop: int

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's slice."""
        return (*self.shape[: self.dim], self.stop - self.start, *self.shape[self.dim + 1 :])


class WeightEntry(msgspec.Struct, frozen=True):
    """One parameter in the arena: its offset in bytes, its shape, and the name of its dtype, such as bfloat16."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


class WeightTable(msgspec.Struct, frozen=True):
    """The table of all parameters of one rank; plain data that msgspec can send.

    Attributes:
        entries: parameters by name: ``embedding``, ``final_norm``, ``lm_head`` and, under ``layers.<i>.``,
            ``input_norm``, ``qkv``, ``q_norm``, ``k_norm``, ``o``, ``mlp_norm``, ``gate_up``, ``down``; a bias is
            ``<name>_bias``. A tied ``lm_head`` lies at ``embedding``.
        num_bytes: size of the arena.
    """

    entries: dict[str, WeightEntry]
    num_bytes: int

    @staticmethod
    def build(spec: ModelSpec, dtype: torch.dtype, tp_rank: int = 0, tp_size: int = 1) -> WeightTable:
        """Lay the parameters out one after the other.

        Raises:
            ModelError: ``tp_size`` ranks cannot share the model evenly.
        """
        dtype_name = next(name for name, value in DTYPES.items() if value == dtype)
        entries, end = {}, 0
        for name, parts in checkpoint_parts(spec, tp_rank, tp_size).items():
            shapes = [part.local_shape for part in parts]
            shape = (sum(s[0] for s in shapes), *shapes[0][1:])
            entries[name] = WeightEntry(end, shape, dtype_name)
            end += math.prod(shape) * dtype.itemsize
            end += -end % ALIGNMENT_BYTES
        if spec.tied_embeddings:
            entries["lm_head"] = entries["embedding"]
        return WeightTable(entries, end)

    def views(self, arena: Tensor) -> dict[str, Tensor]:
        """Make views of the parameters in the arena (uint8, at least ``num_bytes``)."""
        assert arena.dtype == torch.uint8, f"an arena is bytes, not {arena.dtype}"
        assert arena.numel() >= self.num_bytes, f"an arena of {arena.numel()} bytes does not hold {self.num_bytes}"
        return {name: _view(arena, entry) for name, entry in self.entries.items()}


def _view(arena: Tensor, entry: WeightEntry) -> Tensor:
    dtype = DTYPES[entry.dtype]
    num_bytes = math.prod(entry.shape) * dtype.itemsize
    return arena[entry.offset : entry.offset + num_bytes].view(dtype).view(entry.shape)


def checkpoint_parts(spec: ModelSpec, tp_rank: int = 0, tp_size: int = 1) -> dict[str, tuple[CheckpointPart, ...]]:
    """Map each parameter of a rank to the checkpoint's tensors that it is stacked from, first to last row.

    Raises:
        ModelError: ``tp_size`` ranks cannot share the model evenly.
    """
    return dict(_Sharding(spec, tp_rank, tp_size).parameters())


_Parameter = tuple[str, tuple[CheckpointPart, ...]]


class _Sharding:
    """Names and slices of one rank's parameters."""

    def __init__(self, spec: ModelSpec, rank: int, size: int) -> None:
        self.spec, self.rank, self.size = spec, rank, size

    def parameters(self) -> Iterator[_Parameter]:
        spec = self.spec
        vocab = vocab_shard(spec.vocab_size, self.rank, self.size)
        yield "embedding", (_part(EMBEDDING, (spec.vocab_size, spec.hidden_size), *vocab),)
        for layer in range(spec.num_layers):
            for name, parts in self._layer(f"model.layers.{layer}."):
                yield f"layers.{layer}.{name}", parts
        yield "final_norm", (_part("model.norm.weight", (spec.hidden_size,)),)
        if not spec.tied_embeddings:
            yield "lm_head", (_part(LM_HEAD, (spec.vocab_size, spec.hidden_size), *vocab),)

    def _layer(self, prefix: str) -> Iterator[_Parameter]:
        spec, hidden, head_dim = self.spec, self.spec.hidden_size, self.spec.head_dim
        q_rows = [head * head_dim for head in self._share(spec.num_heads, "num_attention_heads")]
        kv_rows = [head * head_dim for head in self._kv_heads()]
        inner = list(self._share(spec.intermediate_size, "intermediate_size"))
        q_size, kv_size = spec.num_heads * head_dim, spec.num_kv_heads * head_dim
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."

        def column_parallel(name: str, bias: bool, *parts: tuple[str, int, list[int]]) -> Iterator[_Parameter]:
            yield name, tuple(_part(f"{source}.weight", (size, hidden), *rows) for source, size, rows in parts)
            if bias:
                yield f"{name}_bias", tuple(_part(f"{source}.bias", (size,), *rows) for source, size, rows in parts)

        def row_parallel(name: str, bias: bool, source: str, size: int, columns: list[int]) -> Iterator[_Parameter]:
            yield name, (CheckpointPart(f"{source}.weight", (hidden, size), 1, *columns),)
            if bias:
                yield f"{name}_bias", (_part(f"{source}.bias", (hidden,)),)

        yield "input_norm", (_part(f"{prefix}input_layernorm.weight", (hidden,)),)
        q, k, v = (f"{attention}{name}_proj" for name in "qkv")
        yield from column_parallel(
            "qkv", spec.qkv_bias, (q, q_size, q_rows), (k, kv_size, kv_rows), (v, kv_size, kv_rows)
        )
        if spec.qk_norm:
            yield "q_norm", (_part(f"{attention}q_norm.weight", (head_dim,)),)
            yield "k_norm", (_part(f"{attention}k_norm.weight", (head_dim,)),)
        yield from row_parallel("o", spec.o_bias, f"{attention}o_proj", q_size, q_rows)
        yield "mlp_norm", (_part(f"{prefix}post_attention_layernorm.weight", (hidden,)),)
        gate, up = ((f"{mlp}{name}_proj", spec.intermediate_size, inner) for name in ("gate", "up"))
        yield from column_parallel("gate_up", spec.mlp_bias, gate, up)
        yield from row_parallel("down", spec.mlp_bias, f"{mlp}down_proj", spec.intermediate_size, inner)

    def _share(self, total: int, key: str) -> tuple[int, int]:
        if total % self.size:
            raise ModelError(f"{key} {total} cannot be shared evenly by {self.size} tensor-parallel ranks")
        share = total // self.size
        return self.rank * share, (self.rank + 1) * share

    def _kv_heads(self) -> tuple[int, int]:
        """Choose a rank's KV heads; if there are more ranks than heads, neighbouring ranks hold the same head."""
        if self.size > self.spec.num_kv_heads and self.size % self.spec.num_kv_heads == 0:
            head = self.rank * self.spec.num_kv_heads // self.size
            return head, head + 1
        return self._share(self.spec.num_kv_heads, "num_key_value_heads")


def _part(name: str, shape: tuple[int, ...], start: int = 0, stop: int | None = None) -> CheckpointPart:
    """Make a part of rows ``start .. stop`` of a tensor, by default all rows."""
    return CheckpointPart(name, shape, 0, start, shape[0] if stop is None else stop)
