"""Triton kernels for the products of experts with few tokens and weights in FP8: as fast as memory delivers weights.

A product has few rows of inputs and many columns. It is computed turned: rows of weights take the place of inputs, so
that Hopper's tensor cores read both out of shared memory, in FP8, and no thread converts a weight::

    columns of a tile [256, 128 inputs]  @  [128 inputs, 16 or 32 pairs]  ->  [256, pairs]

Inputs are in FP8, with a scale for each 128. Products of 128 inputs are scaled, then added in float32. The kernel of
gate and up quantises what it has activated, because its 128 columns are one group of inputs of the down projection.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.float8 import FP8
from hbserve.layers.fp8_rows import fp8_groups, to_fp8
from hbserve.layers.mixture.one_token import activate, scales_of
from hbserve.layers.mixture.plain import ExpertWeights
from hbserve.layers.mixture.routing import Choice, Groups
from hbserve.platform.cuda_driver import overlaps


class TurnedTiles(NamedTuple):
    """Launch shapes of both products: rows of a tile; columns of a tile of the down projection, warps, loads in flight.

    Attributes:
        up, down: warps and loads in flight.
    """

    rows: int
    down_columns: int
    up: tuple[int, int]
    down: tuple[int, int]


@triton.jit
def _turned_sum(  # type: ignore[no-untyped-def]
    inputs, input_scales, weight, scale, matrix_row, size: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    scale_rows: tl.constexpr, num_scales: tl.constexpr,
):  # fmt: skip
    """Multiply rows of weights by inputs ``[128, rows]`` at ``inputs``; return ``[columns, rows]``, scaled."""
    lanes = tl.arange(0, 128)
    places = weight + matrix_row[:, None] * size + lanes[None, :]
    scales = scale + matrix_row // scale_rows * num_scales
    total = tl.zeros([columns, rows], tl.float32)
    for group in range((size + 127) // 128):
        begin = group * 128
        if size % 128 == 0:
            values = tl.load(inputs + begin)
            matrix = tl.load(places + begin)
        else:
            in_size = begin + lanes < size
            values = tl.load(inputs + begin, mask=in_size[:, None], other=0.0)
            matrix = tl.load(places + begin, mask=in_size[None, :], other=0.0)
        steps = tl.load(input_scales + group)[None, :]
        if num_scales > 1:
            total += tl.dot(matrix, values) * (steps * tl.load(scales + group)[:, None])
        else:
            total += tl.dot(matrix, values) * steps
    if num_scales == 1:
        total *= tl.load(scales)[:, None]
    return total


@triton.jit
def _turned_up_kernel(  # type: ignore[no-untyped-def]
    x, x_scale, weight, scale, pairs, tile_experts, ends, num_tiles, out, out_scale, num_columns, num_chosen,
    num_blocks, size: tl.constexpr, rows: tl.constexpr, scale_rows: tl.constexpr, num_scales: tl.constexpr,
    dtype: tl.constexpr, overlap: tl.constexpr,
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
        inputs = x + token[None, :] * size + tl.arange(0, 128)[:, None]
        # Columns beyond the matrix repeat the last one: loads without a mask are simpler.
        lanes = tl.arange(0, 256)
        matrix_row = expert * 2 * num_columns + tl.minimum(block * 128 + lanes % 128, num_columns - 1)
        matrix_row += lanes // 128 * num_columns
        total = _turned_sum(
            inputs, x_scale + token * num_groups, weight, scale, matrix_row, size, rows, 256, scale_rows, num_scales
        )
        gate, up = tl.split(tl.permute(tl.reshape(total, [2, 128, rows]), [1, 2, 0]))
        column = block * 128 + tl.arange(0, 128)
        in_columns = column < num_columns
        activated = tl.where(in_columns[:, None], activate(gate, up, dtype).to(tl.float32), 0.0)
        peaks = tl.maximum(tl.max(tl.abs(activated), axis=0), 1e-12)
        pair = pair.to(tl.int64)
        tl.store(out_scale + pair * num_blocks + block, peaks / 448.0, mask=in_rows)
        target = out + pair[None, :] * num_columns + column[:, None]
        tl.store(target, to_fp8(activated, (448.0 / peaks)[None, :]), mask=in_rows[None, :] & in_columns[:, None])


@triton.jit
def _turned_down_kernel(  # type: ignore[no-untyped-def]
    x, x_scale, weight, scale, pairs, tile_experts, ends, num_tiles, weights, out, num_columns, num_blocks,
    size: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, scale_rows: tl.constexpr, num_scales: tl.constexpr,
    overlap: tl.constexpr,
):  # fmt: skip
    """Compute weighted columns of the down projection for one tile of pairs."""
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
        inputs = x + pair[None, :] * size + tl.arange(0, 128)[:, None]
        column = block * columns + tl.arange(0, columns)
        in_columns = column < num_columns
        matrix_row = expert * num_columns + tl.minimum(column, num_columns - 1)
        total = _turned_sum(
            inputs, x_scale + pair * num_groups, weight, scale, matrix_row, size, rows, columns, scale_rows, num_scales
        )
        total *= tl.load(weights + pair, mask=in_rows, other=0.0).to(tl.float32)[None, :]
        target = out + pair[None, :] * num_columns + column[:, None]
        tl.store(target, total.to(out.dtype.element_ty), mask=in_rows[None, :] & in_columns[:, None])


def mix_pairs_turned(
    x: Tensor, weights: ExpertWeights, choice: Choice, groups: Groups, tiles: TurnedTiles, out: Tensor
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
    _turned_up_kernel[(num_tiles * num_groups,)](
        rows.values, rows.scales, weights.up, up.scale, *groups, values, scales, inner, choice.experts.shape[1],
        num_groups, hidden, tiles.rows, up.block_rows, up.num_scales, dtype, overlap,
        num_warps=warps, num_stages=stages, launch_pdl=overlap,
    )  # fmt: skip
    num_blocks, (warps, stages) = triton.cdiv(hidden, tiles.down_columns), tiles.down
    _turned_down_kernel[(num_tiles * num_blocks,)](
        values, scales, weights.down, down.scale, *groups, choice.weights, out, hidden, num_blocks,
        inner, tiles.rows, tiles.down_columns, down.block_rows, down.num_scales, overlap,
        num_warps=warps, num_stages=stages, launch_pdl=overlap,
    )  # fmt: skip
