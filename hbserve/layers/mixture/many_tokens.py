"""Triton kernels for the products of experts with many tokens, in two forms.

*Chained*: tiles of 256 columns, added in the tensor cores. Gate and up take turns in one product, so that a tile has
256 columns and still both of what the activation needs. Such products are bound by the L2 cache, which wide tiles read
least from::

    bytes of a tile and step   (rows + columns) * step * itemsize     (128 + 256) * 64 * 2 = 48 KiB
    FLOPs                      2 * rows * columns * step              4.2 million: 85 a byte, in FP8 170

Weights in FP8 with scales of rows have inputs in FP8 with scales of tokens there; the sums are scaled.

*Scaled*: products of 128 inputs in FP8 are scaled, then added in float32, which takes registers that wide tiles lack.
The weights have scales of blocks, or of rows where a step has fewer tokens; the inputs have one for each 128. The
kernel of gate and up quantises what it has activated, because its 128 columns are one group of inputs of the down
projection.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.float8 import FP8
from hbserve.layers.fp8_rows import fp8_groups, fp8_tokens, to_fp8
from hbserve.layers.mixture.one_token import Scales, activate, scales_of
from hbserve.layers.mixture.plain import ExpertWeights
from hbserve.layers.mixture.routing import Choice, Groups
from hbserve.platform.cuda_driver import overlaps


class ChainedTiles(NamedTuple):
    """Launch shape of both products: rows of a tile, step of the inner sum, warps, loads in flight."""

    rows: int
    step: int
    num_warps: int
    num_stages: int


@triton.jit
def _inner_sum(  # type: ignore[no-untyped-def]
    inputs, places, size: tl.constexpr, rows: tl.constexpr, step: tl.constexpr
):
    """Multiply a tile: rows that begin at ``inputs [rows, step]`` by 256 columns at ``places [step, 256]``."""
    lanes = tl.arange(0, step)
    total = tl.zeros([rows, 256], tl.float32)
    for begin in range(0, size, step):
        if size % step == 0:
            values = tl.load(inputs + begin)
            matrix = tl.load(places + begin)
        else:
            in_size = begin + lanes < size
            values = tl.load(inputs + begin, mask=in_size[None, :], other=0.0)
            matrix = tl.load(places + begin, mask=in_size[:, None], other=0.0)
        total = tl.dot(values, matrix, total)
    return total


@triton.jit
def _chained_up_kernel(  # type: ignore[no-untyped-def]
    x, x_scale, weight, scale, pairs, tile_experts, ends, num_tiles, out, num_columns, num_chosen, num_blocks,
    size: tl.constexpr, rows: tl.constexpr, step: tl.constexpr, scale_rows: tl.constexpr, has_scales: tl.constexpr,
    overlap: tl.constexpr,
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
        lanes, turns = tl.arange(0, step), tl.arange(0, 256)
        inputs = x + token[:, None] * size + lanes[None, :]
        first = expert * 2 * num_columns
        matrix_row = first + tl.minimum(block * 128 + turns // 2, num_columns - 1) + (turns % 2) * num_columns
        places = weight + matrix_row[None, :] * size + lanes[:, None]
        total = _inner_sum(inputs, places, size, rows, step)
        gate, up = tl.split(tl.reshape(total, [rows, 128, 2]))
        column = block * 128 + tl.arange(0, 128)
        in_columns = column < num_columns
        if has_scales:
            steps, gate_row = tl.load(x_scale + token)[:, None], first + column
            gate *= steps * tl.load(scale + gate_row // scale_rows, mask=in_columns, other=0.0)[None, :]
            up_row = gate_row + num_columns
            up *= steps * tl.load(scale + up_row // scale_rows, mask=in_columns, other=0.0)[None, :]
        target = out + pair.to(tl.int64)[:, None] * num_columns + column[None, :]
        tl.store(target, activate(gate, up, out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def _chained_down_kernel(  # type: ignore[no-untyped-def]
    x, x_scale, weight, scale, pairs, tile_experts, ends, num_tiles, weights, out, num_columns, num_blocks,
    size: tl.constexpr, rows: tl.constexpr, step: tl.constexpr, scale_rows: tl.constexpr, has_scales: tl.constexpr,
    overlap: tl.constexpr,
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
        lanes = tl.arange(0, step)
        inputs = x + pair[:, None] * size + lanes[None, :]
        column = block * 256 + tl.arange(0, 256)
        in_columns = column < num_columns
        matrix_row = expert * num_columns + tl.minimum(column, num_columns - 1)
        places = weight + matrix_row[None, :] * size + lanes[:, None]
        total = _inner_sum(inputs, places, size, rows, step)
        share = tl.load(weights + pair, mask=in_rows, other=0.0).to(tl.float32)
        if has_scales:
            share *= tl.load(x_scale + pair, mask=in_rows, other=0.0)
            total *= tl.load(scale + matrix_row // scale_rows)[None, :]
        total *= share[:, None]
        target = out + pair[:, None] * num_columns + column[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def mix_pairs_chained(
    x: Tensor, weights: ExpertWeights, choice: Choice, groups: Groups, tiles: ChainedTiles, out: Tensor
) -> None:
    """Compute a weighted row for each pair of a token and an expert.

    Args:
        x: ``[tokens, hidden]``.
        weights: unquantised, or in FP8 with scales of rows.
        groups: pairs in tiles of ``tiles.rows`` rows.
        out: ``[pairs, hidden]``.
    """
    hidden, inner, overlap = x.shape[1], weights.down.shape[1], overlaps(x.device)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "launch_pdl": overlap}
    up, down = scales_of(weights.up, weights.up_scale), scales_of(weights.down, weights.down_scale)
    has_scales, num_blocks = up.num_scales > 0, triton.cdiv(inner, 128)
    pairs = x.new_empty(out.shape[0], inner)
    values, scales = _inputs(x, has_scales)
    _chained_up_kernel[(len(groups.tile_experts) * num_blocks,)](
        values, scales, weights.up, up.scale, *groups, pairs, inner, choice.experts.shape[1], num_blocks,
        hidden, tiles.rows, tiles.step, up.block_rows, has_scales, overlap, **options,
    )  # fmt: skip
    values, scales = _inputs(pairs, has_scales)
    num_blocks = triton.cdiv(hidden, 256)
    _chained_down_kernel[(len(groups.tile_experts) * num_blocks,)](
        values, scales, weights.down, down.scale, *groups, choice.weights, out, hidden, num_blocks,
        inner, tiles.rows, tiles.step, down.block_rows, has_scales, overlap, **options,
    )  # fmt: skip


def _inputs(x: Tensor, is_quantised: bool) -> tuple[Tensor, Tensor]:
    """Return rows as a product reads them, and their scales; plain rows have none."""
    if not is_quantised:
        return x, x
    rows = fp8_tokens(x)
    return rows.values, rows.scales


class ScaledTiles(NamedTuple):
    """Launch shapes of both products: rows of a tile; warps and loads in flight of each."""

    rows: int
    up: tuple[int, int]
    down: tuple[int, int]


@triton.jit
def _scaled_up_kernel(  # type: ignore[no-untyped-def]
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
def _scaled_down_kernel(  # type: ignore[no-untyped-def]
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


def mix_pairs_scaled(
    x: Tensor, weights: ExpertWeights, choice: Choice, groups: Groups, tiles: ScaledTiles, out: Tensor
) -> None:
    """Compute a weighted row for each pair of a token and an expert.

    Args:
        x: ``[tokens, hidden]``.
        weights: in FP8.
        groups: pairs in tiles of ``tiles.rows`` rows.
        out: ``[pairs, hidden]``.
    """
    up, down = scales_of(weights.up, weights.up_scale), scales_of(weights.down, weights.down_scale)
    hidden, inner, overlap = x.shape[1], weights.down.shape[1], overlaps(x.device)
    num_tiles, num_groups = len(groups.tile_experts), triton.cdiv(inner, 128)
    values = torch.empty(out.shape[0], inner, dtype=FP8, device=x.device)
    scales = torch.empty(out.shape[0], num_groups, dtype=torch.float32, device=x.device)
    rows, (warps, stages) = fp8_groups(x), tiles.up
    dtype = tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16
    _scaled_up_kernel[(num_tiles * num_groups,)](
        rows.values, rows.scales, weights.up, up.scale, *groups, values, scales, inner, choice.experts.shape[1],
        num_groups, hidden, tiles.rows, up.block_rows, up.num_scales, _are_equal(up, inner), dtype, overlap,
        num_warps=warps, num_stages=stages, launch_pdl=overlap,
    )  # fmt: skip
    num_blocks, (warps, stages) = triton.cdiv(hidden, 128), tiles.down
    _scaled_down_kernel[(num_tiles * num_blocks,)](
        values, scales, weights.down, down.scale, *groups, choice.weights, out, hidden, num_blocks,
        inner, tiles.rows, down.block_rows, down.num_scales, _are_equal(down, hidden), overlap,
        num_warps=warps, num_stages=stages, launch_pdl=overlap,
    )  # fmt: skip


def _are_equal(scales: Scales, num_columns: int) -> bool:
    """Whether the 128 columns of a tile have one scale for each 128 weights."""
    return scales.block_rows % 128 == 0 and num_columns % 128 == 0
