"""Attention of 2 to 8 rows, with all that comes between their projection and its output, as one Triton kernel.

It does for a few rows what `hbserve.attention.row_decode` does for one. The rows may be tokens of one sequence, such as
guesses to be verified, or of several. The host cuts them into pieces, as for `hbserve.attention.paged_decode`. Rows of
one sequence are neighbours, so a run's program finds its sequence's newest keys and values beside its own, and never
reads them from the cache::

    kernel before      ─────────────────────┐ q, k, v of all rows
    piece of a run     load stored keys     └ norm, rotate q │ attend ─────────────────────────────┐
    last piece of it   load stored keys     └ norm, rotate q, k; store k, v │ attend, to new ones too ┴ the last one to
                                                                                            end merges all rows ─► out
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.attention.base import DecodeInputs, HeadTransform
from hbserve.attention.decode_pieces import MAX_SPLITS
from hbserve.attention.decode_tiles import merge_parts
from hbserve.attention.row_decode import attend_block, turned
from hbserve.platform.cuda_driver import overlaps

MAX_FEW_ROWS = 8
"""Maximum rows of a batch."""

_NUM_WARPS = 8
_NEW_LANES = 16
"""Newest tokens of a sequence in a product: at most `MAX_FEW_ROWS`, but tensor cores have so many."""


@triton.jit
def _rotation(  # type: ignore[no-untyped-def]
    positions, inverse_frequencies, magnitude, lane, pair, is_lower, turns
):
    """Return the factors of a head's own dimension and of its partner for positions ``[rows]``: ``[rows, lanes]``."""
    frequencies = tl.load(inverse_frequencies + pair, mask=turns, other=0.0)
    angle = positions.to(tl.float32)[:, None] * frequencies[None, :]
    cos, sin = tl.cos(angle) * magnitude, tl.sin(angle) * magnitude
    cos = tl.where(turns[None, :], cos, 1.0)
    return cos, tl.where(turns[None, :], tl.where(is_lower[None, :], -sin, sin), 0.0)


@triton.jit
def _few_rows_kernel(  # type: ignore[no-untyped-def]
    qkv, cache, q_weight, k_weight, inverse_frequencies,
    pieces, first_piece, first_row, indptr, indices, positions, num_stored, slots, chunk_len,  # `DecodeInputs`
    out, partial, partial_lse, counters,  # written, with the cache
    stride_block, stride_kv, stride_token,  # of the cache
    scale, magnitude, eps,
    group: tl.constexpr, query_rows: tl.constexpr, num_kv_heads: tl.constexpr, head_dim: tl.constexpr,
    lanes: tl.constexpr, rotated_dim: tl.constexpr, is_interleaved: tl.constexpr,
    page: tl.constexpr, block: tl.constexpr, max_splits: tl.constexpr, new_lanes: tl.constexpr,
    group_lanes: tl.constexpr, merged_parts: tl.constexpr,
    has_norm: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    # Before gdc_wait() only what the host has copied for this step, weights, and keys and values of earlier steps may
    # be read.
    piece = tl.load(pieces + tl.program_id(1))
    if piece < 0:
        return
    chunk = tl.load(chunk_len)
    split = piece % max_splits
    run = piece // max_splits
    row = tl.load(first_row + run).to(tl.int64)
    num_tokens = (tl.load(first_row + run + 1) - row).to(tl.int32)
    last_row = row + num_tokens - 1
    last_position = tl.load(positions + last_row)
    stored = tl.load(num_stored + row).to(tl.int32)
    first_page = tl.load(indptr + last_row)
    first_part = tl.load(first_piece + run)
    length = (last_position + 1).to(tl.int32)
    start = split * chunk
    if start >= length:  # the host does not know how long the run is: see hbserve.engine.rounds
        return
    is_last = start + chunk >= length
    end = tl.minimum(start + chunk, stored)
    num_new = length - stored  # tokens of the sequence in this step, up to the run's last one
    first_new_row = last_row + 1 - num_new
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
    run_tokens: tl.constexpr = query_rows // group_lanes
    run_token = tl.arange(0, run_tokens)
    run_positions = tl.load(positions + row + run_token, mask=run_token < num_tokens, other=0)
    cos, sin = _rotation(run_positions, inverse_frequencies, magnitude, lane, pair, is_lower, turns)
    shape: tl.constexpr = (run_tokens, group_lanes, lanes)
    cos = tl.reshape(tl.broadcast_to(cos[:, None, :], shape), (query_rows, lanes))
    sin = tl.reshape(tl.broadcast_to(sin[:, None, :], shape), (query_rows, lanes))
    new_lane = tl.arange(0, new_lanes)
    new_rows = first_new_row + new_lane
    is_new = new_lane < num_new
    lane_row, partner_row, in_head_row = lane[None, :], partner[None, :], in_head[None, :]
    q_norm, q_partner_norm, k_norm, k_partner_norm = 1.0, 1.0, 1.0, 1.0
    if has_norm:
        q_norm = tl.load(q_weight + lane_row, mask=in_head_row, other=0.0)
        q_partner_norm = tl.load(q_weight + partner_row, mask=in_head_row, other=0.0)
        k_norm = tl.load(k_weight + lane_row, mask=in_head_row, other=0.0)
        k_partner_norm = tl.load(k_weight + partner_row, mask=in_head_row, other=0.0)
    keys = cache + head * head_dim
    token = start + tl.arange(0, block)
    in_part = token < end
    page_id = tl.load(indices + first_page + token // page, mask=in_part, other=0).to(tl.int64)
    offset = page_id * stride_block + (token % page) * stride_token
    in_block = in_part[:, None] & in_head_row
    key = tl.load(keys + offset[:, None] + lane_row, mask=in_block, other=0.0)
    value = tl.load(keys + stride_kv + offset[:, None] + lane_row, mask=in_block, other=0.0)
    member = tl.arange(0, query_rows)
    token_of_member = member // group_lanes
    is_used = (token_of_member < num_tokens) & (member % group_lanes < group)
    member_row = row + token_of_member
    member_head = head * group + member % group_lanes
    member_position = tl.load(positions + member_row, mask=is_used, other=0).to(tl.int32)
    stride_row: tl.constexpr = (group + 2) * num_kv_heads * head_dim
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    source = qkv + (member_row * stride_row + member_head * head_dim)[:, None]
    in_query = is_used[:, None] & in_head_row
    query = tl.load(source + lane_row, mask=in_query, other=0.0)
    query_partner = tl.load(source + partner_row, mask=in_query, other=0.0)
    new_source = qkv + (new_rows * stride_row + (num_kv_heads * group + head) * head_dim)[:, None]
    in_new = (is_new & is_last)[:, None] & in_head_row
    new_key = tl.load(new_source + lane_row, mask=in_new, other=0.0)
    new_partner = tl.load(new_source + partner_row, mask=in_new, other=0.0)
    new_value = tl.load(new_source + num_kv_heads * head_dim + lane_row, mask=in_new, other=0.0)
    query = turned(query, query_partner, q_norm, q_partner_norm, cos, sin, eps, head_dim, has_norm)
    # Softmax in base 2, because exp2 is one instruction: the scale includes log2(e).
    query = (query.to(tl.float32) * (scale * 1.4426950408889634)).to(query.dtype)
    highest = tl.full((query_rows,), -1e30, tl.float32)
    total = tl.zeros((query_rows,), tl.float32)
    weighted = tl.zeros((query_rows, lanes), tl.float32)
    highest, total, weighted = attend_block(query, key, value, in_part[None, :], highest, total, weighted)
    for at in tl.range(start + block, end, block, num_stages=1):
        token = at + tl.arange(0, block)
        in_part = token < end
        page_id = tl.load(indices + first_page + token // page, mask=in_part, other=0).to(tl.int64)
        offset = page_id * stride_block + (token % page) * stride_token
        in_block = in_part[:, None] & in_head_row
        key = tl.load(keys + offset[:, None] + lane_row, mask=in_block, other=0.0)
        value = tl.load(keys + stride_kv + offset[:, None] + lane_row, mask=in_block, other=0.0)
        highest, total, weighted = attend_block(query, key, value, in_part[None, :], highest, total, weighted)
    if is_last:
        new_positions = stored + new_lane
        new_cos, new_sin = _rotation(new_positions, inverse_frequencies, magnitude, lane, pair, is_lower, turns)
        new_key = turned(new_key, new_partner, k_norm, k_partner_norm, new_cos, new_sin, eps, head_dim, has_norm)
        slot = tl.load(slots + new_rows, mask=is_new, other=-1)  # negative for a padded row, which is not stored
        # Runs of one sequence store the same values in the same place.
        place = ((slot // page) * stride_block + (slot % page) * stride_token)[:, None]
        in_cache = in_new & (slot >= 0)[:, None]
        tl.store(keys + place + lane_row, new_key, mask=in_cache)
        tl.store(keys + stride_kv + place + lane_row, new_value, mask=in_cache)
        is_seen = is_new[None, :] & (new_positions[None, :] <= member_position[:, None])
        highest, total, weighted = attend_block(query, new_key, new_value, is_seen, highest, total, weighted)
    result = weighted / total[:, None]
    target = out + ((member_row * num_kv_heads * group + member_head) * head_dim)[:, None] + lane_row
    if length <= chunk:
        tl.store(target, result.to(out.dtype.element_ty), mask=in_query)
    else:
        # partial is [capacity, KV heads, query_rows]; the pieces of a run are neighbours
        rows = ((first_part + split) * num_kv_heads + head) * query_rows + member
        tl.store(partial + rows[:, None] * head_dim + lane_row, result, mask=in_query)
        tl.store(partial_lse + rows, highest + tl.log2(total), mask=is_used)
        tl.debug_barrier()  # all stores of the program come before its count
        counter = counters + run * num_kv_heads + head
        num_parts = (length + chunk - 1) // chunk
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
            tl.store(counter, 0)  # for the next layer
            merged, merged_total, _ = merge_parts(
                partial, partial_lse, (first_part * num_kv_heads + head) * query_rows, num_parts, lane, in_head_row,
                query_rows, head_dim, lanes, num_kv_heads * query_rows, query_rows, merged_parts,
            )  # fmt: skip
            merged /= merged_total[:, None]
            tl.store(target, merged.to(out.dtype.element_ty), mask=in_query)


class FewRowsDecode:
    """Attention of batches of up to `MAX_FEW_ROWS` rows over one KV cache, fit for a CUDA graph.

    Args:
        kv_cache: see `hbserve.attention.base.Attention`; in the dtype of keys and values.
        num_heads: query heads of this rank.
        query_rows: rows of a product: those of a run times query heads of a KV head, each padded to a power of two.
        counters: int32, zeros, one for each row and KV head; zeros again after each call.

    Attributes:
        block_tokens: tokens of a load; a piece is a whole number of them.
        programs_per_sm: programs that a multiprocessor holds.
    """

    def __init__(self, kv_cache: Tensor, num_heads: int, query_rows: int, counters: Tensor) -> None:
        _, _, _, page, num_kv_heads, head_dim = kv_cache.shape
        self._cache, self._counters, self._query_rows = kv_cache, counters, query_rows
        self._page, self._num_kv_heads, self._head_dim = page, num_kv_heads, head_dim
        self._group = num_heads // num_kv_heads
        self._lanes = triton.next_power_of_2(head_dim)
        self.block_tokens, self.programs_per_sm = (64, 2) if self._lanes <= 128 else (32, 1)

    def attend(self, layer: int, qkv: Tensor, heads: HeadTransform, inputs: DecodeInputs, out: Tensor) -> None:
        """Do what `hbserve.layers.fused.norm_rotate_store` and `hbserve.attention.paged_decode` do.

        Args:
            qkv: contiguous ``[rows, (heads + 2 kv heads) * head_dim]``.
            out: contiguous ``[rows, heads, head_dim]``.
        """
        cache, overlap, capacity = self._cache[:, layer], overlaps(qkv.device), len(inputs.pieces)
        parts = capacity, self._num_kv_heads, self._query_rows
        partial = torch.empty(*parts, self._head_dim, dtype=torch.float32, device=qkv.device)
        partial_lse = torch.empty(parts, dtype=torch.float32, device=qkv.device)
        q_norm, k_norm = heads.norms or (qkv, qkv)
        merged_parts = max(1, 8192 // (self._query_rows * self._lanes))
        kernel: Any = _few_rows_kernel
        kernel[(self._num_kv_heads, capacity)](
            qkv, cache, q_norm, k_norm, heads.inverse_frequencies,
            inputs.pieces, inputs.first_piece, inputs.first_row, inputs.indptr, inputs.indices, inputs.positions,
            inputs.num_stored, inputs.slot_mapping, inputs.chunk_len,
            out, partial, partial_lse, self._counters,
            *cache.stride()[:3], self._head_dim**-0.5, heads.magnitude, heads.eps,
            self._group, self._query_rows, self._num_kv_heads, self._head_dim,
            self._lanes, heads.rotated_dim, heads.is_interleaved,
            self._page, self.block_tokens, MAX_SPLITS, _NEW_LANES,
            triton.next_power_of_2(self._group), merged_parts,
            heads.norms is not None, overlap,
            num_warps=_NUM_WARPS, maxnreg=128 if self.programs_per_sm == 2 else 248, launch_pdl=overlap,
        )  # fmt: skip
