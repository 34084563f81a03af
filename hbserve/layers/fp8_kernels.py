"""FP8 linear layers on a GPU. The number of rows decides which kernel computes the products:

| rows | kernel | bound by |
|---|---|---|
| 1, of at most 16384 inputs without a bound | `hbserve.layers.one_row`, with norm, gate and sum | reading weights |
| 1 to 64; to 256 where outputs are few; to 512 where weights have blocks | the one here | reading weights |
| more | cuBLASLt, through `torch._scaled_mm` | multiplying |
| more, weights in blocks | cuBLASLt in the model's dtype, after both operands have been converted to it | multiplying |

cuBLASLt adds whole rows before it scales them. Blocks are scaled before they are added, and a kernel that does so has
half of the rate of bfloat16 (4096 rows of an 8B model on an H200: 370 TFLOP/s, and 790 in bfloat16).

The kernel here computes ``out.T = weight @ x.T``: tensor cores of Hopper need 64 rows of the first operand, and
weights have them while a small batch does not. Where outputs are few, several programs share the inputs of one tile.
Each stores its part, and the last one to finish adds all parts, in order::

    program (tile, part)      parts[tile, part] = weight[tile, part] @ x[:, part].T;  counters[tile] += 1
    the one that counts last  out[tile] = sum of parts[tile];  counters[tile] = 0
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.layers.fp8 import Fp8Linear, Quantised
from hbserve.layers.fp8_rows import fp8_memory, fp8_norm, fp8_rows, widen
from hbserve.layers.fused import silu_and_mul
from hbserve.layers.linear import PlainLinear, Rows
from hbserve.layers.one_row import one_row
from hbserve.platform.cuda_driver import overlaps

MAX_SMALL_ROWS = 64
"""Maximum rows of a batch that is bound by reading weights."""

_MAX_ONE_ROW_INPUTS = 16384
"""Inputs up to which a single row has a kernel of its own. An earlier one gave NaN for 25,600, in 16 warps of 128
registers (H200, torch 2.11, Triton 3.6). Why is not known, because its PTX is right; this one has not been tried."""

_FEW_OUTPUTS = ((128, 132 * 64), (256, 32 * 64))
"""Maximum rows, and outputs up to which cuBLASLt leaves multiprocessors without work; from a sweep on an H200."""

_MAX_BLOCK_ROWS = 512
"""Maximum rows that are multiplied by weights in blocks faster than the weights are converted."""

_BLOCK_INPUTS = 128
_MAX_PARTS = 8
_MAX_TILES = 4096
_SMS_OF_H200 = 132


@triton.jit(do_not_specialize=["num_rows"])
def _fp8_linear_kernel(  # type: ignore[no-untyped-def]
    x, x_scales, weight, scales, bias, out, partial, counters, num_rows, num_outputs,
    size: tl.constexpr, num_groups: tl.constexpr, scale_rows: tl.constexpr, grouped: tl.constexpr,
    block_outputs: tl.constexpr, block_rows: tl.constexpr, block_inputs: tl.constexpr, num_parts: tl.constexpr,
    stages: tl.constexpr, has_bias: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    tile_out, tile_row, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    outputs = tile_out * block_outputs + tl.arange(0, block_outputs)
    rows = tile_row * block_rows + tl.arange(0, block_rows)
    in_outputs, in_rows = outputs < num_outputs, rows < num_rows
    lanes = tl.arange(0, block_inputs)
    weights = weight + tl.minimum(outputs, num_outputs - 1).to(tl.int64)[:, None] * size + lanes[None, :]
    inputs = x + tl.minimum(rows, num_rows - 1).to(tl.int64)[None, :] * size + lanes[:, None]
    output_scales = scales + outputs // scale_rows * num_groups
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros((block_outputs, block_rows), tl.float32)
    num_steps: tl.constexpr = (size + block_inputs - 1) // block_inputs
    part_steps: tl.constexpr = (num_steps + num_parts - 1) // num_parts
    first_step = part * part_steps
    for step in tl.range(first_step, tl.minimum(first_step + part_steps, num_steps), num_stages=stages):
        at = step * block_inputs
        if size % block_inputs == 0:
            w = tl.load(weights + at)
            values = tl.load(inputs + at)
        else:
            w = tl.load(weights + at, mask=(at + lanes < size)[None, :], other=0.0)
            values = tl.load(inputs + at, mask=(at + lanes < size)[:, None], other=0.0)
        if grouped:
            w_scale = tl.load(output_scales + step, mask=in_outputs, other=0.0)
            x_scale = tl.load(x_scales + rows * num_groups + step, mask=in_rows, other=0.0)
            total += tl.dot(w, values) * w_scale[:, None] * x_scale[None, :]
        else:
            # tensor cores add FP8 products with 14 bits; every 128 of them are then added in float32
            total = tl.dot(w, values, total, max_num_imprecise_acc=block_inputs)
    if not grouped:
        w_scale = tl.load(output_scales, mask=in_outputs, other=0.0)
        x_scale = tl.load(x_scales + rows, mask=in_rows, other=0.0)
        total = total * w_scale[:, None] * x_scale[None, :]
    mask = in_outputs[:, None] & in_rows[None, :]
    place = rows.to(tl.int64)[None, :] * num_outputs + outputs[:, None]
    if num_parts > 1:
        tl.store(partial + part * num_rows.to(tl.int64) * num_outputs + place, total, mask=mask)
        tl.debug_barrier()  # all stores of the program come before its count
        counter = counters + tile_row * tl.num_programs(0) + tile_out
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") != num_parts - 1:
            return
        tl.store(counter, 0)  # for the next layer
        total = tl.zeros((block_outputs, block_rows), tl.float32)
        for other in tl.static_range(num_parts):
            parts = partial + other * num_rows.to(tl.int64) * num_outputs + place
            total += tl.load(parts, mask=mask, other=0.0, cache_modifier=".cg")
    if has_bias:
        total += tl.load(bias + outputs, mask=in_outputs, other=0.0).to(tl.float32)[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


def fp8_linear(layer: Fp8Linear, rows: Quantised, out: Tensor | None = None, *, has_bias: bool = True) -> Tensor:
    """Compute the layer on quantised rows, in ``out`` if given: contiguous ``[rows, outputs]``."""
    num_outputs, size = layer.weight.shape
    num_rows = rows.values.shape[0]
    bias = layer.bias if has_bias else None
    device = layer.weight.device
    if out is None:
        out = torch.empty(num_rows, num_outputs, dtype=layer.dtype, device=device)
    block_outputs, block_rows, num_parts, stages, num_warps = _launch_shape(num_rows, num_outputs, size)
    grid = triton.cdiv(num_outputs, block_outputs), triton.cdiv(num_rows, block_rows), num_parts
    partial = layer.scale
    if num_parts > 1:
        partial = torch.empty(num_parts, num_rows, num_outputs, dtype=torch.float32, device=device)
    overlap = overlaps(device)
    kernel: Any = _fp8_linear_kernel
    kernel[grid](
        rows.values, rows.scales, layer.weight, layer.scale, layer.scale if bias is None else bias,
        out, partial, _counters(device), num_rows, num_outputs,
        size, rows.scales.shape[1], layer.block_rows, layer.has_blocks,
        block_outputs, block_rows, _BLOCK_INPUTS, num_parts, stages, bias is not None, overlap,
        num_warps=num_warps, launch_pdl=overlap,
    )  # fmt: skip
    return out


@cache
def _counters(device: torch.device) -> Tensor:
    """Counters of finished parts, zero between launches; a stream's launches may share them."""
    return torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)


def _launch_shape(num_rows: int, num_outputs: int, size: int) -> tuple[int, int, int, int, int]:
    """Choose outputs and rows of a tile, parts of its inputs, loads in flight and warps."""
    num_tiles = triton.cdiv(num_outputs, 64)
    if _has_few_outputs(num_rows, num_outputs):
        num_programs = num_tiles * triton.cdiv(num_rows, 128)
        parts = max(1, min(_MAX_PARTS, _SMS_OF_H200 * 5 // 4 // num_programs, size // (4 * _BLOCK_INPUTS)))
        return 64, 128, 1 << (parts.bit_length() - 1), 4, 4
    if num_rows > MAX_SMALL_ROWS:
        return 128, 128, 1, 4, 8
    # Loads in flight fill the memory's latency with a program or two on each multiprocessor. More rows make the
    # parts larger, which are written and read again, and a program's loads too.
    num_programs = 2 * _SMS_OF_H200 if num_rows <= 16 else _SMS_OF_H200
    wanted = min(_MAX_PARTS, triton.cdiv(num_programs, num_tiles), max(1, size // (4 * _BLOCK_INPUTS)))
    num_parts = 1 << (wanted.bit_length() - 1) if num_tiles <= _MAX_TILES else 1
    return 64, max(16, triton.next_power_of_2(num_rows)), num_parts, 5, 4


def _has_few_outputs(num_rows: int, num_outputs: int) -> bool:
    limits = (num_rows <= max_rows and num_outputs <= max_outputs for max_rows, max_outputs in _FEW_OUTPUTS)
    return num_rows > MAX_SMALL_ROWS and any(limits)


class Fp8Kernels:
    """`hbserve.layers.linear.LinearKernels` of `Fp8Linear`."""

    def rows_kernel(self, layer: Fp8Linear, num_rows: int) -> Callable[..., Tensor] | None:
        return self.one_row if num_rows == 1 else None  # several rows are quantised before their product

    def one_row(
        self,
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
        if layer.weight.shape[1] <= _MAX_ONE_ROW_INPUTS and layer.max_input is None:
            return one_row(
                layer, x, norm=norm, eps=eps, residual=residual, is_gated=is_gated, out=out, has_bias=has_bias
            )
        rows = fp8_rows(layer, x) if norm is None else fp8_norm(layer, x, None, norm, eps)
        if is_gated:
            return silu_and_mul(fp8_linear(layer, rows, has_bias=has_bias), out)
        if residual is not None:
            return residual.add_(fp8_linear(layer, rows, has_bias=has_bias))
        return fp8_linear(layer, rows, out, has_bias=has_bias)

    def many_rows(self, layer: Fp8Linear, rows: Rows, out: Tensor | None = None, *, has_bias: bool = True) -> Tensor:
        if isinstance(rows, Tensor):
            rows = fp8_rows(layer, rows)
        assert isinstance(rows, Quantised), "FP8 layers read tensors and FP8 rows"
        num_rows = rows.values.shape[0]
        if layer.has_blocks and num_rows > _MAX_BLOCK_ROWS:
            wide = PlainLinear(widen(layer.weight, layer.scale, layer.dtype), layer.bias)
            return wide(widen(rows.values, rows.scales, layer.dtype), out, has_bias=has_bias)
        is_small = num_rows <= MAX_SMALL_ROWS or _has_few_outputs(num_rows, layer.num_outputs)
        if layer.has_blocks or is_small or not _fits_cublas(layer):
            return fp8_linear(layer, rows, out, has_bias=has_bias)
        # Rows of both operands have scales. FP8 sums of cuBLASLt's fast mode are what training's forward pass uses.
        scales = rows.scales.contiguous(), layer.scale[None, :]
        bias = layer.bias if has_bias else None
        return torch._scaled_mm(
            rows.values, layer.weight.t(), *scales, bias=bias, out_dtype=layer.dtype, use_fast_accum=True, out=out
        )

    def norm(self, layer: Fp8Linear, pending: Tensor | None, total: Tensor, weight: Tensor, eps: float) -> Quantised:
        if pending is None:
            return fp8_norm(layer, total, None, weight, eps)
        return fp8_norm(layer, pending, total, weight, eps)

    def gate(self, layer: Fp8Linear, gate_up: Tensor, out: Rows | None) -> Quantised:
        assert out is None or isinstance(out, Quantised), "FP8 layers read FP8 rows"
        return fp8_rows(layer, gate_up, out, is_gated=True)

    def memory(self, layer: Fp8Linear, num_rows: int, num_inputs: int) -> Quantised:
        return fp8_memory(layer, num_rows, num_inputs)


def _fits_cublas(layer: Fp8Linear) -> bool:
    """Return whether cuBLASLt takes a scale for each row: for bfloat16 results, and sizes that are multiples of 16."""
    num_outputs, size = layer.weight.shape
    return layer.dtype == torch.bfloat16 and num_outputs % 16 == 0 and size % 16 == 0
