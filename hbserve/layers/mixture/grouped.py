"""Triton kernels for the products of experts: each expert's weights are read once for all of its tokens.

One kernel computes gate, up and the activation, one the down projection, weighted. A single token takes the kernels
of `hbserve.layers.mixture.one_token`. More tokens are grouped by expert (`hbserve.layers.mixture.routing`); a product
writes one row for each pair of token and expert, and a last kernel sums the rows of a token. So every sum has a fixed
order.

All sizes of memory follow from the number of tokens, so steps can be captured in CUDA graphs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.layers.mixture.few_tokens import TurnedTiles, mix_pairs_turned
from hbserve.layers.mixture.many_tokens import ChainedTiles, ScaledTiles, mix_pairs_chained, mix_pairs_scaled
from hbserve.layers.mixture.one_token import Norm, activate, mix_row, scales_of
from hbserve.layers.mixture.plain import ExpertWeights, router_logits
from hbserve.layers.mixture.routing import Choice, Groups, choose, group_pairs, max_tiles
from hbserve.model_families.declaration import Activation, Experts
from hbserve.platform.cuda_driver import overlaps

ACTIVATIONS: tuple[Activation, ...] = ("silu", "clamped_swiglu")
"""Those that the kernels compute."""

_SLICE_TOKENS = 8192
"""Tokens that are computed at a time: enough for full speed, and a bound of the memory for rows of pairs."""

_BLOCK_COLUMNS = 1024


class _Tiles(NamedTuple):
    """Launch shape of both products: rows and columns of a tile (gate and up count as two), step of the inner sum."""

    rows: int
    columns: int
    step: int
    num_warps: int
    num_stages: int


_TILES = (
    (8, _Tiles(16, 128, 128, 4, 3)),
    (16, _Tiles(32, 128, 128, 4, 3)),
    (48, _Tiles(64, 128, 64, 4, 4)),
)
"""By the mean number of pairs of an expert, up to which they are used: from public tunings of such kernels on H200."""

_MANY_PAIRS = ChainedTiles(128, 64, 8, 4)

_FEW_IN_FP8 = (24, TurnedTiles(16, 128, up=(4, 3), down=(4, 3))), (48, TurnedTiles(32, 128, up=(4, 3), down=(4, 3)))
"""For FP8 weights, up to these means; from a sweep on an H200."""

_MANY_IN_ROWS = 96, ChainedTiles(128, 128, 8, 4)
_MANY_IN_BLOCKS = (300, ScaledTiles(64, up=(4, 3), down=(4, 4))), (math.inf, ScaledTiles(128, up=(8, 3), down=(8, 4)))
"""For FP8 weights with scales of rows, from that mean on; and of blocks, up to these. From sweeps on an H200."""

_FLOAT32 = _Tiles(32, 64, 32, 4, 2)


def _tiles(
    num_pairs: int, experts: Experts, dtype: torch.dtype, weights: ExpertWeights
) -> _Tiles | TurnedTiles | ScaledTiles | ChainedTiles:
    if dtype == torch.float32:
        return _FLOAT32
    mean = num_pairs / experts.num_experts  # over all experts, since other ranks have their share of the pairs
    if weights.up_bias is not None:  # only these kernels add biases
        return next((tiles for pairs, tiles in _TILES if mean <= pairs), _TILES[-1][1])
    if weights.up_scale is None:
        return next((tiles for pairs, tiles in _TILES if mean <= pairs), _MANY_PAIRS)
    min_in_rows, in_rows = _MANY_IN_ROWS
    if weights.up_scale.dim() == 1 and mean > min_in_rows:
        return in_rows
    return next(tiles for pairs, tiles in _FEW_IN_FP8 + _MANY_IN_BLOCKS if mean <= pairs)


@triton.jit
def _add_product(  # type: ignore[no-untyped-def]
    total, values, weights, scale, row, mask, begin, scale_rows: tl.constexpr, num_scales: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Add ``values @ weights`` to ``total``, times the scales of the weights where each block has one."""
    weights = weights.to(values.dtype)
    if num_scales <= 1:
        total = tl.dot(values, weights, total, input_precision=precision)
    else:
        scales = tl.load(scale + (row // scale_rows) * num_scales + begin // 128, mask=mask, other=0.0)
        total += tl.dot(values, weights, input_precision=precision) * scales[None, :]
    return total


@triton.jit
def _clamped_swiglu(gate, up, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute gpt-oss's activation, with the roundings of `hbserve.layers.activations`."""
    gate = tl.minimum(gate.to(dtype).to(tl.float32), 7.0)
    up = tl.minimum(tl.maximum(up.to(dtype).to(tl.float32), -7.0), 7.0)
    exponent = (gate * 1.702).to(dtype).to(tl.float32)
    share = (1.0 / (1.0 + tl.exp(-exponent))).to(dtype).to(tl.float32)
    return (up + 1.0).to(dtype) * (gate * share).to(dtype)


@triton.jit
def _grouped_up_kernel(  # type: ignore[no-untyped-def]
    x, weight, scale, bias, pairs, tile_experts, ends, num_tiles, out, num_columns, num_chosen, num_blocks,
    size: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, step: tl.constexpr, scale_rows: tl.constexpr,
    num_scales: tl.constexpr, precision: tl.constexpr, has_bias: tl.constexpr, is_clamped: tl.constexpr,
    overlap: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // num_blocks
    column = (tl.program_id(0) % num_blocks) * columns + tl.arange(0, columns)
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    if tile < tl.load(num_tiles):
        expert = tl.load(tile_experts + tile).to(tl.int64)
        row = tile * rows + tl.arange(0, rows)
        in_rows, in_columns = row < tl.load(ends + expert), column < num_columns
        pair = tl.load(pairs + row, mask=in_rows, other=0)
        lanes = tl.arange(0, step)
        inputs = x + (pair // num_chosen).to(tl.int64)[:, None] * size + lanes[None, :]
        gate_row = expert * 2 * num_columns + column
        up_row = gate_row + num_columns
        gates = weight + gate_row[None, :] * size + lanes[:, None]
        ups = gates + num_columns.to(tl.int64) * size
        gate = tl.zeros([rows, columns], tl.float32)
        up = tl.zeros([rows, columns], tl.float32)
        for begin in range(0, size, step):
            in_row = lanes < size - begin
            values = tl.load(inputs + begin, mask=in_rows[:, None] & in_row[None, :], other=0.0)
            mask = in_columns[None, :] & in_row[:, None]
            gate_weights = tl.load(gates + begin, mask=mask, other=0.0)
            up_weights = tl.load(ups + begin, mask=mask, other=0.0)
            gate = _add_product(
                gate, values, gate_weights, scale, gate_row, in_columns, begin, scale_rows, num_scales, precision
            )
            up = _add_product(
                up, values, up_weights, scale, up_row, in_columns, begin, scale_rows, num_scales, precision
            )
        if num_scales == 1:
            gate *= tl.load(scale + gate_row // scale_rows, mask=in_columns, other=0.0)[None, :]
            up *= tl.load(scale + up_row // scale_rows, mask=in_columns, other=0.0)[None, :]
        target = out + pair.to(tl.int64)[:, None] * num_columns + column[None, :]
        if has_bias:
            gate += tl.load(bias + gate_row, mask=in_columns, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias + up_row, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if is_clamped:
            activated = _clamped_swiglu(gate, up, out.dtype.element_ty)
        else:
            activated = activate(gate, up, out.dtype.element_ty)
        tl.store(target, activated, mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def _grouped_down_kernel(  # type: ignore[no-untyped-def]
    x, weight, scale, bias, pairs, tile_experts, ends, num_tiles, weights, out, num_columns, num_blocks,
    size: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, step: tl.constexpr, scale_rows: tl.constexpr,
    num_scales: tl.constexpr, precision: tl.constexpr, has_bias: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // num_blocks
    column = (tl.program_id(0) % num_blocks) * columns + tl.arange(0, columns)
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    if tile < tl.load(num_tiles):
        expert = tl.load(tile_experts + tile).to(tl.int64)
        row = tile * rows + tl.arange(0, rows)
        in_rows, in_columns = row < tl.load(ends + expert), column < num_columns
        pair = tl.load(pairs + row, mask=in_rows, other=0).to(tl.int64)
        lanes = tl.arange(0, step)
        inputs = x + pair[:, None] * size + lanes[None, :]
        matrix_row = expert * num_columns + column
        places = weight + matrix_row[None, :] * size + lanes[:, None]
        total = tl.zeros([rows, columns], tl.float32)
        for begin in range(0, size, step):
            in_row = lanes < size - begin
            values = tl.load(inputs + begin, mask=in_rows[:, None] & in_row[None, :], other=0.0)
            mask = in_columns[None, :] & in_row[:, None]
            matrix = tl.load(places + begin, mask=mask, other=0.0)
            total = _add_product(
                total, values, matrix, scale, matrix_row, in_columns, begin, scale_rows, num_scales, precision
            )
        if num_scales == 1:
            total *= tl.load(scale + matrix_row // scale_rows, mask=in_columns, other=0.0)[None, :]
        if has_bias:
            total += tl.load(bias + matrix_row, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        total *= tl.load(weights + pair, mask=in_rows, other=0.0).to(tl.float32)[:, None]
        target = out + pair[:, None] * num_columns + column[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    rows, chosen, out, size, num_chosen: tl.constexpr, block: tl.constexpr, overlap: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    mask = columns < size
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros([block], tl.float32)
    for lane in tl.static_range(num_chosen):
        pair = token * num_chosen + lane
        is_local = tl.load(chosen + pair) >= 0  # no product has written other rows
        total += tl.load(rows + pair * size + columns, mask=mask & is_local, other=0.0).to(tl.float32)
    tl.store(out + token * size + columns, total.to(out.dtype.element_ty), mask=mask)


class GroupedExperts:
    """The experts of all layers of a model on a GPU.

    Not thread-safe: all calls launch into one stream.

    Args:
        local: first and number of this rank's experts.
        totals: int64 ``[layers, experts]``; the tokens of each expert of any rank are added.
        activation: one of `ACTIVATIONS`.
    """

    def __init__(
        self, experts: Experts, local: tuple[int, int], totals: Tensor, activation: Activation = "silu"
    ) -> None:
        self._experts, self._local, self._totals = experts, local, totals
        self._is_clamped = activation == "clamped_swiglu"
        self._counts = torch.zeros(local[1], dtype=torch.int32, device=totals.device)  # zero between two layers
        self._counter = torch.zeros(1, dtype=torch.int32, device=totals.device)  # likewise

    def mix(
        self,
        layer: int,
        x: Tensor,
        weights: ExpertWeights,
        slots: Tensor | None,
        out: Tensor,
        is_added: bool = False,
        norm: Norm | None = None,
    ) -> None:
        """Compute `hbserve.layers.mixture.plain.mix_experts` of ``x``, without the expert that computes every token.

        Args:
            x: contiguous ``[tokens, hidden]``.
            slots: int64 ``[tokens]``, negative for a padded token, whose result is zero; None: no token is padded.
            out: contiguous ``[tokens, hidden]``, receives the result.
            is_added: add the result to ``out``; for one token only.
            norm: weight ``[hidden]`` and epsilon of an RMS norm that is applied to ``x`` first; for one token only.
        """
        for begin in range(0, x.shape[0], _SLICE_TOKENS):
            rows = slice(begin, begin + _SLICE_TOKENS)
            part = None if slots is None else slots[rows]
            self._mix(layer, x[rows], weights, part, out[rows], is_added, norm)

    def _mix(
        self,
        layer: int,
        x: Tensor,
        weights: ExpertWeights,
        slots: Tensor | None,
        out: Tensor,
        is_added: bool,
        norm: Norm | None,
    ) -> None:
        totals = self._totals[layer]
        if x.shape[0] == 1 and weights.up_bias is None and not self._is_clamped:
            mix_row(x, norm, weights, self._experts, self._local, slots, totals, self._counter, out, is_added)
            return
        assert not is_added, "only the kernels for one token add their result"
        assert norm is None, "only the kernels for one token compute a norm"
        logits = router_logits(x, weights, self._experts)
        memory = self._group_memory(x, weights)
        # Between counting and `group_pairs` nothing may fail: it would leave counts behind.
        choice = choose(logits, weights.router_bias, self._experts, self._local, slots, totals, self._counts)
        group_pairs(choice, self._counts, memory.groups, memory.starts, memory.tiles.rows)
        if isinstance(memory.tiles, TurnedTiles):
            mix_pairs_turned(x, weights, choice, memory.groups, memory.tiles, memory.rows)
        elif isinstance(memory.tiles, ChainedTiles):
            mix_pairs_chained(x, weights, choice, memory.groups, memory.tiles, memory.rows)
        elif isinstance(memory.tiles, ScaledTiles):
            mix_pairs_scaled(x, weights, choice, memory.groups, memory.tiles, memory.rows)
        else:
            self._mix_pairs(x, weights, choice, memory, memory.tiles)
        overlap, num_blocks = overlaps(x.device), triton.cdiv(x.shape[1], _BLOCK_COLUMNS)
        _sum_kernel[(x.shape[0], num_blocks)](
            memory.rows, choice.experts, out, x.shape[1], self._experts.num_chosen, _BLOCK_COLUMNS, overlap,
            launch_pdl=overlap,
        )  # fmt: skip

    def _group_memory(self, x: Tensor, weights: ExpertWeights) -> _GroupMemory:
        num_pairs, num_experts = x.shape[0] * self._experts.num_chosen, self._local[1]
        tiles = _tiles(num_pairs, self._experts, x.dtype, weights)
        count = max_tiles(num_pairs, num_experts, tiles.rows)
        sizes = (count * tiles.rows, count, num_experts, 1, num_experts)
        *groups, starts = (torch.empty(size, dtype=torch.int32, device=x.device) for size in sizes)
        rows = x.new_empty(num_pairs, x.shape[1])
        return _GroupMemory(Groups(*groups), starts, tiles, rows)

    def _mix_pairs(
        self, x: Tensor, weights: ExpertWeights, choice: Choice, memory: _GroupMemory, tiles: _Tiles
    ) -> None:
        """Compute a weighted row for each pair of a token and an expert."""
        hidden, inner, num_chosen = x.shape[1], weights.down.shape[1], self._experts.num_chosen
        groups = memory.groups
        pairs = x.new_empty(x.shape[0] * num_chosen, inner)
        up, down = scales_of(weights.up, weights.up_scale), scales_of(weights.down, weights.down_scale)
        precision = "ieee" if x.dtype == torch.float32 else "tf32"  # of float32 products only
        overlap = overlaps(x.device)
        options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "launch_pdl": overlap}
        num_blocks = triton.cdiv(inner, tiles.columns // 2)
        _grouped_up_kernel[(len(groups.tile_experts) * num_blocks,)](
            x, weights.up, up.scale, weights.up if weights.up_bias is None else weights.up_bias, *groups, pairs, inner,
            num_chosen, num_blocks, hidden, tiles.rows, tiles.columns // 2, tiles.step, up.block_rows, up.num_scales,
            precision, weights.up_bias is not None, self._is_clamped, overlap, **options,
        )  # fmt: skip
        num_blocks = triton.cdiv(hidden, tiles.columns)
        _grouped_down_kernel[(len(groups.tile_experts) * num_blocks,)](
            pairs, weights.down, down.scale, pairs if weights.down_bias is None else weights.down_bias, *groups,
            choice.weights, memory.rows, hidden, num_blocks, inner,
            tiles.rows, tiles.columns, tiles.step, down.block_rows, down.num_scales, precision,
            weights.down_bias is not None, overlap, **options,
        )  # fmt: skip


class _GroupMemory(NamedTuple):
    """Memory of a grouped step. Attributes: rows: ``[pairs, hidden]``, the weighted outputs."""

    groups: Groups
    starts: Tensor
    tiles: _Tiles | TurnedTiles | ScaledTiles | ChainedTiles
    rows: Tensor
