"""Triton kernels for the experts of one token: they read rows of weights, as `hbserve.layers.one_row` does.

The first kernel computes the router's outputs. Its program that ends last chooses the experts; one more program
prepares the token for the second kernel. That one computes gate, up and the activation of each expert, the third all
down projections and their weighted sum. Each starts before the one before has ended; the third then reads its weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.layers.mixture.plain import ExpertWeights
from hbserve.layers.mixture.routing import Choosing, choose_of_token
from hbserve.layers.one_row import split_row
from hbserve.layers.packed_row import ROW_PEAK, chunk_sums, load_words, pack_row
from hbserve.model_families.declaration import Experts
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
def _read_row(  # type: ignore[no-untyped-def]
    x, norm, columns, eps, size: tl.constexpr, has_norm: tl.constexpr
):
    """Load a row in float32; apply an RMS norm, rounded as in `hbserve.layers.norms`."""
    values = tl.load(x + columns, mask=columns < size, other=0.0).to(tl.float32)
    if has_norm:
        dtype = x.dtype.element_ty
        weights = tl.load(norm + columns, mask=columns < size, other=0.0)
        rms = tl.rsqrt(tl.sum(values * values, axis=0) / size + eps)
        values = ((values * rms).to(dtype) * weights).to(tl.float32)
    return values


@triton.jit
def _router_kernel(  # type: ignore[no-untyped-def]
    x, norm, weight, bias, slots, logits, counter, totals, chosen, shares, row, step, eps, scale, first_expert,
    num_local,
    num_experts: tl.constexpr, num_chosen: tl.constexpr, chosen_lanes: tl.constexpr, num_groups: tl.constexpr,
    num_chosen_groups: tl.constexpr, group_lanes: tl.constexpr, member_lanes: tl.constexpr, is_sigmoid: tl.constexpr,
    has_bias: tl.constexpr, is_renormalised: tl.constexpr, has_slots: tl.constexpr,
    size: tl.constexpr, block: tl.constexpr, has_norm: tl.constexpr, is_fp8: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    columns = tl.arange(0, block)
    in_matrix = (columns < size) & (expert < num_experts)
    weights = tl.load(weight + expert * size + columns, mask=in_matrix, other=0.0)
    is_real = True
    if has_slots:
        is_real = tl.load(slots) >= 0
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    values = _read_row(x, norm, columns, eps, size, has_norm)
    if expert == num_experts:  # the last program prepares the row for `_up_kernel`
        if is_fp8:
            peak = tl.maximum(tl.max(tl.abs(values), axis=0), 1e-12)
            values *= ROW_PEAK / peak
            tl.store(step, peak / ROW_PEAK)
        tl.store(row + columns, values.to(row.dtype.element_ty), mask=columns < size)
        return
    logit = tl.sum(values * weights.to(tl.float32), axis=0)
    tl.store(logits + expert, logit.to(logits.dtype.element_ty))
    tl.debug_barrier()  # the store comes before the count
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_experts - 1:
        tl.store(counter, 0)  # for the next layer
        experts, best = choose_of_token(
            logits, bias, scale, num_experts, num_chosen, chosen_lanes, num_groups,
            num_chosen_groups, group_lanes, member_lanes, is_sigmoid, has_bias, is_renormalised,
        )  # fmt: skip
        lanes = tl.arange(0, chosen_lanes)
        in_row = lanes < num_chosen
        local = experts - first_expert
        is_local = is_real & (local >= 0) & (local < num_local)
        tl.store(chosen + lanes, tl.where(is_local, local, -1), mask=in_row)
        tl.store(shares + lanes, best.to(logits.dtype.element_ty).to(tl.float32), mask=in_row)
        tl.atomic_add(totals + experts, 1, mask=in_row & is_real)


@triton.jit
def _block_scales(  # type: ignore[no-untyped-def]
    scale, row, begin: tl.constexpr, size: tl.constexpr, scale_rows: tl.constexpr, num_scales: tl.constexpr
):
    """Load scales ``[matrices, groups]`` of the blocks from column ``begin``, in the rows ``row [matrices]``."""
    group = begin // 128 + tl.arange(0, (size + 127) // 128)
    places = scale + (row // scale_rows)[:, None] * num_scales + group[None, :]
    return tl.load(places, mask=(group < num_scales)[None, :], other=0.0)


@triton.jit
def _scaled(  # type: ignore[no-untyped-def]
    values, scales, matrices: tl.constexpr, size: tl.constexpr
):
    """Multiply inputs ``[matrices, size]`` by the scales of the blocks of weights that they meet."""
    num_groups: tl.constexpr = (size + 127) // 128
    groups = tl.reshape(values, [matrices, num_groups, size // num_groups])
    return tl.reshape(groups * scales[:, :, None], [matrices, size])


@triton.jit
def _up_kernel(  # type: ignore[no-untyped-def]
    row, step, weight, scale, chosen, out, num_rows,
    size: tl.constexpr, block: tl.constexpr, block_rows: tl.constexpr, scale_rows: tl.constexpr,
    num_scales: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    form: tl.constexpr = out.dtype.element_ty if num_scales == 0 else tl.float8e4nv
    in_word: tl.constexpr = 32 // form.primitive_bitwidth
    words: tl.constexpr = size // in_word
    block_words: tl.constexpr = block // in_word
    rows = tl.minimum(tl.program_id(0) * block_rows + tl.arange(0, block_rows), num_rows - 1)
    lane = tl.program_id(1)
    columns = tl.arange(0, block)
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(chosen + lane).to(tl.int64)
    if expert >= 0:
        first = expert * 2 * num_rows
        gates = weight + (first + rows)[:, None] * words
        gate_words = load_words(gates, 0, block_words, words)
        up_words = load_words(gates + num_rows.to(tl.int64) * words, 0, block_words, words)
        values = tl.load(row + columns, mask=columns < size, other=0.0).to(tl.float32)
        packed = pack_row(values, block, form)
        gate = chunk_sums(gate_words, packed, block_rows, block_words, form)
        up = chunk_sums(up_words, packed, block_rows, block_words, form)
        if num_scales > 1:  # all rows of a program are in one block of scales
            group = tl.minimum(tl.arange(0, block // 16) // 8, num_scales - 1)
            begin = first + tl.program_id(0) * block_rows
            gate *= tl.load(scale + begin // scale_rows * num_scales + group)[None, :]
            up *= tl.load(scale + (begin + num_rows) // scale_rows * num_scales + group)[None, :]
        gate, up = tl.sum(gate, axis=1), tl.sum(up, axis=1)
        if num_scales > 0:
            row_step = tl.load(step)
            gate *= row_step
            up *= row_step
        if num_scales == 1:
            gate *= tl.load(scale + (first + rows) // scale_rows)
            up *= tl.load(scale + (first + num_rows + rows) // scale_rows)
        tl.store(out + lane * num_rows + rows, activate(gate, up, out.dtype.element_ty))


@triton.jit
def _down_kernel(  # type: ignore[no-untyped-def]
    x, weight, scale, chosen, shares, out, num_rows, num_chosen: tl.constexpr, chosen_lanes: tl.constexpr,
    size: tl.constexpr, block: tl.constexpr, tail: tl.constexpr, block_rows: tl.constexpr, scale_rows: tl.constexpr,
    num_scales: tl.constexpr, is_added: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    in_rows = rows < num_rows
    # `_up_kernel` has waited for the choice before it let this kernel start.
    lanes = tl.arange(0, chosen_lanes)
    local = tl.load(chosen + lanes, mask=lanes < num_chosen, other=-1, cache_modifier=".cg")
    share = tl.load(shares + lanes, mask=lanes < num_chosen, other=0.0, cache_modifier=".cg")
    is_local = local >= 0
    first = tl.maximum(local, 0).to(tl.int64) * num_rows
    # ``[expert, row, column]``, in two parts where ``size`` is not a power of two
    begins = weight + (first[:, None, None] + rows[None, :, None]) * size
    in_matrix = is_local[:, None, None] & in_rows[None, :, None]
    columns = tl.arange(0, block)
    in_row = columns < size
    weights = tl.load(begins + columns[None, None, :], mask=in_matrix & in_row[None, None, :], other=0.0)
    if tail > 0:
        tail_columns = block + tl.arange(0, tail)
        in_tail = tail_columns < size
        tail_weights = tl.load(begins + tail_columns[None, None, :], mask=in_matrix & in_tail[None, None, :], other=0.0)
    if num_scales == 1:
        places = scale + (first[:, None] + rows[None, :]) // scale_rows
        row_scales = tl.load(places, mask=is_local[:, None] & in_rows[None, :], other=0.0)
    if num_scales > 1:  # all rows of a program are in one block of scales
        row = first + tl.program_id(0) * block_rows
        scales = _block_scales(scale, row, 0, block, scale_rows, num_scales) * share[:, None]
        if tail > 0:
            tail_scales = _block_scales(scale, row, block, tail, scale_rows, num_scales) * share[:, None]
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    pairs = x + lanes[:, None] * size
    values = tl.load(pairs + columns[None, :], mask=is_local[:, None] & in_row[None, :], other=0.0).to(tl.float32)
    values = _scaled(values, scales, chosen_lanes, block) if num_scales > 1 else values * share[:, None]
    products = tl.sum(weights.to(tl.float32) * values[:, None, :], axis=2)
    if tail > 0:
        mask = is_local[:, None] & in_tail[None, :]
        values = tl.load(pairs + tail_columns[None, :], mask=mask, other=0.0).to(tl.float32)
        values = _scaled(values, tail_scales, chosen_lanes, tail) if num_scales > 1 else values * share[:, None]
        products += tl.sum(tail_weights.to(tl.float32) * values[:, None, :], axis=2)
    if num_scales == 1:
        products *= row_scales
    total = tl.sum(products, axis=0)
    target = out + rows
    if is_added:
        total = total.to(out.dtype.element_ty).to(tl.float32) + tl.load(target, mask=in_rows, other=0.0).to(tl.float32)
    tl.store(target, total.to(out.dtype.element_ty), mask=in_rows)


class _Shape(NamedTuple):
    """Launch shape of a kernel: rows of a program, of each matrix that it reads, and warps."""

    rows: int
    num_warps: int

    def fit(self, scales: Scales) -> _Shape:
        """Take fewer rows, so that blocks of scales are not cut."""
        return self if scales.num_scales <= 1 else self._replace(rows=math.gcd(self.rows, scales.block_rows))


def mix_row(
    x: Tensor,
    norm: Norm | None,
    weights: ExpertWeights,
    experts: Experts,
    local: tuple[int, int],
    slots: Tensor | None,
    totals: Tensor,
    counter: Tensor,
    out: Tensor,
    is_added: bool,
) -> None:
    """Choose the experts of one token and compute them; see `hbserve.layers.mixture.grouped.GroupedExperts.mix`.

    A row of the experts' weights has a multiple of four bytes.

    Args:
        counter: int32 ``[1]``, zero before and after.
    """
    hidden, inner, num_chosen, bias = x.shape[1], weights.down.shape[1], experts.num_chosen, weights.router_bias
    choosing = Choosing.of(experts, bias)
    logits = torch.empty(experts.num_experts, dtype=weights.router.dtype, device=x.device)
    chosen = torch.empty(num_chosen, dtype=torch.int32, device=x.device)
    shares, step = (torch.empty(size, dtype=torch.float32, device=x.device) for size in (num_chosen, 1))
    pairs = x.new_empty(num_chosen, inner)
    is_fp8 = weights.up_scale is not None
    row = torch.empty(hidden, dtype=torch.float16 if is_fp8 else x.dtype, device=x.device)
    norm_weight, eps = norm or (x, 0.0)
    overlap = overlaps(x.device)
    block = max(triton.next_power_of_2(hidden), 128)
    _router_kernel[(experts.num_experts + 1,)](
        x, norm_weight, weights.router, logits if bias is None else bias, logits if slots is None else slots,
        logits, counter, totals, chosen, shares, row, step, eps, experts.scale, *local, *choosing, slots is not None,
        hidden, block, norm is not None, is_fp8, overlap, num_warps=1 if block < 4096 else 4, launch_pdl=overlap,
    )  # fmt: skip
    up, down = scales_of(weights.up, weights.up_scale), scales_of(weights.down, weights.down_scale)
    shape = _up_shape(block, weights.up.itemsize).fit(up)
    _up_kernel[(triton.cdiv(inner, shape.rows), num_chosen)](
        row, step, weights.up.view(torch.int32), up.scale, chosen, pairs, inner, hidden, block, shape.rows,
        up.block_rows, up.num_scales, overlap, num_warps=shape.num_warps, launch_pdl=overlap,
    )  # fmt: skip
    block, tail = split_row(inner)
    lanes = choosing.chosen_lanes * triton.next_power_of_2(inner)
    shape = _down_shape(lanes, weights.down.itemsize).fit(down)
    _down_kernel[(triton.cdiv(hidden, shape.rows),)](
        pairs, weights.down, down.scale, chosen, shares, out, hidden, num_chosen, choosing.chosen_lanes, inner, block,
        tail, shape.rows, down.block_rows, down.num_scales, is_added, overlap, num_warps=shape.num_warps,
        launch_pdl=overlap,
    )  # fmt: skip


def _up_shape(lanes: int, itemsize: int) -> _Shape:
    """Choose the shape for rows of ``lanes`` elements of gate and of up; 16 KiB suit a warp (a sweep on an H200)."""
    num_warps = max(1, min(16, lanes // 2048))
    return _Shape(max(1, 8192 * num_warps // (lanes * itemsize)), num_warps)


def _down_shape(lanes: int, itemsize: int) -> _Shape:
    """Choose the shape for rows of ``lanes`` elements of ``itemsize`` bytes, those of all experts together.

    A program holds all its weights in registers before it waits for the kernel before; 8 KiB suit a warp.
    """
    rows = max(1, min(8, 65536 // (lanes * itemsize)))
    return _Shape(rows, max(1, min(16, rows * lanes * itemsize // 8192)))
