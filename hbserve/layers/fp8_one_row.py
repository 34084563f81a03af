"""An FP8 linear layer on a single row as one Triton kernel: `hbserve.layers.one_row` for FP8 weights.

The row is quantised in registers by every program, after its norm: that costs nothing beside reading the weights.

One instruction converts two FP8 numbers to float16, and one multiplies two pairs of those. A product of FP8 numbers has
8 significant bits, so it is exact in float16. Inputs are at most 7 here and not 448, so that sums do not overflow. Four
products are added in float16, to 11 bits, and those sums in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.layers.fp8 import Fp8Linear
from hbserve.layers.one_row import split_row
from hbserve.platform.cuda_driver import overlaps
from hbserve.weight_format import BLOCK_SIZE

DYNAMIC, STATIC, GROUPED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What has one scale of inputs: each row, all rows, or each 128 inputs of a row."""


_MIN_TAIL = 16
"""Lanes of the smallest second part of a row: products are added in groups of 8."""


@triton.jit
def to_fp8(values, inverse_scale):  # type: ignore[no-untyped-def]
    """Round float32 values times a factor to FP8, which has no infinity: they are clamped."""
    return tl.clamp(values * inverse_scale, -448.0, 448.0).to(tl.float8e4nv)


@triton.jit
def _narrow(values, inverse_scale):  # type: ignore[no-untyped-def]
    """Round float32 values times a factor to FP8, and return a 64th of them in float16."""
    return (to_fp8(values, inverse_scale).to(tl.float32) * 0.015625).to(tl.float16)


@triton.jit
def _narrow_groups(values, size: tl.constexpr, group: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round a vector with a scale for each group; return a 64th of the values, and 64 scales."""
    groups = tl.reshape(values, (size // group, group))
    peaks = tl.maximum(tl.max(tl.abs(groups), axis=1), 1e-12)
    return tl.reshape(_narrow(groups, (448.0 / peaks)[:, None]), (size,)), peaks / 7.0


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    weights, values, steps, scales, in_rows, first_group, num_groups, rows: tl.constexpr, size: tl.constexpr,
    group: tl.constexpr, mode: tl.constexpr,
):  # fmt: skip
    """Multiply FP8 rows ``[rows, size]`` by a vector; apply all scales if they are those of blocks."""
    products = tl.reshape(weights.to(tl.float16) * values[None, :], (rows, size // 8, 4, 2))
    products = tl.reshape(tl.sum(products, axis=2).to(tl.float32), (rows, size // 4))
    if mode == GROUPED:
        at = first_group + tl.arange(0, size // group)
        block_scales = tl.load(
            scales[:, None] + at[None, :], mask=in_rows[:, None] & (at < num_groups)[None, :], other=0.0
        )
        sums = tl.sum(tl.reshape(products, (rows, size // group, group // 4)), axis=2)
        return tl.sum(sums * block_scales * steps[None, :], axis=1)
    return tl.sum(products, axis=1)


@triton.jit
def _fp8_one_row_kernel(  # type: ignore[no-untyped-def]
    x, weight, scale, input_scale, bias, norm, residual, out, num_rows, num_groups, eps,
    size: tl.constexpr, block: tl.constexpr, tail: tl.constexpr, block_rows: tl.constexpr,
    scale_rows: tl.constexpr, mode: tl.constexpr, has_bias: tl.constexpr,
    has_norm: tl.constexpr, has_residual: tl.constexpr, gated: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    in_rows = rows < num_rows
    begins = weight + rows[:, None].to(tl.int64) * size
    up_begins = begins + num_rows.to(tl.int64) * size
    # Load what no kernel writes before the wait, in two parts where ``size`` is not a power of two.
    columns = tl.arange(0, block)
    mask = in_rows[:, None] & (columns < size)[None, :]
    weights = tl.load(begins + columns[None, :], mask=mask, other=0.0)
    if gated:
        up_weights = tl.load(up_begins + columns[None, :], mask=mask, other=0.0)
    if has_norm:
        norm_weights = tl.load(norm + columns, mask=columns < size, other=0.0)
    if tail > 0:
        tail_columns = block + tl.arange(0, tail)
        tail_mask = in_rows[:, None] & (tail_columns < size)[None, :]
        tail_weights = tl.load(begins + tail_columns[None, :], mask=tail_mask, other=0.0)
        if gated:
            tail_up_weights = tl.load(up_begins + tail_columns[None, :], mask=tail_mask, other=0.0)
        if has_norm:
            tail_norm_weights = tl.load(norm + tail_columns, mask=tail_columns < size, other=0.0)
    row_scales = scale + (rows // scale_rows) * num_groups
    up_row_scales = scale + ((rows + num_rows) // scale_rows) * num_groups
    if has_bias:
        biases = tl.load(bias + rows, mask=in_rows, other=0.0).to(tl.float32)
        if gated:
            up_biases = tl.load(bias + num_rows + rows, mask=in_rows, other=0.0).to(tl.float32)
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    values = tl.load(x + columns, mask=columns < size, other=0.0).to(tl.float32)
    if tail > 0:
        tail_values = tl.load(x + tail_columns, mask=tail_columns < size, other=0.0).to(tl.float32)
    if has_residual:
        residuals = tl.load(residual + rows, mask=in_rows, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    if has_norm:
        square = tl.sum(values * values, axis=0)
        if tail > 0:
            square += tl.sum(tail_values * tail_values, axis=0)
        norm_scale = tl.rsqrt(square / size + eps)
        values = ((values * norm_scale).to(dtype) * norm_weights).to(tl.float32)
        if tail > 0:
            tail_values = ((tail_values * norm_scale).to(dtype) * tail_norm_weights).to(tl.float32)
    group: tl.constexpr = 128 if block >= 128 else block
    tail_group: tl.constexpr = 128 if tail >= 128 else tail
    if mode == GROUPED:
        values, steps = _narrow_groups(values, block, group)
        if tail > 0:
            tail_values, tail_steps = _narrow_groups(tail_values, tail, tail_group)
    else:
        if mode == STATIC:
            step = tl.load(input_scale)
        else:
            peak = tl.max(tl.abs(values), axis=0)
            if tail > 0:
                peak = tl.maximum(peak, tl.max(tl.abs(tail_values), axis=0))
            step = tl.maximum(peak, 1e-12) / 448.0
        values = _narrow(values, 1.0 / step)
        if tail > 0:
            tail_values = _narrow(tail_values, 1.0 / step)
        step *= 64.0
        steps, tail_steps = step, step
    total = _products(weights, values, steps, row_scales, in_rows, 0, num_groups, block_rows, block, group, mode)
    if tail > 0:
        total += _products(
            tail_weights, tail_values, tail_steps, row_scales, in_rows, block // 128, num_groups, block_rows, tail,
            tail_group, mode,
        )  # fmt: skip
    if mode != GROUPED:
        total *= step * tl.load(row_scales, mask=in_rows, other=0.0)
    if has_bias:
        total += biases
    if gated:
        up = _products(up_weights, values, steps, up_row_scales, in_rows, 0, num_groups, block_rows, block, group, mode)
        if tail > 0:
            up += _products(
                tail_up_weights, tail_values, tail_steps, up_row_scales, in_rows, block // 128, num_groups,
                block_rows, tail, tail_group, mode,
            )  # fmt: skip
        if mode != GROUPED:
            up *= step * tl.load(up_row_scales, mask=in_rows, other=0.0)
        if has_bias:
            up += up_biases
        gate = total.to(dtype).to(tl.float32)
        total = ((gate / (1.0 + tl.exp(-gate))).to(dtype) * up.to(dtype)).to(tl.float32)
    if has_residual:
        total = total.to(dtype).to(tl.float32) + residuals
    tl.store(out + rows, total.to(dtype), mask=in_rows)


def fp8_one_row(
    layer: Fp8Linear,
    x: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    is_gated: bool = False,
    out: Tensor | None = None,
    has_bias: bool = True,
) -> Tensor:
    """Compute the layer on a single row; arguments and result as `hbserve.layers.one_row.one_row_linear`."""
    num_rows, size = layer.weight.shape
    num_rows = num_rows // 2 if is_gated else num_rows
    assert size >= BLOCK_SIZE or not layer.has_blocks, "a row in two parts is cut between blocks"
    bias = layer.bias if has_bias else None
    if residual is not None:
        assert not is_gated, "a gated layer has no residual"
        assert out is None, "the result goes to residual, not to out"
        out = residual
    if out is None:
        out = torch.empty(1, num_rows, dtype=x.dtype, device=x.device)
    block, tail = split_row(size)
    tail = max(tail, _MIN_TAIL) if tail else 0
    block_rows, num_warps = _launch_shape(block + tail, is_gated)
    overlap = overlaps(x.device)
    scale = layer.scale
    _fp8_one_row_kernel[(triton.cdiv(num_rows, block_rows),)](
        x, layer.weight, scale, scale if layer.input_scale is None else layer.input_scale,
        scale if bias is None else bias, scale if norm is None else norm, out, out,
        num_rows, scale.shape[1] if layer.has_blocks else 1, eps,
        size, block, tail, block_rows, layer.block_rows, mode_of(layer).value, bias is not None,
        norm is not None, residual is not None, is_gated, overlap,
        num_warps=num_warps, launch_pdl=overlap,
    )  # fmt: skip
    return out


def mode_of(layer: Fp8Linear) -> tl.constexpr:
    """Return what has one scale of the layer's inputs."""
    if layer.has_blocks:
        return GROUPED
    return DYNAMIC if layer.input_scale is None else STATIC


def _launch_shape(lanes: int, is_gated: bool) -> tuple[int, int]:
    """Choose rows and warps of a program: as many bytes as those of `hbserve.layers.one_row`, so twice the rows."""
    block_rows = 16 if lanes <= 2048 else 8 if lanes <= 4096 else 4
    block_rows = block_rows // 2 if is_gated else block_rows
    warps = block_rows * triton.next_power_of_2(lanes) // 8192
    return block_rows, max(1 if lanes < 4096 else 4, min(16, warps))
