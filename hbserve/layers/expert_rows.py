"""Triton kernels for the experts of few tokens: they read rows of weights, as `hbserve.layers.one_row` does.

One kernel computes gate, up and the activation of each pair of token and expert, the other all down projections of a
token and their weighted sum.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.layers.expert_routing import Choice
from hbserve.layers.experts import ExpertWeights
from hbserve.platform.cuda_driver import overlaps

Norm = tuple[Tensor, float]
"""Weight ``[hidden]`` and epsilon of an RMS norm."""


class Scales(NamedTuple):
    """Scales of a matrix for a kernel: their memory, rows of a block, blocks of a row; 0 blocks: no scales."""

    scale: Tensor
    block_rows: int
    num_scales: int


def scales_of(matrix: Tensor, scale: Tensor | None) -> Scales:
    """Describe the scales of a matrix; None: it has none."""
    if scale is None:
        return Scales(matrix, 1, 0)
    return Scales(scale, matrix.shape[0] // scale.shape[0], 1 if scale.dim() == 1 else scale.shape[1])


@triton.jit
def activate(gate, up, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute ``silu(gate) * up`` of float32 values, with the roundings of `hbserve.layers.activations`."""
    gate = gate.to(dtype).to(tl.float32)
    return (gate / (1.0 + tl.exp(-gate))).to(dtype) * up.to(dtype)


@triton.jit
def _scaled_sum(  # type: ignore[no-untyped-def]
    products, scale, row, mask, scale_rows: tl.constexpr, num_scales: tl.constexpr, block: tl.constexpr
):
    """Sum the columns of ``products [rows, block]``, times the scales of the weights."""
    if num_scales == 0:
        total = tl.sum(products, axis=1)
    elif num_scales == 1:
        total = tl.sum(products, axis=1) * tl.load(scale + row // scale_rows, mask=mask, other=0.0)
    else:
        groups = tl.arange(0, block // 128)
        places = scale + (row // scale_rows)[:, None] * num_scales + groups[None, :]
        scales = tl.load(places, mask=mask[:, None] & (groups < num_scales)[None, :], other=0.0)
        total = tl.sum(tl.sum(tl.reshape(products, [products.shape[0], block // 128, 128]), axis=2) * scales, axis=1)
    return total


@triton.jit
def _up_kernel(  # type: ignore[no-untyped-def]
    x, norm, weight, scale, chosen, out, num_rows, num_chosen, eps,
    size: tl.constexpr, block: tl.constexpr, block_rows: tl.constexpr, scale_rows: tl.constexpr,
    num_scales: tl.constexpr, has_norm: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    pair = tl.program_id(1)
    columns = tl.arange(0, block)
    in_row = columns < size
    if has_norm:
        norm_weights = tl.load(norm + columns, mask=in_row, other=0.0)
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(chosen + pair).to(tl.int64)
    if expert >= 0:
        in_rows = rows < num_rows
        mask = in_rows[:, None] & in_row[None, :]
        row = expert * 2 * num_rows + rows
        gates = weight + row[:, None] * size + columns[None, :]
        gate = tl.load(gates, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gates + num_rows.to(tl.int64) * size, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(x + (pair // num_chosen).to(tl.int64) * size + columns, mask=in_row, other=0.0).to(tl.float32)
        if has_norm:
            rms = tl.rsqrt(tl.sum(values * values, axis=0) / size + eps)
            values = ((values * rms).to(out.dtype.element_ty) * norm_weights).to(tl.float32)
        gate = _scaled_sum(gate * values[None, :], scale, row, in_rows, scale_rows, num_scales, block)
        up = _scaled_sum(up * values[None, :], scale, row + num_rows, in_rows, scale_rows, num_scales, block)
        activated = activate(gate, up, out.dtype.element_ty)
        tl.store(out + pair.to(tl.int64) * num_rows + rows, activated, mask=in_rows)


@triton.jit
def _down_kernel(  # type: ignore[no-untyped-def]
    x, weight, scale, chosen, weights, out, num_rows, num_chosen: tl.constexpr,
    size: tl.constexpr, block: tl.constexpr, block_rows: tl.constexpr, scale_rows: tl.constexpr,
    num_scales: tl.constexpr, is_added: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    token = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, block)
    in_rows, in_row = rows < num_rows, columns < size
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros([block_rows], tl.float32)
    for lane in tl.static_range(num_chosen):
        pair = token * num_chosen + lane
        expert = tl.load(chosen + pair).to(tl.int64)
        is_local = expert >= 0
        mask = in_rows[:, None] & in_row[None, :] & is_local
        row = tl.maximum(expert, 0) * num_rows + rows
        values = tl.load(x + pair * size + columns, mask=in_row & is_local, other=0.0).to(tl.float32)
        products = tl.load(weight + row[:, None] * size + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        product = _scaled_sum(products * values[None, :], scale, row, in_rows, scale_rows, num_scales, block)
        total += product * tl.load(weights + pair).to(tl.float32)
    target = out + token * num_rows + rows
    if is_added:
        total = total.to(out.dtype.element_ty).to(tl.float32) + tl.load(target, mask=in_rows, other=0.0).to(tl.float32)
    tl.store(target, total.to(out.dtype.element_ty), mask=in_rows)


def mix_rows(
    x: Tensor, norm: Norm | None, weights: ExpertWeights, choice: Choice, pairs: Tensor, out: Tensor, is_added: bool
) -> None:
    """Compute the chosen experts of few tokens; see `hbserve.layers.grouped_experts.GroupedExperts.mix`.

    Args:
        pairs: memory ``[tokens, chosen, inner]``.
    """
    (num_tokens, num_chosen, inner), hidden = pairs.shape, x.shape[1]
    up, down = scales_of(weights.up, weights.up_scale), scales_of(weights.down, weights.down_scale)
    overlap = overlaps(x.device)
    block = max(triton.next_power_of_2(hidden), 128)
    block_rows, num_warps = _up_shape(block)
    _up_kernel[(triton.cdiv(inner, block_rows), num_tokens * num_chosen)](
        x, x if norm is None else norm[0], weights.up, up.scale, choice.experts, pairs, inner, num_chosen,
        0.0 if norm is None else norm[1], hidden, block, block_rows,
        up.block_rows, up.num_scales, norm is not None, overlap, num_warps=num_warps, launch_pdl=overlap,
    )  # fmt: skip
    block = max(triton.next_power_of_2(inner), 128)
    block_rows, num_warps = _down_shape(block)
    _down_kernel[(triton.cdiv(hidden, block_rows), num_tokens)](
        pairs, weights.down, down.scale, choice.experts, choice.weights, out, hidden, num_chosen, inner, block,
        block_rows, down.block_rows, down.num_scales, is_added, overlap, num_warps=num_warps, launch_pdl=overlap,
    )  # fmt: skip


def _up_shape(lanes: int) -> tuple[int, int]:
    """Choose rows and warps of a program that reads rows of ``lanes`` elements of gate and of up.

    As in `hbserve.layers.one_row`, whose sweep on an H200 gave 4 rows up to 2048 lanes.
    """
    block_rows = max(1, min(4, 8192 // lanes))
    return block_rows, max(1 if lanes < 4096 else 4, min(16, block_rows * lanes // 4096))


def _down_shape(lanes: int) -> tuple[int, int]:
    """Choose rows and warps of a program that reads rows of ``lanes`` elements of each of a token's experts.

    It has few programs with much to read each, so it has more warps.
    """
    block_rows = max(1, min(4, 16384 // lanes))
    return block_rows, max(4, min(16, block_rows * lanes // 2048))
