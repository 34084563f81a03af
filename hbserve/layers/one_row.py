"""A linear layer on a single row, with the norm before it and the gate or sum after it, as one Triton kernel.

With one row, reading the weights is all the work, and the gaps between kernels cost as much as the kernels. So one
kernel also computes the norm before a linear layer, and the gate or the residual sum after it. A program goes through
several tiles of rows of the weight. It holds one tile in registers and requests the next one as soon as it has
multiplied it. So the row is normed, and quantised for FP8 weights, once for many tiles; and a program requests its
first tile before the previous kernel has ended (`hbserve.platform.cuda_driver.overlaps`)::

    kernel before     ──────────────────────┐ row
    program           load tile 0           └ norm, quantise │ tile 0, load 1 │ tile 1, load 2 │ ...
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.layers.fp8 import Fp8Linear
from hbserve.layers.fp8_rows import DYNAMIC, GROUPED, STATIC, mode_of
from hbserve.layers.linear import PlainLinear
from hbserve.layers.packed_row import ROW_PEAK, chunk_sums, load_words, pack_rounded_row, pack_row
from hbserve.platform.cuda_driver import multiprocessors, overlaps
from hbserve.weight_format import BLOCK_SIZE

PLAIN = tl.constexpr(3)
"""The weights are in the dtype of the row; the other modes are those of FP8 weights."""

_MIN_LANES = 16
"""Values of a chunk."""

_REGISTERS = 65536
"""Registers of a multiprocessor."""


@triton.jit
def _load_row(x, first: tl.constexpr, count: tl.constexpr, size: tl.constexpr):  # type: ignore[no-untyped-def]
    columns = first + tl.arange(0, count)
    if first + count <= size:
        return tl.load(x + columns)
    return tl.load(x + columns, mask=columns < size, other=0.0)


@triton.jit
def _scaled(values, step, size: tl.constexpr, mode: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scale a row to FP8's range; return it, and the factor of the packed row's products: one, or one of each chunk."""
    if mode == GROUPED:
        group: tl.constexpr = 128 if size >= 128 else size
        groups = tl.reshape(values, (size // group, group))
        peaks = tl.maximum(tl.max(tl.abs(groups), axis=1), 1e-12)
        factors = tl.broadcast_to((peaks / ROW_PEAK)[:, None], (size // group, group // 16))
        return tl.reshape(groups * (448.0 / peaks)[:, None], (size,)), tl.reshape(factors, (size // 16,))
    else:  # Triton compiles what comes after a return
        return values * (1.0 / step), step * (448.0 / ROW_PEAK)


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    words, row, steps, scale, rows, num_groups, first: tl.constexpr, block_rows: tl.constexpr, count: tl.constexpr,
    scale_rows: tl.constexpr, mode: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Multiply ``count`` columns of a tile from column ``first`` by the row; apply the scales of blocks."""
    sums = chunk_sums(words, row, block_rows, count * form.primitive_bitwidth // 32, form)
    if mode == GROUPED:
        group = tl.minimum((first + 16 * tl.arange(0, count // 16)) // 128, num_groups - 1)
        places = (rows // scale_rows * num_groups)[:, None] + group[None, :]
        sums *= tl.load(scale + places) * steps[None, :]
    return sums


@triton.jit
def _one_row_kernel(  # type: ignore[no-untyped-def]
    x, weight, scale, input_scale, bias, norm, residual, out, num_rows, num_tiles, num_groups, eps,
    size: tl.constexpr, block: tl.constexpr, tail: tl.constexpr, block_rows: tl.constexpr, scale_rows: tl.constexpr,
    mode: tl.constexpr, has_bias: tl.constexpr, has_norm: tl.constexpr, has_residual: tl.constexpr,
    gated: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    dtype = out.dtype.element_ty
    form: tl.constexpr = dtype if mode == PLAIN else tl.float8e4nv
    in_word: tl.constexpr = 32 // form.primitive_bitwidth
    words: tl.constexpr = size // in_word  # of a row; in two parts where ``size`` is not a power of two
    block_words: tl.constexpr = block // in_word
    tail_words: tl.constexpr = tail // in_word
    has_row_scales: tl.constexpr = mode != PLAIN and mode != GROUPED
    stride, lanes = tl.num_programs(0), tl.arange(0, block_rows)
    rows = tl.minimum(tl.program_id(0) * block_rows + lanes, num_rows - 1)
    to_up = num_rows.to(tl.int64) * words
    # Load what no kernel writes before the wait.
    begins = weight + rows[:, None].to(tl.int64) * words
    tile = load_words(begins, 0, block_words, words)
    if gated:
        up_tile = load_words(begins + to_up, 0, block_words, words)
    if tail > 0:
        tile_tail = load_words(begins, block_words, tail_words, words)
        if gated:
            up_tile_tail = load_words(begins + to_up, block_words, tail_words, words)
    if has_norm:
        norm_weights = _load_row(norm, 0, block, size)
        if tail > 0:
            tail_norm_weights = _load_row(norm, block, tail, size)
    if has_row_scales:
        scales = tl.load(scale + rows // scale_rows)
        if gated:
            up_scales = tl.load(scale + (rows + num_rows) // scale_rows)
    if has_bias:
        biases = tl.load(bias + rows)
        if gated:
            up_biases = tl.load(bias + num_rows + rows)
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    values = _load_row(x, 0, block, size).to(tl.float32)
    if tail > 0:
        tail_values = _load_row(x, block, tail, size).to(tl.float32)
    if has_residual:
        residuals = tl.load(residual + rows)
    if has_norm:
        square = tl.sum(values * values, axis=0)
        if tail > 0:
            square += tl.sum(tail_values * tail_values, axis=0)
        norm_scale = tl.rsqrt(square / size + eps)
        values = ((values * norm_scale).to(dtype) * norm_weights).to(tl.float32)
        if tail > 0:
            tail_values = ((tail_values * norm_scale).to(dtype) * tail_norm_weights).to(tl.float32)
    steps, tail_steps = 1.0, 1.0
    if mode != PLAIN:
        step = 1.0
        if mode == STATIC:
            step = tl.load(input_scale)
        if mode == DYNAMIC:
            peak = tl.max(tl.abs(values), axis=0)
            if tail > 0:
                peak = tl.maximum(peak, tl.max(tl.abs(tail_values), axis=0))
            step = tl.maximum(peak, 1e-12) / 448.0
        values, steps = _scaled(values, step, block, mode)
        row = pack_rounded_row(values, block)
        if tail > 0:
            tail_values, tail_steps = _scaled(tail_values, step, tail, mode)
            tail_row = pack_rounded_row(tail_values, tail)
    else:
        row = pack_row(values, block, form)
        if tail > 0:
            tail_row = pack_row(tail_values, tail, form)
    for next_tile in range(tl.program_id(0) + stride, num_tiles + stride, stride):
        sums = _products(tile, row, steps, scale, rows, num_groups, 0, block_rows, block, scale_rows, mode, form)
        if gated:
            up_rows = rows + num_rows
            up_sums = _products(
                up_tile, row, steps, scale, up_rows, num_groups, 0, block_rows, block, scale_rows, mode, form
            )
        if tail > 0:
            tail_sums = _products(
                tile_tail, tail_row, tail_steps, scale, rows, num_groups, block, block_rows, tail, scale_rows,
                mode, form,
            )  # fmt: skip
            if gated:
                up_tail_sums = _products(
                    up_tile_tail, tail_row, tail_steps, scale, up_rows, num_groups, block, block_rows, tail, scale_rows,
                    mode, form,
                )  # fmt: skip
        done = rows
        if has_row_scales:
            factors = scales * steps
            if gated:
                up_factors = up_scales * steps
        if has_bias:
            added = biases.to(tl.float32)
            if gated:
                up_added = up_biases.to(tl.float32)
        if has_residual:
            addends = residuals.to(tl.float32)
        if next_tile < num_tiles:
            rows = tl.minimum(next_tile * block_rows + lanes, num_rows - 1)
            begins = weight + rows[:, None].to(tl.int64) * words
            tile = load_words(begins, 0, block_words, words)
            if gated:
                up_tile = load_words(begins + to_up, 0, block_words, words)
            if tail > 0:
                tile_tail = load_words(begins, block_words, tail_words, words)
                if gated:
                    up_tile_tail = load_words(begins + to_up, block_words, tail_words, words)
            if has_row_scales:
                scales = tl.load(scale + rows // scale_rows)
                if gated:
                    up_scales = tl.load(scale + (rows + num_rows) // scale_rows)
            if has_bias:
                biases = tl.load(bias + rows)
                if gated:
                    up_biases = tl.load(bias + num_rows + rows)
            if has_residual:
                residuals = tl.load(residual + rows)
        total = tl.sum(sums, axis=1)
        if tail > 0:
            total += tl.sum(tail_sums, axis=1)
        if has_row_scales:
            total *= factors
        if has_bias:
            total += added
        if gated:
            up = tl.sum(up_sums, axis=1)
            if tail > 0:
                up += tl.sum(up_tail_sums, axis=1)
            if has_row_scales:
                up *= up_factors
            if has_bias:
                up += up_added
            gate = total.to(dtype).to(tl.float32)
            total = ((gate / (1.0 + tl.exp(-gate))).to(dtype) * up.to(dtype)).to(tl.float32)
        if has_residual:
            total = total.to(dtype).to(tl.float32) + addends
        tl.store(out + done, total.to(dtype))  # rows beyond the last one are the last one


def one_row(
    layer: PlainLinear | Fp8Linear,
    x: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    is_gated: bool = False,
    out: Tensor | None = None,
    has_bias: bool = True,
) -> Tensor:
    """Compute the layer on a single row.

    Args:
        x: contiguous ``[1, inputs]``. A row of the weight has a multiple of four bytes.
        norm: weights ``[inputs]`` of an RMS norm with ``eps`` that is applied to ``x`` first.
        residual: contiguous ``[1, outputs]``; the kernel adds the result to it, in place. Not with ``is_gated`` or
            ``out``.
        is_gated: the outputs are ``gate | up``, and the result is ``silu(gate) * up``.
        out: contiguous memory for the result.

    Returns:
        ``[1, outputs]``, or ``[1, outputs / 2]`` if gated; ``residual`` or ``out`` itself if given.
    """
    num_rows, size = layer.weight.shape
    num_rows = num_rows // 2 if is_gated else num_rows
    if residual is not None:
        assert not is_gated, "a gated layer has no residual"
        assert out is None, "the result goes to residual, not to out"
        out = residual
    if out is None:
        out = torch.empty(1, num_rows, dtype=x.dtype, device=x.device)
    bias = layer.bias if has_bias else None
    weight = layer.weight.view(torch.int32)
    quantised = _Quantisation.of(layer)
    block, tail = split_row(size)
    block, tail = max(block, _MIN_LANES), max(tail, _MIN_LANES) if tail else 0
    shape = _launch_shape(block + tail, layer.weight.itemsize, is_gated)
    num_tiles = triton.cdiv(num_rows, shape.rows)
    overlap = overlaps(x.device)
    _one_row_kernel[(min(num_tiles, shape.programs * multiprocessors(x.device)),)](
        x, weight, quantised.scale, quantised.input_scale, weight if bias is None else bias,
        weight if norm is None else norm, out, out, num_rows, num_tiles, quantised.num_groups, eps,
        size, block, tail, shape.rows, quantised.scale_rows, quantised.mode, bias is not None, norm is not None,
        residual is not None, is_gated, overlap,
        num_warps=shape.num_warps, num_stages=1, maxnreg=shape.max_registers, launch_pdl=overlap,
    )  # fmt: skip
    return out


class _Quantisation(NamedTuple):
    """What a kernel must know of a layer's scales."""

    scale: Tensor
    input_scale: Tensor
    num_groups: int
    scale_rows: int
    mode: int

    @staticmethod
    def of(layer: PlainLinear | Fp8Linear) -> _Quantisation:
        if isinstance(layer, PlainLinear):
            return _Quantisation(layer.weight, layer.weight, 1, 1, PLAIN.value)
        scale, given = layer.scale, layer.input_scale
        assert layer.weight.shape[1] >= BLOCK_SIZE or not layer.has_blocks, "a row in two parts is cut between blocks"
        num_groups = scale.shape[1] if layer.has_blocks else 1
        given = scale if given is None else given
        return _Quantisation(scale, given, num_groups, layer.block_rows, mode_of(layer).value)


def split_row(size: int) -> tuple[int, int]:
    """Split a row into two blocks whose sizes are powers of two; the second is 0 if one block is enough."""
    block = 1 << (size.bit_length() - 1)
    return block, triton.next_power_of_2(size - block) if size > block else 0


class _Shape(NamedTuple):
    """Launch shape: rows of a tile, warps of a program, programs of a multiprocessor."""

    rows: int
    num_warps: int
    programs: int

    @property
    def max_registers(self) -> int:
        """Registers of a thread with which so many programs fit."""
        return min(_REGISTERS // (32 * self.num_warps * self.programs) // 8 * 8, 248)


def _launch_shape(lanes: int, itemsize: int, is_gated: bool) -> _Shape:
    """Choose the launch shape for rows of ``lanes`` values of ``itemsize`` bytes.

    From a sweep over the matrices of 0.6B, 8B and 30B-A3B models on an H200: as many bytes in flight as registers hold,
    in few programs, since each of them prepares the row.
    """
    num_matrices = 2 if is_gated else 1
    padded_bytes = triton.next_power_of_2(lanes) * itemsize * num_matrices
    num_warps = 4 if padded_bytes < 16384 else 8 if lanes <= 32768 else 16
    rows = max(1, min(16, num_warps * 8192 // padded_bytes))
    if num_warps > 4:  # a thread of a longer row needs more registers for the row itself
        return _Shape(rows, num_warps, 2 if lanes <= 16384 else 1)
    tile_registers = rows * lanes * itemsize * num_matrices // (4 * 32 * num_warps)
    other_registers = 72 if itemsize == 1 else 62
    num_programs = _REGISTERS // (32 * num_warps * (tile_registers + other_registers))
    return _Shape(rows, num_warps, min(4, num_programs))
