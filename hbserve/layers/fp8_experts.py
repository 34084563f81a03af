"""Triton kernels for the products of experts that multiply FP8 by FP8, for many tokens.

They compute what `hbserve.layers.grouped_experts` does, on inputs in FP8. Tensor cores multiply FP8 twice as fast as
bfloat16, and a tile has half the bytes to read. The second matters more, because products of bfloat16 are bound by the
L2 cache here::

    bytes of a tile and step   (rows + columns) * 128             (128 + 256) * 128 = 48 KiB
    FLOPs                      2 * rows * columns * 128           8.4 million: 170 a byte, in bfloat16 85

| weights have scales of | inputs have scales of | products of 128 inputs are |
|---|---|---|
| rows | tokens | added in the tensor cores, the sums are scaled: a tile of 256 columns fits into the registers |
| blocks; also rows, where tokens are few | 128 inputs | scaled, then added in float32 |

In the second case the kernel of gate and up quantises what it has activated, because its 128 columns are one group of
the inputs of the down projection. In the first, a kernel between the products does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.float8 import FP8
from hbserve.layers.expert_routing import Choice, Groups
from hbserve.layers.expert_rows import Scales, activate, scales_of
from hbserve.layers.experts import ExpertWeights
from hbserve.layers.fp8_rows import fp8_groups, fp8_tokens, to_fp8
from hbserve.platform.cuda_driver import overlaps


class Fp8Tiles(NamedTuple):
    """Launch shapes of both products: rows of a tile; warps and loads in flight of each.

    Attributes:
        is_chained: the inputs' rows have one scale, as those of the weights, so that sums are scaled and not products.
    """

    rows: int
    up: tuple[int, int]
    down: tuple[int, int]
    is_chained: bool = False


def fp8_tiles(pairs_per_expert: float, has_blocks: bool) -> Fp8Tiles:
    """Choose the tiles by the mean number of pairs of an expert; from sweeps on an H200, with 32 to 512 pairs.

    Args:
        has_blocks: the weights have scales of blocks, not of rows.
    """
    if pairs_per_expert > 96 and not has_blocks:
        return Fp8Tiles(128, up=(8, 4), down=(8, 4), is_chained=True)
    if pairs_per_expert > 300:
        return Fp8Tiles(128, up=(8, 3), down=(8, 4))
    return Fp8Tiles(64, up=(4, 3), down=(4, 4))


@triton.jit
def _up_kernel(  # type: ignore[no-untyped-def]
    x, x_scale, weight, scale, pairs, tile_experts, ends, num_tiles, out, out_scale, num_columns, num_chosen,
    num_blocks, size: tl.constexpr, rows: tl.constexpr, scale_rows: tl.constexpr, num_scales: tl.constexpr,
    has_equal_scales: tl.constexpr, dtype: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    """Compute 128 columns of ``silu(gate) * up`` for one tile of pairs."""
    num_groups: tl.constexpr = (size + 127) // 128
    tile, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    if tile < tl.load(num_tiles):
        expert = tl.load(tile_experts + tile).to(tl.int64)
        row = tile * rows + tl.arange(0, rows)
        in_rows = row < tl.load(ends + expert)
        pair = tl.load(pairs + row, mask=in_rows, other=0)
        token = (pair // num_chosen).to(tl.int64)
        lanes = tl.arange(0, 128)
        inputs = x + token[:, None] * size + lanes[None, :]
        input_scales = x_scale + token * num_groups
        column = block * 128 + lanes
        in_columns = column < num_columns
        # Columns beyond the matrix repeat the last one: loads without a mask are simpler.
        gate_row = expert * 2 * num_columns + tl.minimum(column, num_columns - 1)
        up_row = gate_row + num_columns
        gates = weight + gate_row[None, :] * size + lanes[:, None]
        ups = gates + num_columns.to(tl.int64) * size
        gate = tl.zeros([rows, 128], tl.float32)
        up = tl.zeros([rows, 128], tl.float32)
        for group in range(num_groups):
            begin = group * 128
            if size % 128 == 0:
                values = tl.load(inputs + begin)
                gate_weights = tl.load(gates + begin)
                up_weights = tl.load(ups + begin)
            else:
                in_size = begin + lanes < size
                values = tl.load(inputs + begin, mask=in_size[None, :], other=0.0)
                gate_weights = tl.load(gates + begin, mask=in_size[:, None], other=0.0)
                up_weights = tl.load(ups + begin, mask=in_size[:, None], other=0.0)
            steps = tl.load(input_scales + group)
            if num_scales == 1:
                gate += tl.dot(values, gate_weights) * steps[:, None]
                up += tl.dot(values, up_weights) * steps[:, None]
            elif has_equal_scales:
                first = scale + (expert * 2 * num_columns + block * 128) // scale_rows * num_scales + group
                gate += tl.dot(values, gate_weights) * (steps * tl.load(first))[:, None]
                up_scale = tl.load(first + num_columns // scale_rows * num_scales)
                up += tl.dot(values, up_weights) * (steps * up_scale)[:, None]
            else:
                gate_scales = tl.load(scale + gate_row // scale_rows * num_scales + group)
                up_scales = tl.load(scale + up_row // scale_rows * num_scales + group)
                gate += tl.dot(values, gate_weights) * steps[:, None] * gate_scales[None, :]
                up += tl.dot(values, up_weights) * steps[:, None] * up_scales[None, :]
        if num_scales == 1:
            gate *= tl.load(scale + gate_row // scale_rows)[None, :]
            up *= tl.load(scale + up_row // scale_rows)[None, :]
        activated = tl.where(in_columns[None, :], activate(gate, up, dtype).to(tl.float32), 0.0)
        peaks = tl.maximum(tl.max(tl.abs(activated), axis=1), 1e-12)
        pair = pair.to(tl.int64)
        tl.store(out_scale + pair * num_blocks + block, peaks / 448.0, mask=in_rows)
        target = out + pair[:, None] * num_columns + column[None, :]
        tl.store(target, to_fp8(activated, (448.0 / peaks)[:, None]), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def _down_kernel(  # type: ignore[no-untyped-def]
    x, x_scale, weight, scale, pairs, tile_experts, ends, num_tiles, weights, out, num_columns, num_blocks,
    size: tl.constexpr, rows: tl.constexpr, scale_rows: tl.constexpr, num_scales: tl.constexpr,
    has_equal_scales: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    """Compute 128 weighted columns of the down projection for one tile of pairs."""
    num_groups: tl.constexpr = (size + 127) // 128
    tile, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    if tile < tl.load(num_tiles):
        expert = tl.load(tile_experts + tile).to(tl.int64)
        row = tile * rows + tl.arange(0, rows)
        in_rows = row < tl.load(ends + expert)
        pair = tl.load(pairs + row, mask=in_rows, other=0).to(tl.int64)
        lanes = tl.arange(0, 128)
        inputs = x + pair[:, None] * size + lanes[None, :]
        input_scales = x_scale + pair * num_groups
        column = block * 128 + lanes
        in_columns = column < num_columns
        matrix_row = expert * num_columns + tl.minimum(column, num_columns - 1)
        places = weight + matrix_row[None, :] * size + lanes[:, None]
        total = tl.zeros([rows, 128], tl.float32)
        for group in range(num_groups):
            begin = group * 128
            if size % 128 == 0:
                values = tl.load(inputs + begin)
                matrix = tl.load(places + begin)
            else:
                in_size = begin + lanes < size
                values = tl.load(inputs + begin, mask=in_size[None, :], other=0.0)
                matrix = tl.load(places + begin, mask=in_size[:, None], other=0.0)
            steps = tl.load(input_scales + group)
            if num_scales == 1:
                total += tl.dot(values, matrix) * steps[:, None]
            elif has_equal_scales:
                first = scale + (expert * num_columns + block * 128) // scale_rows * num_scales + group
                total += tl.dot(values, matrix) * (steps * tl.load(first))[:, None]
            else:
                scales = tl.load(scale + matrix_row // scale_rows * num_scales + group)
                total += tl.dot(values, matrix) * steps[:, None] * scales[None, :]
        if num_scales == 1:
            total *= tl.load(scale + matrix_row // scale_rows)[None, :]
        total *= tl.load(weights + pair, mask=in_rows, other=0.0).to(tl.float32)[:, None]
        target = out + pair[:, None] * num_columns + column[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def _up_chained_kernel(  # type: ignore[no-untyped-def]
    x, x_scale, weight, scale, pairs, tile_experts, ends, num_tiles, out, num_columns, num_chosen, num_blocks,
    size: tl.constexpr, rows: tl.constexpr, scale_rows: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    """Compute 128 columns of ``silu(gate) * up`` for one tile of pairs: gate and up take turns in one product."""
    tile, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    if tile < tl.load(num_tiles):
        expert = tl.load(tile_experts + tile).to(tl.int64)
        row = tile * rows + tl.arange(0, rows)
        in_rows = row < tl.load(ends + expert)
        pair = tl.load(pairs + row, mask=in_rows, other=0)
        token = (pair // num_chosen).to(tl.int64)
        lanes, turns = tl.arange(0, 128), tl.arange(0, 256)
        inputs = x + token[:, None] * size + lanes[None, :]
        first = expert * 2 * num_columns
        matrix_row = first + tl.minimum(block * 128 + turns // 2, num_columns - 1) + (turns % 2) * num_columns
        places = weight + matrix_row[None, :] * size + lanes[:, None]
        total = tl.zeros([rows, 256], tl.float32)
        for begin in range(0, size, 128):
            if size % 128 == 0:
                values = tl.load(inputs + begin)
                matrix = tl.load(places + begin)
            else:
                in_size = begin + lanes < size
                values = tl.load(inputs + begin, mask=in_size[None, :], other=0.0)
                matrix = tl.load(places + begin, mask=in_size[:, None], other=0.0)
            total = tl.dot(values, matrix, total)
        gate, up = tl.split(tl.reshape(total, [rows, 128, 2]))
        column = block * 128 + lanes
        in_columns = column < num_columns
        steps = tl.load(x_scale + token)[:, None]
        gate *= steps * tl.load(scale + (first + column) // scale_rows, mask=in_columns, other=0.0)[None, :]
        up *= steps * tl.load(scale + (first + num_columns + column) // scale_rows, mask=in_columns, other=0.0)[None, :]
        target = out + pair.to(tl.int64)[:, None] * num_columns + column[None, :]
        tl.store(target, activate(gate, up, out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def _down_chained_kernel(  # type: ignore[no-untyped-def]
    x, x_scale, weight, scale, pairs, tile_experts, ends, num_tiles, weights, out, num_columns, num_blocks,
    size: tl.constexpr, rows: tl.constexpr, scale_rows: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    """Compute 256 weighted columns of the down projection for one tile of pairs."""
    tile, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    if tile < tl.load(num_tiles):
        expert = tl.load(tile_experts + tile).to(tl.int64)
        row = tile * rows + tl.arange(0, rows)
        in_rows = row < tl.load(ends + expert)
        pair = tl.load(pairs + row, mask=in_rows, other=0).to(tl.int64)
        lanes = tl.arange(0, 128)
        inputs = x + pair[:, None] * size + lanes[None, :]
        column = block * 256 + tl.arange(0, 256)
        in_columns = column < num_columns
        matrix_row = expert * num_columns + tl.minimum(column, num_columns - 1)
        places = weight + matrix_row[None, :] * size + lanes[:, None]
        total = tl.zeros([rows, 256], tl.float32)
        for begin in range(0, size, 128):
            if size % 128 == 0:
                values = tl.load(inputs + begin)
                matrix = tl.load(places + begin)
            else:
                in_size = begin + lanes < size
                values = tl.load(inputs + begin, mask=in_size[None, :], other=0.0)
                matrix = tl.load(places + begin, mask=in_size[:, None], other=0.0)
            total = tl.dot(values, matrix, total)
        share = tl.load(weights + pair, mask=in_rows, other=0.0).to(tl.float32)
        share *= tl.load(x_scale + pair, mask=in_rows, other=0.0)
        total *= share[:, None] * tl.load(scale + matrix_row // scale_rows)[None, :]
        target = out + pair[:, None] * num_columns + column[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def mix_pairs(x: Tensor, weights: ExpertWeights, choice: Choice, groups: Groups, tiles: Fp8Tiles, out: Tensor) -> None:
    """Compute a weighted row for each pair of a token and an expert.

    Args:
        x: ``[tokens, hidden]``.
        weights: in FP8.
        groups: pairs in tiles of ``tiles.rows`` rows.
        out: ``[pairs, hidden]``.
    """
    mix = _mix_chained if tiles.is_chained else _mix_scaled
    up, down = scales_of(weights.up, weights.up_scale), scales_of(weights.down, weights.down_scale)
    mix(x, weights, up, down, choice, groups, tiles, out)


def _mix_chained(
    x: Tensor,
    weights: ExpertWeights,
    up: Scales,
    down: Scales,
    choice: Choice,
    groups: Groups,
    tiles: Fp8Tiles,
    out: Tensor,
) -> None:
    """Add products in the tensor cores, and scale the sums: a scale for each row of weights, and for each input row."""
    hidden, inner, overlap = x.shape[1], weights.down.shape[1], overlaps(x.device)
    rows, num_blocks, (warps, stages) = fp8_tokens(x), triton.cdiv(inner, 128), tiles.up
    pairs = x.new_empty(out.shape[0], inner)
    _up_chained_kernel[(len(groups.tile_experts) * num_blocks,)](
        rows.values, rows.scales, weights.up, up.scale, *groups, pairs, inner, choice.experts.shape[1], num_blocks,
        hidden, tiles.rows, up.block_rows, overlap, num_warps=warps, num_stages=stages, launch_pdl=overlap,
    )  # fmt: skip
    rows, num_blocks, (warps, stages) = fp8_tokens(pairs), triton.cdiv(hidden, 256), tiles.down
    _down_chained_kernel[(len(groups.tile_experts) * num_blocks,)](
        rows.values, rows.scales, weights.down, down.scale, *groups, choice.weights, out, hidden, num_blocks,
        inner, tiles.rows, down.block_rows, overlap, num_warps=warps, num_stages=stages, launch_pdl=overlap,
    )  # fmt: skip


def _mix_scaled(
    x: Tensor,
    weights: ExpertWeights,
    up: Scales,
    down: Scales,
    choice: Choice,
    groups: Groups,
    tiles: Fp8Tiles,
    out: Tensor,
) -> None:
    """Scale each product of 128 inputs before it is added."""
    hidden, inner, overlap = x.shape[1], weights.down.shape[1], overlaps(x.device)
    num_tiles, num_groups = len(groups.tile_experts), triton.cdiv(inner, 128)
    values = torch.empty(out.shape[0], inner, dtype=FP8, device=x.device)
    scales = torch.empty(out.shape[0], num_groups, dtype=torch.float32, device=x.device)
    rows, (warps, stages) = fp8_groups(x), tiles.up
    dtype = tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16
    _up_kernel[(num_tiles * num_groups,)](
        rows.values, rows.scales, weights.up, up.scale, *groups, values, scales, inner, choice.experts.shape[1],
        num_groups, hidden, tiles.rows, up.block_rows, up.num_scales, _are_equal(up, inner), dtype, overlap,
        num_warps=warps, num_stages=stages, launch_pdl=overlap,
    )  # fmt: skip
    num_blocks, (warps, stages) = triton.cdiv(hidden, 128), tiles.down
    _down_kernel[(num_tiles * num_blocks,)](
        values, scales, weights.down, down.scale, *groups, choice.weights, out, hidden, num_blocks,
        inner, tiles.rows, down.block_rows, down.num_scales, _are_equal(down, hidden), overlap,
        num_warps=warps, num_stages=stages, launch_pdl=overlap,
    )  # fmt: skip


def _are_equal(scales: Scales, num_columns: int) -> bool:
    """Whether the 128 columns of a tile have one scale for each 128 weights."""
    return scales.block_rows % 128 == 0 and num_columns % 128 == 0
