"""A linear layer on 2 to 8 rows, with the norm before it and the gate or sum after it, as one Triton kernel.

With few rows, reading the weights is nearly all the work, as for a single one (`hbserve.layers.one_row`), but only
tensor cores multiply fast enough. The kernel computes ``out.T = weight @ x.T``. A program has one tile of outputs and
all inputs of it. Its warps share out the inputs of a block, and add their sums at the end; so no sum is split among
programs, and a row's result does not depend on how many rows there are. All programs of a layer run at the same time
where shared memory holds them: they share the memory's rate, and end together. Before the previous kernel has ended
(`hbserve.platform.cuda_driver.overlaps`) a program requests as many blocks of weights as it can hold::

    kernel before     ──────────────────────┐ rows
    program           load blocks 0 to n    └ norm rows │ block 0, load n + 1 │ block 1, load n + 2 │ ...

Triton's pipeline requests what a loop loads before the loop begins. So the wait for the previous kernel is in the
loop's first round, and rows are loaded one block ahead into registers, where the pipeline leaves them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.layers.fused import rms_norm
from hbserve.layers.linear import PlainLinear
from hbserve.platform.cuda_driver import multiprocessors, overlaps

MAX_FEW_ROWS = 8
"""Maximum rows: the columns of the smallest product of tensor cores, which has as many for fewer rows."""

_NORM_VALUES = 64
"""Values of all rows that a thread requests at a time to compute their norms."""

_REGISTERS, _SHARED_BYTES, _OTHER_SHARED_BYTES = 65536, 227 << 10, 10 << 10
"""Registers and shared memory of a multiprocessor, and what a program needs beside its weights and is reserved."""


@triton.jit
def _load_weights(  # type: ignore[no-untyped-def]
    begins, at, block: tl.constexpr, parts: tl.constexpr, size: tl.constexpr
):
    """Load ``block`` columns from column ``at`` of rows that begin at ``begins [rows, 1]``: ``[parts, rows, columns]``.

    Parts have consecutive columns.
    """
    each: tl.constexpr = block // parts
    columns = at + tl.arange(0, parts)[:, None, None] * each + tl.arange(0, each)[None, None, :]
    if size % block == 0:
        return tl.load(begins[None, :, :] + columns, eviction_policy="evict_first")
    return tl.load(begins[None, :, :] + columns, mask=columns < size, other=0.0)


@triton.jit
def _load_inputs(  # type: ignore[no-untyped-def]
    x, rows, num_rows, at, block: tl.constexpr, parts: tl.constexpr, size: tl.constexpr
):
    """Load such columns of the rows: ``[parts, columns, rows]``, 0 beyond the last row and column."""
    each: tl.constexpr = block // parts
    columns = at + tl.arange(0, parts)[:, None, None] * each + tl.arange(0, each)[None, :, None]
    mask = (rows < num_rows)[None, None, :] & (columns < size)
    return tl.load(x + rows[None, None, :] * size + columns, mask=mask, other=0.0, eviction_policy="evict_last")


@triton.jit
def _load_norm(norm, at, block: tl.constexpr, parts: tl.constexpr, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load the norm's weights of such columns: ``[parts, columns]``."""
    each: tl.constexpr = block // parts
    columns = at + tl.arange(0, parts)[:, None] * each + tl.arange(0, each)[None, :]
    return tl.load(norm + columns, mask=columns < size, other=0.0)


@triton.jit
def _norm_scales(  # type: ignore[no-untyped-def]
    x, rows, num_rows, eps, block_rows: tl.constexpr, parts: tl.constexpr, size: tl.constexpr, chunk: tl.constexpr
):
    """Return one over the root mean square of each row."""
    squares = tl.zeros((parts, chunk // parts, block_rows), tl.float32)
    for begin in tl.range(0, size, chunk, num_stages=1):
        values = _load_inputs(x, rows, num_rows, begin, chunk, parts, size).to(tl.float32)
        squares += values * values
    return tl.rsqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / size + eps)


@triton.jit
def _normed(values, weights, norm_scales):  # type: ignore[no-untyped-def]
    """Norm columns of rows, and round where `hbserve.layers.norms.rms_norm` does."""
    return (values.to(tl.float32) * norm_scales[None, None, :]).to(values.dtype) * weights[:, :, None]


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, norm, residual, out, num_rows, num_outputs, eps,
    size: tl.constexpr, block_outputs: tl.constexpr, block_rows: tl.constexpr, block: tl.constexpr,
    parts: tl.constexpr, stages: tl.constexpr, chunk: tl.constexpr, has_bias: tl.constexpr, has_norm: tl.constexpr,
    has_residual: tl.constexpr, gated: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    dtype = out.dtype.element_ty
    outputs = tl.program_id(0) * block_outputs + tl.arange(0, block_outputs)
    rows = tl.arange(0, block_rows)
    mask = (outputs < num_outputs)[:, None] & (rows < num_rows)[None, :]
    outputs = tl.minimum(outputs, num_outputs - 1)
    place = rows[None, :] * num_outputs + outputs[:, None]
    begins = weight + outputs[:, None].to(tl.int64) * size
    up_begins = begins + num_outputs.to(tl.int64) * size
    totals = tl.zeros((parts, block_outputs, block_rows), tl.float32)
    up_totals = tl.zeros((parts, block_outputs, block_rows), tl.float32)
    inputs = tl.zeros((parts, block // parts, block_rows), dtype)
    norm_scales = tl.zeros((block_rows,), tl.float32)
    addends = tl.zeros((block_outputs, block_rows), dtype)
    if has_norm:
        norm_weights = _load_norm(norm, 0, block, parts, size)
    for at in tl.range(0, size, block, num_stages=stages):
        weights = _load_weights(begins, at, block, parts, size)
        if gated:
            up_weights = _load_weights(up_begins, at, block, parts, size)
        if at == 0:
            if overlap:
                gdc_wait()
                gdc_launch_dependents()
            if has_norm:
                norm_scales = _norm_scales(x, rows, num_rows, eps, block_rows, parts, size, chunk)
            if has_residual:
                addends = tl.load(residual + place, mask=mask, other=0.0)
            inputs = _load_inputs(x, rows, num_rows, 0, block, parts, size)
        values = inputs
        if has_norm:
            values = _normed(values, norm_weights, norm_scales)
            norm_weights = _load_norm(norm, at + block, block, parts, size)
        next_inputs = _load_inputs(x, rows, num_rows, at + block, block, parts, size)
        totals = tl.dot(weights, values, totals)
        if gated:
            up_totals = tl.dot(up_weights, values, up_totals)
        inputs = next_inputs  # as loaded: the pipeline would take a load whose values are computed with
    total = tl.sum(totals, axis=0)
    if gated:
        up_total = tl.sum(up_totals, axis=0)
    if has_bias:
        total += tl.load(bias + outputs).to(tl.float32)[:, None]
        if gated:
            up_total += tl.load(bias + num_outputs + outputs).to(tl.float32)[:, None]
    if gated:
        gate = total.to(dtype).to(tl.float32)
        total = ((gate / (1.0 + tl.exp(-gate))).to(dtype) * up_total.to(dtype)).to(tl.float32)
    if has_residual:
        total = total.to(dtype).to(tl.float32) + addends.to(tl.float32)
    tl.store(out + place, total.to(dtype), mask=mask)


def few_rows(
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
    """Compute the layer on up to `MAX_FEW_ROWS` rows.

    Args:
        layer: of 16-bit weights.
        x: contiguous ``[rows, inputs]``.
        norm: weights ``[inputs]`` of an RMS norm with ``eps`` that is applied to ``x`` first.
        residual: contiguous ``[rows, outputs]``; the kernel adds the result to it, in place. Not with ``is_gated`` or
            ``out``.
        is_gated: the outputs are ``gate | up``, and the result is ``silu(gate) * up``.
        out: contiguous memory for the result.

    Returns:
        ``[rows, outputs]``, or ``[rows, outputs / 2]`` if gated; ``residual`` or ``out`` itself if given.
    """
    num_outputs = layer.num_outputs // 2 if is_gated else layer.num_outputs
    if residual is not None:
        assert not is_gated, "a gated layer has no residual"
        assert out is None, "the result goes to residual, not to out"
        out = residual
    assert x.is_contiguous(), "the kernel reads whole rows"
    num_rows, size = x.shape
    if norm is not None and is_gated:  # its programs have no registers left for a norm
        x, norm = rms_norm(x, norm, eps), None
    if out is None:
        out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    bias = layer.bias if has_bias else None
    shape = _launch_shape(num_outputs, is_gated)
    num_tiles = triton.cdiv(num_outputs, shape.outputs)
    block_bytes = shape.outputs * shape.inputs * x.itemsize * (2 if is_gated else 1)
    chunk = min(_NORM_VALUES * 32 * shape.num_warps // MAX_FEW_ROWS, triton.next_power_of_2(size))
    overlap = overlaps(x.device)
    kernel: Any = _few_rows_kernel
    kernel[(num_tiles,)](
        x, layer.weight, layer.weight if bias is None else bias, layer.weight if norm is None else norm,
        out, out, num_rows, num_outputs, eps,
        size, shape.outputs, MAX_FEW_ROWS, shape.inputs, shape.num_warps, shape.stages, chunk,
        bias is not None, norm is not None, residual is not None, is_gated, overlap,
        num_warps=shape.num_warps, launch_pdl=overlap,
        maxnreg=shape.max_registers(num_tiles, block_bytes, multiprocessors(x.device)),
    )  # fmt: skip
    return out


class _Shape(NamedTuple):
    """Launch shape: outputs and inputs of a block, blocks in flight and one more, warps of a program."""

    outputs: int
    inputs: int
    stages: int
    num_warps: int

    def max_registers(self, num_tiles: int, block_bytes: int, num_multiprocessors: int) -> int:
        """Return registers of a thread with which as many programs run at a time as there are and shared memory holds.

        Args:
            block_bytes: of weights.
        """
        shared_bytes = (self.stages - 1) * block_bytes + _OTHER_SHARED_BYTES
        programs = max(1, min(_SHARED_BYTES // shared_bytes, -(-num_tiles // num_multiprocessors)))
        return max(min(_REGISTERS // (32 * self.num_warps * programs) // 8 * 8, 248), 64)


def _launch_shape(num_outputs: int, is_gated: bool) -> _Shape:
    """Choose the launch shape, from a sweep over the matrices of an 8B model on an H200."""
    if is_gated:
        return _Shape(32, 256, 3, 4)
    if num_outputs <= 4224:
        return _Shape(16, 1024, 4, 4)
    return _Shape(32, 256, 4, 4) if num_outputs <= 16384 else _Shape(64, 256, 3, 4)
