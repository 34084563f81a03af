"""Triton kernels that make FP8 rows: after a norm, after a gate, or of rows as they are.

Each kernel does what `hbserve.layers.fp8.quantise` does, in the pass over memory that computes the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.float8 import FP8
from hbserve.layers.fp8 import Fp8Linear, Quantised
from hbserve.layers.fused import add_residual
from hbserve.platform.cuda_driver import overlaps
from hbserve.weight_format import BLOCK_SIZE

DYNAMIC, STATIC, GROUPED, BOUNDED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
"""What has one scale of inputs: each row, all rows, each 128 inputs of a row, or each row, which is clipped to a bound.
"""

_MAX_LANES = 16384
"""Values that a program holds; wider rows are computed twice, for their peak and for their values."""


@triton.jit
def to_fp8(values, inverse_scale):  # type: ignore[no-untyped-def]
    """Round float32 values times a factor to FP8, which has no infinity: they are clamped."""
    return tl.clamp(values * inverse_scale, -448.0, 448.0).to(tl.float8e4nv)


@triton.jit
def _store_fp8(  # type: ignore[no-untyped-def]
    values, out, scales, input_scale, row, first, mask, size: tl.constexpr, block: tl.constexpr,
    num_groups: tl.constexpr, mode: tl.constexpr, peak,
):  # fmt: skip
    """Store a part of a row that begins at column ``first``; ``peak`` is the row's where rows have scales."""
    columns = first + tl.arange(0, block)
    if mode == GROUPED:
        groups = tl.reshape(values, (block // 128, 128))
        peaks = tl.maximum(tl.max(tl.abs(groups), axis=1), 1e-12)
        at = first // 128 + tl.arange(0, block // 128)
        tl.store(scales + row * num_groups + at, peaks / 448.0, mask=at < num_groups)
        rounded = tl.reshape(to_fp8(groups, (448.0 / peaks)[:, None]), (block,))
    else:
        if mode == STATIC:
            step = tl.load(input_scale)
            rounded = to_fp8(values, 1.0 / step)
        else:
            peak = tl.maximum(peak, 1e-12)
            if mode == BOUNDED:
                peak = tl.minimum(peak, tl.load(input_scale))
            step = peak / 448.0
            rounded = to_fp8(values, 448.0 / peak)
        tl.store(scales + row, step)
    tl.store(out + row * size + columns, rounded, mask=mask)


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, out, scales, input_scale, stride, eps,
    size: tl.constexpr, block: tl.constexpr, num_groups: tl.constexpr, mode: tl.constexpr,
    has_residual: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    mask = columns < size
    weights = tl.load(weight + columns, mask=mask, other=0.0)
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    values = tl.load(x + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    if has_residual:
        values = add_residual(values, residual + row * size + columns, mask, x.dtype.element_ty)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / size + eps)
    values = ((values * scale).to(x.dtype.element_ty) * weights).to(tl.float32)
    peak = tl.max(tl.abs(values), axis=0)
    _store_fp8(values, out, scales, input_scale, row, 0, mask, size, block, num_groups, mode, peak)


@triton.jit
def _gated(gate_up, row, columns, mask, size: tl.constexpr, is_gated: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load columns of a row as they are, or as ``silu(gate) * up``; float32."""
    if is_gated:
        begin = gate_up + row * 2 * size + columns
        gate = tl.load(begin, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(begin + size, mask=mask, other=0.0)
        return ((gate / (1.0 + tl.exp(-gate))).to(up.dtype) * up).to(tl.float32)
    return tl.load(gate_up + row * size + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    x, out, scales, input_scale,
    size: tl.constexpr, block: tl.constexpr, num_groups: tl.constexpr, mode: tl.constexpr,
    is_gated: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, block)
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    if block >= size:
        values = _gated(x, row, lanes, lanes < size, size, is_gated)
        peak = tl.max(tl.abs(values), axis=0)
        _store_fp8(values, out, scales, input_scale, row, 0, lanes < size, size, block, num_groups, mode, peak)
    else:
        peak = 0.0
        for first in range(0, size, block):
            values = _gated(x, row, first + lanes, first + lanes < size, size, is_gated)
            peak = tl.maximum(peak, tl.max(tl.abs(values), axis=0))
        for first in range(0, size, block):
            mask = first + lanes < size
            values = _gated(x, row, first + lanes, mask, size, is_gated)
            _store_fp8(values, out, scales, input_scale, row, first, mask, size, block, num_groups, mode, peak)


@triton.jit
def _widen_kernel(  # type: ignore[no-untyped-def]
    values, scales, out, size: tl.constexpr, num_groups: tl.constexpr, scale_rows: tl.constexpr, block: tl.constexpr,
    overlap: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    mask = columns < size
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    scale = tl.load(scales + row // scale_rows * num_groups + columns // 128, mask=mask, other=0.0)
    wide = tl.load(values + row * size + columns, mask=mask, other=0.0).to(tl.float32) * scale
    tl.store(out + row * size + columns, wide.to(out.dtype.element_ty), mask=mask)


def widen(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return FP8 values ``[rows, columns]`` times their scales, those of blocks of r x 128, in another dtype."""
    num_rows, size = values.shape
    out = torch.empty(num_rows, size, dtype=dtype, device=values.device)
    block = 1024
    overlap = overlaps(values.device)
    _widen_kernel[(num_rows, triton.cdiv(size, block))](
        values, scales, out, size, scales.shape[1], num_rows // scales.shape[0], block, overlap,
        num_warps=4, launch_pdl=overlap,
    )  # fmt: skip
    return out


def mode_of(layer: Fp8Linear) -> tl.constexpr:
    """Return what has one scale of the layer's inputs."""
    if layer.has_blocks:
        return GROUPED
    if layer.max_input is not None:
        return BOUNDED
    return DYNAMIC if layer.input_scale is None else STATIC


def fp8_memory(layer: Fp8Linear, num_rows: int, num_inputs: int) -> Quantised:
    """Allocate inputs ``[rows, inputs]`` of a layer."""
    device = layer.weight.device
    num_scales = triton.cdiv(num_inputs, BLOCK_SIZE) if layer.has_blocks else 1
    return Quantised(
        torch.empty(num_rows, num_inputs, dtype=FP8, device=device),
        torch.empty(num_rows, num_scales, dtype=torch.float32, device=device),
    )


def fp8_norm(layer: Fp8Linear, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Quantised:
    """Return the layer's input: the RMS norm of ``x [rows, size]``, or of ``residual`` plus it, added in place."""
    num_rows, size = x.shape
    out = fp8_memory(layer, num_rows, size)
    block = max(BLOCK_SIZE, triton.next_power_of_2(size))
    overlap = overlaps(x.device)
    _norm_kernel[(num_rows,)](
        x, x if residual is None else residual, weight, out.values, out.scales, _input_scale(layer), x.stride(0), eps,
        size, block, out.scales.shape[1], mode_of(layer).value, residual is not None, overlap,
        num_warps=max(1, min(16, block // 256)), launch_pdl=overlap,
    )  # fmt: skip
    return out


def fp8_rows(layer: Fp8Linear, x: Tensor, out: Quantised | None = None, *, is_gated: bool = False) -> Quantised:
    """Return the layer's input: contiguous rows ``x``, or ``silu(gate) * up`` of rows ``gate | up``."""
    num_rows, size = x.shape[0], x.shape[1] // (2 if is_gated else 1)
    if out is None:
        out = fp8_memory(layer, num_rows, size)
    block = min(_MAX_LANES, max(BLOCK_SIZE, triton.next_power_of_2(size)))
    overlap = overlaps(x.device)
    _rows_kernel[(num_rows,)](
        x, out.values, out.scales, _input_scale(layer),
        size, block, out.scales.shape[1], mode_of(layer).value, is_gated, overlap,
        num_warps=max(1, min(16, block // 512)), launch_pdl=overlap,
    )  # fmt: skip
    return out


def fp8_groups(x: Tensor) -> Quantised:
    """Quantise contiguous rows, with a scale for each 128 columns."""
    return _fp8_plain_rows(x, GROUPED.value)


def fp8_tokens(x: Tensor) -> Quantised:
    """Quantise contiguous rows, with a scale for each row."""
    return _fp8_plain_rows(x, DYNAMIC.value)


def _fp8_plain_rows(x: Tensor, mode: int) -> Quantised:
    num_rows, size = x.shape
    num_scales = triton.cdiv(size, BLOCK_SIZE) if mode == GROUPED.value else 1
    values = torch.empty(num_rows, size, dtype=FP8, device=x.device)
    scales = torch.empty(num_rows, num_scales, dtype=torch.float32, device=x.device)
    block = min(_MAX_LANES, max(BLOCK_SIZE, triton.next_power_of_2(size)))
    overlap = overlaps(x.device)
    _rows_kernel[(num_rows,)](
        x, values, scales, scales, size, block, num_scales, mode, False, overlap,
        num_warps=max(1, min(16, block // 512)), launch_pdl=overlap,
    )  # fmt: skip
    return Quantised(values, scales)


def _input_scale(layer: Fp8Linear) -> Tensor:
    """Return the scale of all inputs or their bound; without either, any tensor, which is not read."""
    given = layer.input_scale if layer.bound is None else layer.bound
    return layer.scale if given is None else given
