"""The place of each parameter in the weight arena, and the tensors of the checkpoint that it is made of.

Both follow from the `ModelSpec` alone, so another process can attach to an arena that it has not filled. Matrices
that read the same input are stacked into one: q, k and v; gate and up. Shares of one rank among several::

    embedding, lm_head       rows: `vocab_shard`
    qkv, up                  rows: heads, or inner units; biases likewise     (column parallel)
    o, down                  columns: heads, or inner units; whole biases     (row parallel)
    norms                    all; those of whole q and k projections: heads
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from itertools import accumulate
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from hbserve.errors import ModelError
from hbserve.layers.parallel import vocab_shard
from hbserve.layers.rotary import num_mixed_pairs
from hbserve.model_families.declaration import Experts
from hbserve.model_spec import DTYPES, EMBEDDING, LM_HEAD, ModelSpec
from hbserve.models.checkpoint_part import (
    CheckpointNumber,
    CheckpointPart,
    CheckpointVector,
    ColumnExpertsPart,
    KVScalePart,
    Parameter,
    StackedExpertsPart,
)
from hbserve.models.fp8_weights import head_part
from hbserve.models.mxfp4_experts import Mxfp4ExpertsPart
from hbserve.models.schemes import matrix_parameters
from hbserve.weight_format import Fp8Format

_ARENA_DTYPES = {**DTYPES, "float8_e4m3fn": torch.float8_e4m3fn, "int64": torch.int64}

ALIGNMENT_BYTES = 256
"""Alignment of every parameter in the arena: it suits vectorised loads and the tensor memory accelerator."""


class WeightEntry(msgspec.Struct, frozen=True):
    """One parameter in the arena: its offset in bytes, its shape, and the name of its dtype, such as bfloat16."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


class WeightTable(msgspec.Struct, frozen=True):
    """The table of all parameters of one rank; plain data that msgspec can send.

    Attributes:
        entries: parameters by name: ``embedding``, ``final_norm``, ``lm_head`` and, under ``layers.<i>.``, ``qkv``,
            ``q_norm``, ``k_norm``, ``o``, ``up`` (``gate | up`` where there is a gate), ``down``, ``curve``, and the
            fields of `LayerNorms` as ``<name>_norm``; a bias is ``<name>_bias``. A layer with experts has the fields of
            `hbserve.layers.mixture.plain.ExpertWeights`. A tied ``lm_head`` lies at ``embedding``. A quantised matrix
            has further parameters, see `hbserve.models.schemes`. ``sinks [layers * heads]`` are those of attention.
            ``kv_scales [layers * 2, KV heads]`` are those of KV in FP8, of keys and values of one layer after the
            other, if the checkpoint has them.
        num_bytes: size of the arena.
    """

    entries: dict[str, WeightEntry]
    num_bytes: int

    @staticmethod
    def build(
        spec: ModelSpec, dtype: torch.dtype, tp_rank: int = 0, tp_size: int = 1, has_whole_experts: bool = False
    ) -> WeightTable:
        """Lay the parameters out one after the other. Arguments and errors as `checkpoint_parts`."""
        parts = checkpoint_parts(spec, tp_rank, tp_size, has_whole_experts)
        table = WeightTable.of_parts(parts, dtype, {name for name in parts if _is_exact(name, spec)})
        if spec.tied_embeddings:
            table.entries["lm_head"] = table.entries["embedding"]
        return table

    @staticmethod
    def of_parts(
        parameters: Mapping[str, tuple[CheckpointPart, ...]], dtype: torch.dtype, exact: Collection[str] = ()
    ) -> WeightTable:
        """Lay parameters out one after the other.

        Args:
            dtype: the serving dtype.
            exact: names of parameters that are float32.
        """
        model_dtype = str(dtype).removeprefix("torch.")
        entries, end = {}, 0
        for name, parts in parameters.items():
            shapes = [part.local_shape for part in parts]
            shape = (sum(s[0] for s in shapes), *shapes[0][1:])
            own_dtype = "float32" if name in exact else parts[0].arena_dtype or model_dtype
            entries[name] = WeightEntry(end, shape, own_dtype)
            end += math.prod(shape) * _ARENA_DTYPES[own_dtype].itemsize
            end += -end % ALIGNMENT_BYTES
        return WeightTable(entries, end)

    def views(self, arena: Tensor) -> dict[str, Tensor]:
        """Make views of the parameters in the arena (uint8, at least ``num_bytes``)."""
        assert arena.dtype == torch.uint8, f"an arena is bytes, not {arena.dtype}"
        assert arena.numel() >= self.num_bytes, f"an arena of {arena.numel()} bytes does not hold {self.num_bytes}"
        return {name: _view(arena, entry) for name, entry in self.entries.items()}


def _is_exact(name: str, spec: ModelSpec) -> bool:
    """Whether a parameter is float32 in every serving dtype: sinks, and a router where small differences choose."""
    kind = name.rpartition(".")[2]
    if kind == "sinks":
        return True
    return kind in ("router", "router_bias") and spec.experts is not None and spec.experts.has_bias


def _view(arena: Tensor, entry: WeightEntry) -> Tensor:
    dtype = _ARENA_DTYPES[entry.dtype]
    num_bytes = math.prod(entry.shape) * dtype.itemsize
    return arena[entry.offset : entry.offset + num_bytes].view(dtype).view(entry.shape)


def checkpoint_parts(
    spec: ModelSpec, tp_rank: int = 0, tp_size: int = 1, has_whole_experts: bool = False
) -> dict[str, tuple[CheckpointPart, ...]]:
    """Map each parameter of a rank to the checkpoint's tensors that it is stacked from, first to last row.

    Args:
        has_whole_experts: see `TensorParallel`.

    Raises:
        ModelError: ``tp_size`` ranks cannot share the model evenly.
    """
    return dict(Sharding(spec, tp_rank, tp_size, has_whole_experts).parameters())


class _Slice(NamedTuple):
    """A rank's part of a dimension: the size of the whole dimension, and begin and end of the part."""

    size: int
    bounds: list[int]


class Sharding:
    """Names and slices of one rank's parameters."""

    def __init__(self, spec: ModelSpec, rank: int, size: int, has_whole_experts: bool) -> None:
        if has_whole_experts and spec.experts is None:
            raise ModelError(f"model.expert_parallel: {spec.architecture} has no experts here; leave it out")
        self.spec, self.rank, self.size, self.has_whole_experts = spec, rank, size, has_whole_experts

    def parameters(self) -> Iterator[Parameter]:
        spec = self.spec
        vocab = vocab_shard(spec.vocab_size, self.rank, self.size)
        yield "embedding", (_part(EMBEDDING, (spec.vocab_size, spec.hidden_size), *vocab),)
        for layer in range(spec.num_layers):
            for name, parts in self._layer(layer, f"model.layers.{layer}."):
                yield f"layers.{layer}.{name}", parts
        yield self._norm("final", "model.norm")
        if spec.kv_format is not None and spec.kv_format.scale_names is not None:
            # A number of a mixed key is at most that often the largest of the key (`RotaryEmbedding.mix`).
            growths = math.sqrt(num_mixed_pairs(spec.head_dim)), 1.0
            yield (
                "kv_scales",
                tuple(
                    KVScalePart(f"model.layers.{layer}.{name}", (spec.num_kv_heads,), 0, *self.kv_heads(), growth)
                    for layer in range(spec.num_layers)
                    for name, growth in zip(spec.kv_format.scale_names, growths, strict=True)
                ),
            )
        if spec.family.has_sinks:
            heads = self.share(spec.num_heads, "num_attention_heads")
            names = (f"model.layers.{layer}.self_attn.sinks" for layer in range(spec.num_layers))
            yield "sinks", tuple(_part(name, (spec.num_heads,), *heads) for name in names)
        if not spec.tied_embeddings:
            head = _part(LM_HEAD, (spec.vocab_size, spec.hidden_size), *vocab)
            yield "lm_head", (head if spec.weight_format is None else head_part(spec.weight_format, head),)

    def _layer(self, layer: int, prefix: str) -> Iterator[Parameter]:
        spec, family, head_dim = self.spec, self.spec.family, self.spec.head_dim
        q_rows = [head * head_dim for head in self.share(spec.num_heads, "num_attention_heads")]
        kv_rows = [head * head_dim for head in self.kv_heads()]
        q_size, kv_size = spec.num_heads * head_dim, spec.num_kv_heads * head_dim
        attention, mlp = f"{prefix}self_attn.", f"{prefix}{family.mlp}."
        q, k = _Slice(q_size, q_rows), _Slice(kv_size, kv_rows)
        for place, name in asdict(family.norms).items():
            if name is not None:
                yield self._norm(place, f"{prefix}{name}")
        yield from self._column_parallel("qkv", spec.qkv_bias, attention, family.qkv, [q, k, k], spec.weight_format)
        if family.qk_norm is not None and spec.has_qk_norm:
            whole = _Slice(head_dim, [0, head_dim])
            for name, source, rows in zip(("q_norm", "k_norm"), family.qk_norm_names, (q, k), strict=True):
                size, bounds = whole if family.qk_norm == "head" else rows
                shape: tuple[int, ...] = (size,)
                if family.qk_norm == "own":
                    shape, bounds = (size // head_dim, head_dim), [row // head_dim for row in bounds]
                yield name, (_part(f"{attention}{source}.weight", shape, *bounds),)
        yield from self._row_parallel("o", spec.o_bias, f"{attention}{family.o}", q, spec.weight_format)
        if spec.experts is not None and spec.experts.layers[layer]:
            yield from self._experts(mlp, spec.experts)
            if spec.experts.shared_size:
                yield from self._shared_expert(prefix, spec.experts)
            return
        if family.curve:
            yield "curve", tuple(CheckpointNumber(f"{mlp}{name}", (1,), 0, 0, 1) for name in family.curve)
        up = _Slice(spec.intermediate_size, list(self.share(spec.intermediate_size, family.width_key)))
        ups = [up] * (2 if family.is_gated else 1)
        yield from self._column_parallel("up", spec.mlp_bias, mlp, family.up, ups, spec.weight_format)
        yield from self._row_parallel("down", spec.mlp_bias, f"{mlp}{family.down}", up, spec.weight_format)

    def _experts(self, prefix: str, experts: Experts) -> Iterator[Parameter]:
        """Stack the experts' matrices: ``gate | up`` of one after the other, then their down projections."""
        hidden, family = self.spec.hidden_size, self.spec.family
        local, columns = (0, experts.num_experts), (0, experts.inner_size)
        if self.has_whole_experts:
            local = self.share(experts.num_experts, "number of experts")
        else:
            columns = self.share(experts.inner_size, "width of experts")
        inner = _Slice(experts.inner_size, list(columns))
        yield "router", (_part(f"{prefix}{family.router}.weight", (experts.num_experts, hidden)),)
        if experts.has_bias:
            bias = CheckpointVector(f"{prefix}{family.router_bias}", (experts.num_experts,), 0, 0, experts.num_experts)
            yield "router_bias", (bias,)
        if family.has_expert_biases:
            yield "logit_bias", (_part(f"{prefix}{family.router}.bias", (experts.num_experts,)),)
            yield from self._expert_biases(prefix, experts, local, inner)
        up_parts, down_parts = self._expert_parts(prefix, experts, local, inner)
        # Inputs of experts stay as they are or have scales of their own, so those of the checkpoint are not read.
        expert_format = self.spec.weight_format and self.spec.weight_format.with_own_inputs()
        yield from matrix_parameters(expert_format, "up", up_parts)
        yield from matrix_parameters(expert_format, "down", down_parts)

    def _expert_biases(
        self, prefix: str, experts: Experts, local: tuple[int, int], inner: _Slice
    ) -> Iterator[Parameter]:
        """Biases of ``gate | up`` and of the down projections; of ranks with slices, the first adds the latter."""
        assert self.spec.family.stacked_experts is not None, "biases are stacked as the matrices are"
        up, down = (f"{prefix}{name}_bias" for name in self.spec.family.stacked_experts)
        count, hidden = experts.num_experts, self.spec.hidden_size
        start, stop = inner.bounds
        yield "up_bias", (ColumnExpertsPart(up, (count, 2 * inner.size), 1, start, stop, 2, *local),)
        if self.has_whole_experts or self.rank == 0:
            yield "down_bias", (ColumnExpertsPart(down, (count, hidden), 1, 0, hidden, 1, *local),)

    def _shared_expert(self, prefix: str, experts: Experts) -> Iterator[Parameter]:
        spec, family = self.spec, self.spec.family
        up, down = family.shared_matrices or (family.up, family.down)
        shared = f"{prefix}{family.shared_expert}"
        rows = _Slice(experts.shared_size, list(self.share(experts.shared_size, "width of the shared expert")))
        yield from self._column_parallel("shared_up", False, f"{shared}.", up, [rows] * 2, spec.weight_format)
        yield from self._row_parallel("shared_down", False, f"{shared}.{down}", rows, spec.weight_format)
        if experts.has_shared_gate:
            yield "shared_gate", (_part(f"{shared}_gate.weight", (1, spec.hidden_size)),)

    def _expert_parts(
        self, prefix: str, experts: Experts, local: tuple[int, int], inner: _Slice
    ) -> tuple[tuple[CheckpointPart, ...], tuple[CheckpointPart, ...]]:
        """Return the tensors of ``gate | up`` and of the down projections, of one expert after the other."""
        hidden, family, count = self.spec.hidden_size, self.spec.family, experts.num_experts
        if family.stacked_experts is not None and family.has_expert_biases:
            up, down = (f"{prefix}{name}" for name in family.stacked_experts)
            start, stop = inner.bounds
            if self.spec.has_mxfp4_experts:
                return (
                    (Mxfp4ExpertsPart(up, (count, 2 * inner.size, hidden), 1, start, stop, 2, *local),),
                    (Mxfp4ExpertsPart(down, (count, hidden, inner.size), 2, start, stop, 1, *local),),
                )
            return (
                (ColumnExpertsPart(up, (count, hidden, 2 * inner.size), 1, start, stop, 2, *local),),
                (ColumnExpertsPart(down, (count, inner.size, hidden), 2, start, stop, 1, *local),),
            )
        if family.stacked_experts is not None:
            up, down = (f"{prefix}{name}" for name in family.stacked_experts)
            up_shape, down_shape = (count, 2 * inner.size, hidden), (count, hidden, inner.size)
            start, stop = inner.bounds
            return (
                (StackedExpertsPart(up, up_shape, 1, start, stop, 2, *local),),
                (StackedExpertsPart(down, down_shape, 2, start, stop, 1, *local),),
            )
        names = [f"{prefix}experts.{expert}." for expert in range(*local)]
        ups = (f"{name}{source}.weight" for name in names for source in family.up)
        downs = (f"{name}{family.down}.weight" for name in names)
        return (
            tuple(_part(up, (inner.size, hidden), *inner.bounds) for up in ups),
            tuple(CheckpointPart(down, (hidden, inner.size), 1, *inner.bounds) for down in downs),
        )

    def _norm(self, place: str, source: str) -> Parameter:
        names = ("weight", "bias") if self.spec.family.has_norm_bias else ("weight",)
        return f"{place}_norm", tuple(_part(f"{source}.{name}", (self.spec.hidden_size,)) for name in names)

    def _column_parallel(
        self,
        name: str,
        bias: bool,
        prefix: str,
        sources: tuple[str, ...],
        slices: list[_Slice],
        weight_format: Fp8Format | None,
    ) -> Iterator[Parameter]:
        """Stack slices of one tensor each, or of the only source, which has the rows of all of them."""
        hidden = self.spec.hidden_size
        places = []
        if len(sources) == 1:
            total = sum(rows.size for rows in slices)
            starts = accumulate((rows.size for rows in slices[:-1]), initial=0)
            for begin, rows in zip(starts, slices, strict=True):
                places.append((f"{prefix}{sources[0]}", total, [begin + row for row in rows.bounds]))
        else:
            for source, rows in zip(sources, slices, strict=True):
                places.append((f"{prefix}{source}", rows.size, rows.bounds))
        weights = tuple(_part(f"{source}.weight", (size, hidden), *bounds) for source, size, bounds in places)
        yield from matrix_parameters(weight_format, name, weights)
        if bias:
            yield f"{name}_bias", tuple(_part(f"{source}.bias", (size,), *bounds) for source, size, bounds in places)

    def _row_parallel(
        self, name: str, bias: bool, source: str, columns: _Slice, weight_format: Fp8Format | None
    ) -> Iterator[Parameter]:
        hidden = self.spec.hidden_size
        weight = CheckpointPart(f"{source}.weight", (hidden, columns.size), 1, *columns.bounds)
        yield from matrix_parameters(weight_format, name, (weight,))
        if bias:
            yield f"{name}_bias", (_part(f"{source}.bias", (hidden,)),)

    def share(self, total: int, key: str) -> tuple[int, int]:
        """Return begin and end of a rank's part of ``total``, which ``key`` of config.json states."""
        if total % self.size:
            raise ModelError(f"{key} {total} cannot be shared evenly by {self.size} tensor-parallel ranks")
        share = total // self.size
        return self.rank * share, (self.rank + 1) * share

    def kv_heads(self) -> tuple[int, int]:
        """Choose a rank's KV heads; if there are more ranks than heads, neighbouring ranks hold the same head."""
        if self.size > self.spec.num_kv_heads and self.size % self.spec.num_kv_heads == 0:
            head = self.rank * self.spec.num_kv_heads // self.size
            return head, head + 1
        return self.share(self.spec.num_kv_heads, "num_key_value_heads")


def _part(name: str, shape: tuple[int, ...], start: int = 0, stop: int | None = None) -> CheckpointPart:
    """Make a part of rows ``start .. stop`` of a tensor, by default all rows."""
    return CheckpointPart(name, shape, 0, start, shape[0] if stop is None else stop)
