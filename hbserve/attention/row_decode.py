"""Attention of a single row, with all that comes between its projection and its output, as one Triton kernel.

A step of one stream is a chain of short kernels, and each of them takes about 1.5 µs beside its work. So one kernel
norms and rotates the query and the newest key, stores the newest key and value, attends, and merges the parts::

    kernel before    ─────────────────────┐ q, k, v of the newest token
    part 0 .. n - 2  load stored keys     └ norm, rotate q │ attend ───────────────┐
    part n - 1       load stored keys     └ norm, rotate q, k; store k, v │ attend ┴ the last one to end merges ─► out

The grid is ``[KV heads, max_parts]``. The sequence's length is on the device, and each program computes its part from
it; no table of pieces is read first, as `hbserve.attention.paged_decode` does for batches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.attention.base import HeadTransform
from hbserve.attention.decode_tiles import merge_parts
from hbserve.platform.cuda_driver import multiprocessors, overlaps

MAX_PARTS = 64
"""Maximum number of parts of the sequence."""

_MAX_PROGRAMS = 384
"""Programs that an H200 computes at a time, with the registers of `RowShape`."""
_SMS_OF_H200 = 132
_MIN_QUERY_ROWS = 16
"""Rows of the smallest matrix product that tensor cores compute."""


@triton.jit
def _turned(  # type: ignore[no-untyped-def]
    source, partner_source, weight, partner_weight, cos, sin, eps, head_dim: tl.constexpr, has_norm: tl.constexpr
):
    """Norm and rotate heads ``[heads, lanes]``; ``partner_source`` has the other dimension of each pair."""
    dtype = source.dtype
    own, other = source.to(tl.float32), partner_source.to(tl.float32)
    if has_norm:
        scale = tl.rsqrt(tl.sum(own * own, axis=1) / head_dim + eps)[:, None]
        own = ((own * scale).to(dtype) * weight).to(tl.float32)
        other = ((other * scale).to(dtype) * partner_weight).to(tl.float32)
    return (own * cos + other * sin).to(dtype)


@triton.jit
def _attend(query, key, value, in_part, highest, total, weighted):  # type: ignore[no-untyped-def]
    """Attend to a block of stored tokens: one step of softmax by parts (Milakov and Gimelshein 2018)."""
    score = tl.where(in_part[None, :], tl.dot(query, tl.trans(key)), -1e30)
    new_highest = tl.maximum(highest, tl.max(score, axis=1))
    shrink = tl.exp2(highest - new_highest)
    weight = tl.exp2(score - new_highest[:, None])
    total = total * shrink + tl.sum(weight, axis=1)
    product = tl.dot(weight.to(query.dtype), value)
    return new_highest, total, weighted * shrink[:, None] + product


@triton.jit
def _row_kernel(  # type: ignore[no-untyped-def]
    qkv, cache, q_weight, k_weight, inverse_frequencies, positions, slots, indices,
    out, partial, partial_lse, counters,  # written, with the cache
    stride_block, stride_kv, stride_token,  # of the cache
    scale, magnitude, eps,
    group: tl.constexpr, query_rows: tl.constexpr, num_kv_heads: tl.constexpr, head_dim: tl.constexpr,
    lanes: tl.constexpr, rotated_dim: tl.constexpr, is_interleaved: tl.constexpr,
    page: tl.constexpr, block: tl.constexpr, max_parts: tl.constexpr,
    group_lanes: tl.constexpr, merged_parts: tl.constexpr,
    has_norm: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    head, part = tl.program_id(0), tl.program_id(1)
    # Before gdc_wait() only what the host has copied for this step, weights, and keys and values of earlier steps may
    # be read.
    position = tl.load(positions)
    stored = position.to(tl.int32)  # tokens of earlier steps; the newest one follows them
    chunk = tl.cdiv(tl.cdiv(stored + 1, max_parts), block) * block
    start = part * chunk
    if start > stored:
        return
    is_last = start + chunk > stored
    end = tl.minimum(start + chunk, stored)
    lane = tl.arange(0, lanes)
    in_head = lane < head_dim
    turns = lane < rotated_dim
    if is_interleaved:
        partner, pair, is_lower = lane ^ 1, lane // 2, lane % 2 == 0
    else:
        is_lower = lane < rotated_dim // 2
        partner = tl.where(is_lower, lane + rotated_dim // 2, lane - rotated_dim // 2)
        pair = tl.minimum(lane, partner)
    partner = tl.where(turns, partner, lane)
    angle = position.to(tl.float32) * tl.load(inverse_frequencies + pair, mask=turns, other=0.0)
    cos, sin = tl.cos(angle) * magnitude, tl.sin(angle) * magnitude
    cos = tl.where(turns, cos, 1.0)[None, :]
    sin = tl.where(turns, tl.where(is_lower, -sin, sin), 0.0)[None, :]
    lane, partner, in_head = lane[None, :], partner[None, :], in_head[None, :]
    q_norm, q_partner_norm, k_norm, k_partner_norm = 1.0, 1.0, 1.0, 1.0
    if has_norm:
        q_norm = tl.load(q_weight + lane, mask=in_head, other=0.0)
        q_partner_norm = tl.load(q_weight + partner, mask=in_head, other=0.0)
        k_norm = tl.load(k_weight + lane, mask=in_head, other=0.0)
        k_partner_norm = tl.load(k_weight + partner, mask=in_head, other=0.0)
    slot = tl.load(slots)
    keys = cache + head * head_dim
    token = start + tl.arange(0, block)
    in_part = token < end
    page_id = tl.load(indices + token // page, mask=in_part, other=0).to(tl.int64)
    offset = page_id * stride_block + (token % page) * stride_token
    in_block = in_part[:, None] & in_head
    key = tl.load(keys + offset[:, None] + lane, mask=in_block, other=0.0)
    value = tl.load(keys + stride_kv + offset[:, None] + lane, mask=in_block, other=0.0)
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    member = tl.arange(0, query_rows)
    is_used = member < group
    source = qkv + (head * group + member)[:, None] * head_dim
    in_query = is_used[:, None] & in_head
    query = tl.load(source + lane, mask=in_query, other=0.0)
    query_partner = tl.load(source + partner, mask=in_query, other=0.0)
    new_source = qkv + (num_kv_heads * group + head) * head_dim
    is_new = in_head & is_last
    new_key = tl.load(new_source + lane, mask=is_new, other=0.0)
    new_key_partner = tl.load(new_source + partner, mask=is_new, other=0.0)
    new_value = tl.load(new_source + num_kv_heads * head_dim + lane, mask=is_new, other=0.0)
    query = _turned(query, query_partner, q_norm, q_partner_norm, cos, sin, eps, head_dim, has_norm)
    new_key = _turned(new_key, new_key_partner, k_norm, k_partner_norm, cos, sin, eps, head_dim, has_norm)
    place = (slot // page) * stride_block + (slot % page) * stride_token
    is_new &= slot >= 0  # a padded row is not stored
    tl.store(keys + place + lane, new_key, mask=is_new)
    tl.store(keys + stride_kv + place + lane, new_value, mask=is_new)
    # Softmax in base 2, because exp2 is one instruction: the scale includes log2(e).
    query = (query.to(tl.float32) * (scale * 1.4426950408889634)).to(query.dtype)
    # The newest token first: its score is the highest one so far, and its weight is 1.
    score = tl.sum(query.to(tl.float32) * new_key.to(tl.float32), axis=1)
    highest = tl.where(is_last, score, -1e30)
    total = tl.zeros((query_rows,), tl.float32) + tl.where(is_last, 1.0, 0.0)
    weighted = tl.zeros((query_rows, lanes), tl.float32) + new_value.to(tl.float32)
    highest, total, weighted = _attend(query, key, value, in_part, highest, total, weighted)
    for at in tl.range(start + block, end, block, num_stages=1):
        token = at + tl.arange(0, block)
        in_part = token < end
        page_id = tl.load(indices + token // page, mask=in_part, other=0).to(tl.int64)
        offset = page_id * stride_block + (token % page) * stride_token
        in_block = in_part[:, None] & in_head
        key = tl.load(keys + offset[:, None] + lane, mask=in_block, other=0.0)
        value = tl.load(keys + stride_kv + offset[:, None] + lane, mask=in_block, other=0.0)
        highest, total, weighted = _attend(query, key, value, in_part, highest, total, weighted)
    result = weighted / total[:, None]
    num_parts = tl.cdiv(stored + 1, chunk)
    heads = head * group + member
    if num_parts == 1:
        tl.store(out + heads[:, None] * head_dim + lane, result.to(out.dtype.element_ty), mask=in_query)
    else:
        # partial is [max_parts, KV heads, query_rows]
        rows = (part * num_kv_heads + head) * query_rows + member
        tl.store(partial + rows[:, None] * head_dim + lane, result, mask=in_query)
        tl.store(partial_lse + rows, highest + tl.log2(total), mask=is_used)
        tl.debug_barrier()  # all stores of the program come before its count
        if tl.atomic_add(counters + head, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
            tl.store(counters + head, 0)  # for the next layer
            merged, merged_total, _ = merge_parts(
                partial, partial_lse, head * query_rows, num_parts, tl.arange(0, lanes), in_head,
                group, head_dim, lanes, num_kv_heads * query_rows, group_lanes, merged_parts,
            )  # fmt: skip
            merged_member = tl.arange(0, group_lanes)
            target = out + (head * group + merged_member)[:, None] * head_dim + lane
            merged /= merged_total[:, None]
            tl.store(target, merged.to(out.dtype.element_ty), mask=(merged_member < group)[:, None] & in_head)


class RowDecode:
    """Attention of batches of one row over one KV cache, fit for a CUDA graph.

    Args:
        kv_cache: see `hbserve.attention.base.Attention`; in the dtype of keys and values.
        num_heads: query heads of this rank.
        counters: int32, zeros, at least one for each KV head; zeros again after each call.
    """

    def __init__(self, kv_cache: Tensor, num_heads: int, counters: Tensor) -> None:
        _, _, _, page, num_kv_heads, head_dim = kv_cache.shape
        self._cache, self._counters = kv_cache, counters
        self._page, self._num_kv_heads, self._head_dim = page, num_kv_heads, head_dim
        self._group = num_heads // num_kv_heads
        self._lanes = triton.next_power_of_2(head_dim)
        self._shape = _shape(self._lanes)
        share = min(1.0, multiprocessors(kv_cache.device) / _SMS_OF_H200)
        self._max_parts = max(1, min(MAX_PARTS, int(_MAX_PROGRAMS * share) // num_kv_heads))

    def attend(
        self,
        layer: int,
        qkv: Tensor,
        heads: HeadTransform,
        position: Tensor,
        slot: Tensor,
        pages: Tensor,
        out: Tensor,
    ) -> None:
        """Do what `hbserve.layers.fused.norm_rotate_store` and `hbserve.attention.paged_decode` do, for one row.

        Args:
            qkv: contiguous ``[1, (heads + 2 kv heads) * head_dim]``.
            position, slot: int64 ``[1]``; a negative slot is not stored.
            pages: int32, block ids of the sequence.
            out: contiguous ``[1, heads, head_dim]``.
        """
        cache, overlap = self._cache[:, layer], overlaps(qkv.device)
        group_lanes = triton.next_power_of_2(self._group)
        query_rows = max(_MIN_QUERY_ROWS, group_lanes)
        rows = self._max_parts, self._num_kv_heads, query_rows
        partial = torch.empty(*rows, self._head_dim, dtype=torch.float32, device=qkv.device)
        partial_lse = torch.empty(rows, dtype=torch.float32, device=qkv.device)
        q_norm, k_norm = heads.norms or (qkv, qkv)
        num_warps = self._shape.num_warps
        _row_kernel[(self._num_kv_heads, self._max_parts)](
            qkv, cache, q_norm, k_norm,
            heads.inverse_frequencies, position, slot, pages, out, partial, partial_lse, self._counters,
            *cache.stride()[:3], self._head_dim**-0.5, heads.magnitude, heads.eps,
            self._group, query_rows, self._num_kv_heads, self._head_dim,
            self._lanes, heads.rotated_dim, heads.is_interleaved,
            self._page, self._shape.block, self._max_parts,
            group_lanes, max(1, self._shape.merged_values * num_warps // (group_lanes * self._lanes)),
            heads.norms is not None, overlap,
            num_warps=num_warps, maxnreg=self._shape.max_registers, launch_pdl=overlap,
        )  # fmt: skip


class RowShape(NamedTuple):
    """How the programs run.

    Attributes:
        block: tokens per load.
        max_registers: of a thread. The fewer, the earlier a program finds room beside the kernel before.
        merged_values: values of partial results that a warp merges at a time.
    """

    block: int
    num_warps: int
    max_registers: int
    merged_values: int


def _shape(lanes: int) -> RowShape:
    return RowShape(64, 4, 168, 2048) if lanes <= 128 else RowShape(32, 4, 248, 2048)
