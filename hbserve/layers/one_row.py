"""Linear layers of a single row, with what comes before and after them, as one Triton kernel.

With one row, reading the weights is all the work, and the gaps between kernels cost as much as the
kernels. So the norm before a linear layer, and the gate or the residual sum after it, are done in
the same kernel; and its first weights are on their way before the kernel in front of it has ended
(`hbserve.layers.overlap`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.layers.overlap import overlaps


@triton.jit
def _one_row_linear_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    norm,
    residual,
    out,
    num_rows,
    eps,
    size: tl.constexpr,
    block: tl.constexpr,
    block_rows: tl.constexpr,
    has_bias: tl.constexpr,
    has_norm: tl.constexpr,
    has_residual: tl.constexpr,
    gated: tl.constexpr,
    overlap: tl.constexpr,
):
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    columns = tl.arange(0, block)
    in_row = columns < size
    there = (rows[:, None] < num_rows) & in_row[None, :]
    places = rows[:, None].to(tl.int64) * size + columns[None, :]
    weights = tl.load(weight + places, mask=there, other=0.0)
    if gated:
        up_weights = tl.load(weight + num_rows.to(tl.int64) * size + places, mask=there, other=0.0)
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    values = tl.load(x + columns, mask=in_row, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    if has_norm:
        scale = tl.rsqrt(tl.sum(values * values, axis=0) / size + eps)
        norm_weights = tl.load(norm + columns, mask=in_row, other=0.0)
        values = ((values * scale).to(dtype) * norm_weights).to(tl.float32)
    total = tl.sum(weights.to(tl.float32) * values[None, :], axis=1)
    if has_bias:
        total += tl.load(bias + rows, mask=rows < num_rows, other=0.0).to(tl.float32)
    if gated:
        up = tl.sum(up_weights.to(tl.float32) * values[None, :], axis=1)
        if has_bias:
            up += tl.load(bias + num_rows + rows, mask=rows < num_rows, other=0.0).to(tl.float32)
        gate = total.to(dtype).to(tl.float32)
        total = ((gate / (1.0 + tl.exp(-gate))).to(dtype) * up.to(dtype)).to(tl.float32)
    if has_residual:
        total = total.to(dtype).to(tl.float32)
        total += tl.load(residual + rows, mask=rows < num_rows, other=0.0).to(tl.float32)
    tl.store(out + rows, total.to(dtype), mask=rows < num_rows)


def one_row_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias`` of a single row.

    Args:
        x: contiguous ``[1, size]``. weight: contiguous ``[rows, size]``. bias: ``[rows]``.
        norm: weights of an RMS norm with ``eps`` that ``x`` passes first.
        residual: contiguous ``[1, rows]``; the result is added to it, in place.
        gated: the rows are ``gate | up``, and the result is ``silu(gate) * up``, half as wide.
        out: contiguous memory for the result, if it is not ``residual``.

    Returns:
        ``[1, rows]``, or ``[1, rows / 2]`` if gated; ``residual`` or ``out`` itself if given.
    """
    num_rows, size = weight.shape
    num_rows = num_rows // 2 if gated else num_rows
    if residual is not None:
        assert not gated, "a gated layer has no residual"
        assert out is None, "a sum has its place"
        out = residual
    if out is None:
        out = torch.empty(1, num_rows, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    block_rows, num_warps = _shape(block, gated)
    overlap = overlaps(x.device)
    _one_row_linear_kernel[(triton.cdiv(num_rows, block_rows),)](
        x,
        weight,
        weight if bias is None else bias,
        weight if norm is None else norm,
        out,
        out,
        num_rows,
        eps,
        size,
        block,
        block_rows,
        bias is not None,
        norm is not None,
        residual is not None,
        gated,
        overlap,
        num_warps=num_warps,
        launch_pdl=overlap,
    )
    return out


def _shape(block: int, gated: bool) -> tuple[int, int]:
    """Rows and warps of a program; from a sweep over the matrices of 0.6B and 8B models on an H200."""
    block_rows = 8 if block <= 2048 else 4 if block <= 4096 else 2
    block_rows = block_rows // 2 if gated else block_rows
    return block_rows, max(1 if block < 4096 else 4, min(16, block_rows * block // 4096))
