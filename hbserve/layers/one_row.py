"""A linear layer on a single row, with the norm before it and the gate or sum after it, as one Triton kernel.

With one row, reading the weights is all the work, and the gaps between kernels cost as much as the kernels. So one
kernel also computes the norm before a linear layer, and the gate or the residual sum after it. It requests its first
weights before the previous kernel has ended (`hbserve.platform.cuda_driver.overlaps`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.layers import fused
from hbserve.layers.linear import PlainLinear, Rows
from hbserve.platform.cuda_driver import overlaps

_MIN_PROGRAMS = 64
"""A matrix of so few rows that fewer programs would read it is read row by row."""


@triton.jit
def _one_row_linear_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, norm, residual, out, num_rows, eps,
    size: tl.constexpr, block: tl.constexpr, tail: tl.constexpr, block_rows: tl.constexpr, has_bias: tl.constexpr,
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
        scale = tl.rsqrt(square / size + eps)
        values = ((values * scale).to(dtype) * norm_weights).to(tl.float32)
        if tail > 0:
            tail_values = ((tail_values * scale).to(dtype) * tail_norm_weights).to(tl.float32)
    total = tl.sum(weights.to(tl.float32) * values[None, :], axis=1)
    if tail > 0:
        total += tl.sum(tail_weights.to(tl.float32) * tail_values[None, :], axis=1)
    if has_bias:
        total += biases
    if gated:
        up = tl.sum(up_weights.to(tl.float32) * values[None, :], axis=1)
        if tail > 0:
            up += tl.sum(tail_up_weights.to(tl.float32) * tail_values[None, :], axis=1)
        if has_bias:
            up += up_biases
        gate = total.to(dtype).to(tl.float32)
        total = ((gate / (1.0 + tl.exp(-gate))).to(dtype) * up.to(dtype)).to(tl.float32)
    if has_residual:
        total = total.to(dtype).to(tl.float32) + residuals
    tl.store(out + rows, total.to(dtype), mask=in_rows)


def one_row_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Compute ``x @ weight.T + bias`` of a single row.

    Args:
        x, weight, bias: contiguous ``[1, size]``, ``[rows, size]`` and ``[rows]``.
        norm: weights ``[size]`` of an RMS norm with ``eps`` that is applied to ``x`` first.
        residual: contiguous ``[1, rows]``; the kernel adds the result to it, in place. Not with ``gated`` or ``out``.
        gated: the rows of ``weight`` are ``gate | up``, and the result is ``silu(gate) * up``.
        out: contiguous memory for the result.

    Returns:
        ``[1, rows]``, or ``[1, rows / 2]`` if gated; ``residual`` or ``out`` itself if given.
    """
    num_rows, size = weight.shape
    num_rows = num_rows // 2 if gated else num_rows
    if residual is not None:
        assert not gated, "a gated layer has no residual"
        assert out is None, "the result goes to residual, not to out"
        out = residual
    if out is None:
        out = torch.empty(1, num_rows, dtype=x.dtype, device=x.device)
    block, tail = split_row(size)
    block_rows, num_warps = _launch_shape(block + tail, gated)
    if num_rows < _MIN_PROGRAMS * block_rows:  # a router
        block_rows = 1
    overlap = overlaps(x.device)
    _one_row_linear_kernel[(triton.cdiv(num_rows, block_rows),)](
        x, weight, weight if bias is None else bias, weight if norm is None else norm, out, out, num_rows, eps,
        size, block, tail, block_rows, bias is not None, norm is not None, residual is not None, gated, overlap,
        num_warps=num_warps, launch_pdl=overlap,
    )  # fmt: skip
    return out


class PlainKernels:
    """`hbserve.layers.linear.LinearKernels` of layers without a scheme."""

    def one_row(
        self,
        layer: PlainLinear,
        x: Tensor,
        *,
        norm: Tensor | None = None,
        eps: float = 0.0,
        residual: Tensor | None = None,
        is_gated: bool = False,
        out: Tensor | None = None,
        has_bias: bool = True,
    ) -> Tensor:
        bias = layer.bias if has_bias else None
        return one_row_linear(x, layer.weight, bias, norm=norm, eps=eps, residual=residual, gated=is_gated, out=out)

    def many_rows(self, layer: PlainLinear, rows: Rows, out: Tensor | None = None, *, has_bias: bool = True) -> Tensor:
        assert isinstance(rows, Tensor), "plain layers read tensors"
        return layer(rows, out, has_bias=has_bias)

    def norm(self, layer: PlainLinear, pending: Tensor | None, total: Tensor, weight: Tensor, eps: float) -> Tensor:
        if pending is None:
            return fused.rms_norm(total, weight, eps)
        return fused.add_rms_norm_(pending, total, weight, eps)

    def gate(self, layer: PlainLinear, gate_up: Tensor, out: Rows | None) -> Tensor:
        assert out is None or isinstance(out, Tensor), "plain layers read tensors"
        return fused.silu_and_mul(gate_up, out)

    def memory(self, layer: PlainLinear, num_rows: int, num_inputs: int) -> Tensor:
        return torch.empty(num_rows, num_inputs, dtype=layer.dtype, device=layer.weight.device)


def split_row(size: int) -> tuple[int, int]:
    """Split a row into two blocks whose sizes are powers of two; the second is 0 if one block is enough."""
    block = 1 << (size.bit_length() - 1)
    return block, triton.next_power_of_2(size - block) if size > block else 0


def _launch_shape(lanes: int, gated: bool) -> tuple[int, int]:
    """Choose rows and warps of a program; from a sweep over the matrices of 0.6B and 8B models on an H200."""
    block_rows = 8 if lanes <= 2048 else 4 if lanes <= 4096 else 2
    block_rows = block_rows // 2 if gated else block_rows
    warps = block_rows * triton.next_power_of_2(lanes) // 4096
    return block_rows, max(1 if lanes < 4096 else 4, min(16, warps))
