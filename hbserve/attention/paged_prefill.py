"""Attention of prompt chunks over the paged KV cache, as a Triton kernel: FlashAttention-2 (Dao 2023) through pages.

One program computes the query heads of one KV head for some consecutive tokens of one sequence: all of them read the
same keys. Its rows are ``tokens x query heads of the KV head``. It goes through the blocks of keys that its tokens see;
only the last ones need the causal mask. Long chunks come first, because a step ends with its last program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl
from torch import Tensor

from hbserve.attention.base import ScoreRules
from hbserve.attention.paged_decode import soft_capped
from hbserve.kv_cache.layout import KVLayout

TILE_ROWS = 128
"""Rows of a program, tokens times query heads: two warp groups of 64."""

_BLOCK_KEYS = 64


@triton.jit
def _attend_block(  # type: ignore[no-untyped-def]
    query, keys, indices, positions, at, end, highest, total, weighted, stride_block, stride_kv, stride_token,
    key_scale, cap, window, lane, in_head, page: tl.constexpr, block: tl.constexpr, is_masked: tl.constexpr,
    is_fp8: tl.constexpr, has_window: tl.constexpr, has_cap: tl.constexpr,
):  # fmt: skip
    """Attend to a block of keys from position ``at``, of which those from ``end`` on do not exist."""
    token = at + tl.arange(0, block)
    exists = token < end
    page_id = tl.load(indices + token // page, mask=exists, other=0).to(tl.int64)
    offset = page_id * stride_block + (token % page) * stride_token
    mask = exists[:, None] & in_head
    key = tl.load(keys + offset[:, None] + lane[None, :], mask=mask, other=0.0).to(query.dtype)
    score = tl.dot(query, tl.trans(key))
    if is_fp8:
        score *= key_scale
    if has_cap:
        score = soft_capped(score, cap)
    if is_masked:
        is_seen = (token[None, :] <= positions[:, None]) & exists[None, :]
        if has_window:
            is_seen &= token[None, :] > positions[:, None] - window
        score = tl.where(is_seen, score, -1e30)
    new_highest = tl.maximum(highest, tl.max(score, axis=1))
    shrink = tl.exp2(highest - new_highest)
    weight = tl.exp2(score - new_highest[:, None])
    total = total * shrink + tl.sum(weight, axis=1)
    value = tl.load(keys + stride_kv + offset[:, None] + lane[None, :], mask=mask, other=0.0).to(query.dtype)
    weighted = tl.dot(weight.to(query.dtype), value, weighted * shrink[:, None])
    return new_highest, total, weighted


@triton.jit
def _prefill_kernel(  # type: ignore[no-untyped-def]
    q, cache, kv_scales, sinks, out, tiles, first_query, first_position, indptr, indices,
    stride_block, stride_kv, stride_token, scale, cap, window,
    group: tl.constexpr, group_lanes: tl.constexpr, num_kv_heads: tl.constexpr, head_dim: tl.constexpr,
    lanes: tl.constexpr, page: tl.constexpr, rows: tl.constexpr, block: tl.constexpr, stages: tl.constexpr,
    is_fp8: tl.constexpr, has_window: tl.constexpr, has_cap: tl.constexpr, has_sinks: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    # float16 has all values of FP8, and one instruction converts two of them
    operand: tl.constexpr = tl.float16 if is_fp8 else q.dtype.element_ty
    sequence = tl.load(tiles + 2 * tl.program_id(1)).to(tl.int64)
    first = tl.load(tiles + 2 * tl.program_id(1) + 1)  # token of the chunk
    begin = tl.load(first_query + sequence)
    num_queries = tl.load(first_query + sequence + 1) - begin
    start = tl.load(first_position + sequence)
    row = tl.arange(0, rows)
    token, member = first + row // group_lanes, row % group_lanes
    is_used = (token < num_queries) & (member < group)
    positions = start + token
    lane = tl.arange(0, lanes)
    in_head = lane[None, :] < head_dim
    places = ((begin + token).to(tl.int64) * num_kv_heads + head) * group + member
    query = tl.load(q + places[:, None] * head_dim + lane[None, :], mask=is_used[:, None] & in_head, other=0.0)
    log2_e: tl.constexpr = 1.0 if has_cap else 1.4426950408889634
    query = (query.to(tl.float32) * (scale * log2_e)).to(operand)
    key_scale = tl.load(kv_scales + head) if is_fp8 else 1.0
    keys = cache + head * head_dim
    pages = indices + tl.load(indptr + sequence)
    highest = tl.full((rows,), -1e30, tl.float32)
    total = tl.zeros((rows,), tl.float32)
    weighted = tl.zeros((rows, lanes), tl.float32)
    # All rows see the keys before the first token's; whole blocks of those need no mask.
    end = tl.minimum(start + first + rows // group_lanes, start + num_queries)
    unmasked = (start + first) // block * block
    lowest = 0
    if has_window:  # the last row's window begins last: whole blocks behind that need no mask for the window
        last_begin = tl.maximum(end - window, 0)
        lowest = tl.minimum(tl.cdiv(last_begin, block) * block, unmasked)
        for at in tl.range(tl.maximum(start + first + 1 - window, 0) // block * block, lowest, block, num_stages=1):
            highest, total, weighted = _attend_block(
                query, keys, pages, positions, at, end, highest, total, weighted,
                stride_block, stride_kv, stride_token, key_scale, cap, window, lane, in_head, page, block, True,
                is_fp8, has_window, has_cap,
            )  # fmt: skip
    for at in tl.range(lowest, unmasked, block, num_stages=stages):
        highest, total, weighted = _attend_block(
            query, keys, pages, positions, at, end, highest, total, weighted,
            stride_block, stride_kv, stride_token, key_scale, cap, window, lane, in_head, page, block, False,
            is_fp8, has_window, has_cap,
        )  # fmt: skip
    for at in tl.range(unmasked, end, block, num_stages=1):
        highest, total, weighted = _attend_block(
            query, keys, pages, positions, at, end, highest, total, weighted,
            stride_block, stride_kv, stride_token, key_scale, cap, window, lane, in_head, page, block, True,
            is_fp8, has_window, has_cap,
        )  # fmt: skip
    if has_sinks:
        sink = tl.load(sinks + head * group + member, mask=member < group, other=0.0) * 1.4426950408889634
        total += tl.exp2(sink - highest)
    result = weighted / total[:, None]
    if is_fp8:
        result *= tl.load(kv_scales + num_kv_heads + head)
    target = out + places[:, None] * head_dim + lane[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=is_used[:, None] & in_head)


@dataclass(frozen=True)
class PrefillInputs:
    """Prompt chunks of a step, on the device; all int32.

    Attributes:
        tiles: ``[tiles, 2]``, sequence and first token of each tile in its chunk.
        first_query: ``[sequences + 1]``, chunk i's tokens are ``first_query[i] .. first_query[i + 1] - 1``.
        first_position: ``[sequences]``, position of a chunk's first token.
        indptr, indices: see `hbserve.attention.base.PageTables`.
    """

    tiles: Tensor
    first_query: Tensor
    first_position: Tensor
    indptr: Tensor
    indices: Tensor


def cut_tiles(
    query_lens: npt.NDArray[np.int32], first_positions: npt.NDArray[np.int32], group: int
) -> npt.NDArray[np.int32]:
    """Cut chunks with ``query_lens [sequences]`` tokens into tiles ``[tiles, 2]``, those with most keys first."""
    tokens = TILE_ROWS // _group_lanes(group)
    counts = -(-query_lens // tokens)
    sequences = np.repeat(np.arange(len(query_lens)), counts)
    firsts = (np.arange(len(sequences)) - np.repeat(np.cumsum(counts) - counts, counts)) * tokens
    order = np.argsort(-(first_positions[sequences] + firsts), kind="stable")
    return np.stack((sequences, firsts), axis=1)[order].astype(np.int32)


def attend_chunks(
    layer: int,
    q: Tensor,
    cache: Tensor,
    kv_scales: Tensor | None,
    inputs: PrefillInputs,
    layout: KVLayout,
    rules: ScoreRules,
    out: Tensor,
) -> None:
    """Let each token of the chunks attend to its sequence up to itself.

    Args:
        q, out: contiguous ``[tokens, heads, head_dim]``.
        cache: one layer, ``[block, k/v, token, kv head, head_dim]``, strided in its first dimension.
        kv_scales: float32 ``[k/v, kv heads]`` of a cache in FP8.
        rules: of the model's scores.
    """
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = layout.num_kv_heads
    group = num_heads // num_kv_heads
    lanes = max(16, triton.next_power_of_2(head_dim))
    window, scale = rules.window(layer), head_dim**-0.5 if rules.scale is None else rules.scale
    kernel: Any = _prefill_kernel
    kernel[(num_kv_heads, len(inputs.tiles))](
        q, cache, q if kv_scales is None else kv_scales, q if rules.sinks is None else rules.sinks[layer], out,
        inputs.tiles, inputs.first_query, inputs.first_position, inputs.indptr, inputs.indices,
        *cache.stride()[:3], scale, rules.cap or 0.0, window or 0,
        group, _group_lanes(group), num_kv_heads, head_dim, lanes, layout.block_size,
        TILE_ROWS, _BLOCK_KEYS if lanes <= 128 else _BLOCK_KEYS // 2, 3 if lanes <= 128 else 2, kv_scales is not None,
        window is not None, rules.cap is not None, rules.sinks is not None,
        num_warps=8,
    )  # fmt: skip


def _group_lanes(group: int) -> int:
    return min(TILE_ROWS, int(triton.next_power_of_2(group)))
