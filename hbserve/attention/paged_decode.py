"""Attention of a few queries per sequence over the paged KV cache, as a Triton kernel.

Decoding is bound by reading keys and values, so the kernel must keep enough reads in flight. The host cuts sequences
into pieces (`hbserve.attention.decode_pieces`). The grid is ``[KV heads, capacity]``: program ``(h, p)`` computes the
query heads of KV head h over piece p, and returns at once if there is no piece p::

    pieces   (0,0) (2,0) (2,1) (1,0) ... -1 -1        (run, split) of each p; this order is also the launch order

    run 1, one piece        result ─────────────────────────────────────────────────────► out
    run 2, three pieces     result, log-sum-exp ─► partial[first_piece + split], then counter[run, h] += 1
                            the program that counts the last piece merges all of them ───► out, counter = 0

A *run* is one row of the batch, or consecutive rows that are consecutive tokens of one sequence, such as guesses to be
verified. A product of tensor cores has 16 rows in any case: with 4 query heads to a KV head it computes 4 tokens in the
time of one, and keys and values are read once for all of them.

This is Flash-Decoding (Dao et al. 2023) with an atomic counter as in stream-K, so there is no second kernel. The
pieces are data and not constants: a captured graph serves every mix of lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.attention.base import Attention, HeadTransform, ScoreRules
from hbserve.attention.decode_pieces import MAX_SMALL_BATCH_PROGRAMS, MAX_SPLITS, PieceCutter, Pieces
from hbserve.attention.decode_tiles import in_registers, merge_parts
from hbserve.attention.fp8_direct import TILE_TOKENS, attend_directly
from hbserve.attention.row_cluster import MAX_SHORT_TOKENS, RowCluster
from hbserve.attention.row_decode import RowDecode
from hbserve.float8 import FP8
from hbserve.kv_cache.layout import KVLayout
from hbserve.platform.cuda_driver import overlaps

_MIN_QUERY_ROWS = 16
"""Rows of the smallest matrix product that tensor cores compute."""

_MERGED_VALUES, _MERGED_VALUES_OF_SMALL_BATCH = 2048, 4096
"""Values of partial results that a warp merges at a time: 64 or 128 registers of each thread. A small batch has more
pieces of a sequence to merge, and not so many programs that their registers count."""


@triton.jit
def soft_capped(score, cap):  # type: ignore[no-untyped-def]
    """Return ``cap * tanh(score / cap)`` times log2(e)."""
    return cap * 1.4426950408889634 * (1.0 - 2.0 / (tl.exp(score * (2.0 / cap)) + 1.0))


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    query, key, token, row_begin, row_end, cap, has_window: tl.constexpr, has_cap: tl.constexpr
):
    """Multiply queries by keys; those that a row does not see get the lowest score."""
    score = tl.dot(query, tl.trans(key))
    if has_cap:
        score = soft_capped(score, cap)
    is_seen = token[None, :] < row_end[:, None]
    if has_window:
        is_seen &= token[None, :] >= row_begin[:, None]
    return tl.where(is_seen, score, -1e30)


@triton.jit
def _decode_kernel(  # type: ignore[no-untyped-def]
    q, cache, kv_scales, sinks,
    pieces, first_piece, first_row, indptr, indices, positions, num_stored, chunk_len,  # `DecodeInputs`
    out, partial, partial_lse, counters,  # written
    stride_block, stride_kv, stride_token,  # of the cache
    scale, cap, window,
    group: tl.constexpr, query_rows: tl.constexpr, num_kv_heads: tl.constexpr, head_dim: tl.constexpr,
    lanes: tl.constexpr, page: tl.constexpr, block: tl.constexpr, max_splits: tl.constexpr,
    group_lanes: tl.constexpr, merged_parts: tl.constexpr, stages: tl.constexpr,
    early: tl.constexpr, is_fp8: tl.constexpr, is_direct: tl.constexpr,
    has_window: tl.constexpr, has_cap: tl.constexpr, has_sinks: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    # float16 has all values of FP8, and one instruction converts two of them
    operand: tl.constexpr = tl.float16 if is_fp8 else q.dtype.element_ty
    key_scale = tl.load(kv_scales + head) if is_fp8 else 1.0
    # Before gdc_wait() only two things may be read: what the host has copied for this step, and keys and values of
    # earlier steps. What the previous kernel writes may be missing: the query, and keys and values of this step.
    piece = tl.load(pieces + tl.program_id(1))
    if piece < 0:
        return
    chunk = tl.load(chunk_len)
    split = piece % max_splits
    run = piece // max_splits
    row = tl.load(first_row + run).to(tl.int64)
    num_tokens = (tl.load(first_row + run + 1) - row).to(tl.int32)
    last_row = row + num_tokens - 1
    length = (tl.load(positions + last_row) + 1).to(tl.int32)
    first_page = tl.load(indptr + last_row)
    first_part = tl.load(first_piece + run)
    start = split * chunk
    if start >= length:  # the host does not know how long the run is: see hbserve.engine.rounds
        return
    end = tl.minimum(start + chunk, length)
    begin, first_split = start, 0
    if has_window:  # the run's first row sees most tokens before it
        first_seen = tl.maximum(tl.load(positions + row) + 1 - window, 0).to(tl.int32)
        first_split = first_seen // chunk
        if split < first_split:
            return
        begin = tl.maximum(start, first_seen // block * block)
    member = tl.arange(0, query_rows)  # tokens times query heads of the KV head
    lane = tl.arange(0, lanes)
    token_of_member = member // group_lanes
    is_used = (token_of_member < num_tokens) & (member % group_lanes < group)
    in_group = is_used[:, None]
    in_head = lane[None, :] < head_dim
    heads = (row + token_of_member) * num_kv_heads * group + head * group + member % group_lanes
    # a token sees those before it and itself
    row_end = (tl.load(positions + row + token_of_member, mask=is_used, other=0) + 1).to(tl.int32)
    row_begin = row_end - window
    row_end = tl.minimum(row_end, end)
    keys = cache + head * head_dim
    stored = tl.load(num_stored + row)
    if early:  # load the piece's first block before the wait, without the tokens of this step
        token = begin + tl.arange(0, block)
        page_id = tl.load(indices + first_page + token // page, mask=token < end, other=0).to(tl.int64)
        offset = page_id * stride_block + (token % page) * stride_token
        mask = (token < tl.minimum(end, stored))[:, None] & in_head
        early_key = tl.load(keys + offset[:, None] + lane[None, :], mask=mask, other=0.0)
        early_value = tl.load(keys + stride_kv + offset[:, None] + lane[None, :], mask=mask, other=0.0)
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    query = tl.load(q + heads[:, None] * head_dim + lane[None, :], mask=in_group & in_head, other=0.0)
    # Softmax in base 2, because exp2 is one instruction: the scale includes log2(e). It includes that of keys, too:
    # a query that becomes subnormal in float16 is off by 2^-25, which keys of up to 448 make 10^-4 of a score.
    log2_e: tl.constexpr = 1.0 if has_cap else 1.4426950408889634
    query = (query.to(tl.float32) * (scale * log2_e * key_scale)).to(operand)
    highest = tl.full((query_rows,), -1e30, tl.float32)
    total = tl.zeros((query_rows,), tl.float32)
    weighted = tl.zeros((query_rows, lanes), tl.float32)
    if early:
        is_newest = (token >= stored) & (token < end)
        mask = is_newest[:, None] & in_head
        new_key = tl.load(keys + offset[:, None] + lane[None, :], mask=mask, other=0.0)
        new_value = tl.load(keys + stride_kv + offset[:, None] + lane[None, :], mask=mask, other=0.0)
        key = tl.where(is_newest[:, None], new_key.to(operand), early_key.to(operand))
        value = tl.where(is_newest[:, None], in_registers(new_value, operand), in_registers(early_value, operand))
        score = _scores(query, key, token, row_begin, row_end, cap, has_window, has_cap)
        highest = tl.max(score, axis=1)
        weight = tl.exp2(score - highest[:, None])
        total = tl.sum(weight, axis=1)
        weighted = tl.dot(weight.to(operand), value)
        begin += block
    if is_direct:
        pages = indices + first_page
        highest, total, weighted = attend_directly(
            query, cache, pages, head, start, end, row_end, stride_block,
            page, block, query_rows, num_kv_heads, head_dim,
        )  # fmt: skip
    else:
        for at in tl.range(begin, end, block, num_stages=stages):
            token = at + tl.arange(0, block)
            in_piece = token < end
            page_id = tl.load(indices + first_page + token // page, mask=in_piece, other=0).to(tl.int64)
            offset = page_id * stride_block + (token % page) * stride_token
            mask = in_piece[:, None] & in_head
            key = tl.load(keys + offset[:, None] + lane[None, :], mask=mask, other=0.0).to(operand)
            value = tl.load(keys + stride_kv + offset[:, None] + lane[None, :], mask=mask, other=0.0)
            value = in_registers(value, operand)
            score = _scores(query, key, token, row_begin, row_end, cap, has_window, has_cap)
            new_highest = tl.maximum(highest, tl.max(score, axis=1))
            shrink = tl.exp2(highest - new_highest)
            weight = tl.exp2(score - new_highest[:, None])
            total = total * shrink + tl.sum(weight, axis=1)
            weighted = weighted * shrink[:, None] + tl.dot(weight.to(operand), value)
            highest = new_highest
    num_parts = (length + chunk - 1) // chunk - first_split
    denominator = total
    if has_sinks:  # of the whole row, so it counts once
        sink = tl.load(sinks + head * group + member % group_lanes, mask=is_used, other=0.0) * 1.4426950408889634
        if num_parts == 1:
            denominator += tl.exp2(sink - highest)
    result = weighted / denominator[:, None]
    if is_fp8:
        result *= tl.load(kv_scales + num_kv_heads + head)
    if num_parts == 1:
        target = out + heads[:, None] * head_dim + lane[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=in_group & in_head)
    else:
        # partial is [capacity, KV heads, query_rows]; the pieces of a run are neighbours
        piece_row = ((first_part + split) * num_kv_heads + head) * query_rows + member
        tl.store(partial + piece_row[:, None] * head_dim + lane[None, :], result, mask=in_group & in_head)
        tl.store(partial_lse + piece_row, highest + tl.log2(total), mask=is_used)
        tl.debug_barrier()  # all stores of the program come before its count
        counter = counters + run * num_kv_heads + head
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
            tl.store(counter, 0)  # for the next layer
            for token_index in tl.range(0, num_tokens, num_stages=1):
                first_parts = ((first_part + first_split) * num_kv_heads + head) * query_rows
                first_parts += token_index * group_lanes
                merged, merged_total, merged_highest = merge_parts(
                    partial, partial_lse, first_parts, num_parts, lane, in_head,
                    group, head_dim, lanes, num_kv_heads * query_rows, group_lanes, merged_parts,
                )  # fmt: skip
                merge_member = tl.arange(0, group_lanes)
                if has_sinks:
                    row_sinks = tl.load(sinks + head * group + merge_member, mask=merge_member < group, other=0.0)
                    merged_total += tl.exp2(row_sinks * 1.4426950408889634 - merged_highest)
                merged /= merged_total[:, None]
                merged_heads = (row + token_index) * num_kv_heads * group + head * group + merge_member
                tl.store(
                    out + merged_heads[:, None] * head_dim + lane[None, :],
                    merged.to(out.dtype.element_ty),
                    mask=(merge_member < group)[:, None] & in_head,
                )


@dataclass(frozen=True)
class DecodeInputs:
    """A batch of decoding sequences, on the device.

    Attributes:
        pieces, first_piece, chunk_len: int32 ``[capacity]``, ``[runs]`` and ``[1]``; see
            `hbserve.attention.decode_pieces.Pieces`.
        first_row: int32 ``[runs + 1]``; run i is rows ``first_row[i] .. first_row[i + 1] - 1``, at most
            `PagedDecode.max_run_rows`, at consecutive positions of one sequence.
        indptr, indices: int32 ``[rows + 1]`` and ``[pages]``; see `hbserve.attention.base.PageTables`.
        positions: int64 ``[rows]``, positions of the queries; a row attends to ``position + 1`` tokens.
        num_stored: int64 ``[rows]``, tokens of the sequence from earlier steps: the position, or less if the step
            computes several tokens of the sequence, each in a row of its own.
        slot_mapping: int64 ``[rows]``; see `hbserve.attention.base.AttentionBatch`.
    """

    pieces: Tensor
    first_piece: Tensor
    first_row: Tensor
    indptr: Tensor
    indices: Tensor
    positions: Tensor
    num_stored: Tensor
    slot_mapping: Tensor
    chunk_len: Tensor


class PagedDecode(Attention):
    """Decode attention of batches of up to ``max_rows`` rows, fit for a CUDA graph.

    Args:
        layout, kv_cache, kv_scales: see `Attention`.
        num_heads: query heads of this rank.
        rules: of the model's scores.

    Attributes:
        max_run_rows: maximum number of rows of a run.
        max_short_tokens: how long a sequence may be whose only row is computed as a short one; 0: there is no other
            kernel for it.
    """

    def __init__(
        self,
        layout: KVLayout,
        kv_cache: Tensor,
        num_heads: int,
        max_rows: int,
        kv_scales: Tensor | None = None,
        rules: ScoreRules | None = None,
    ) -> None:
        super().__init__(layout, kv_cache, kv_scales)
        self._rules = rules or ScoreRules()
        self._group = num_heads // layout.num_kv_heads
        self._group_lanes = triton.next_power_of_2(self._group)
        self._query_rows = max(_MIN_QUERY_ROWS, self._group_lanes)
        self.max_run_rows = self._query_rows // self._group_lanes
        self._counters = torch.zeros(max_rows * layout.num_kv_heads, dtype=torch.int32, device=kv_cache.device)
        self._overlap = overlaps(kv_cache.device)
        # of the process's share, where CUDA MPS gives it one
        self._num_multiprocessors = torch.cuda.get_device_properties(kv_cache.device).multi_processor_count
        self._inputs: DecodeInputs | None = None
        self._cutters: dict[int, PieceCutter] = {}  # by number of rows: a step has no time to make one
        # Queries and keys of a cache in FP8 are mixed before they are stored, by another kernel.
        has_row_kernel = self.kv_scales is None and self._rules.are_usual
        self._row = RowDecode(kv_cache, num_heads, self._counters) if has_row_kernel else None
        self._short_row: RowCluster | None = None
        if has_row_kernel and RowCluster.supports(kv_cache, num_heads):
            self._short_row = RowCluster(kv_cache, num_heads, self._counters)
        self.max_short_tokens = 0 if self._short_row is None else MAX_SHORT_TOKENS
        self._is_short = False

    @staticmethod
    def supports(layout: KVLayout) -> str | None:
        """Return None, or the reason why the kernel cannot serve a model with that layout."""
        if layout.dtype not in (torch.bfloat16, torch.float16, FP8):
            return f"has no kernel for {layout.dtype}"
        if layout.head_dim > 256:
            return f"has no kernel for head size {layout.head_dim}, only up to 256"
        return None

    def begin(self, inputs: DecodeInputs, is_short: bool = False) -> None:
        """Let `attend` compute this batch from now on.

        Args:
            is_short: the batch is one row of at most `max_short_tokens`.
        """
        self._inputs, self.slot_mapping, self._is_short = inputs, inputs.slot_mapping, is_short
        self.transforms_heads = self.needs_no_pieces(len(inputs.positions))

    def needs_no_pieces(self, num_rows: int) -> bool:
        """Whether `attend_transformed` computes batches of so many rows."""
        return num_rows == 1 and self._row is not None

    def capacity(self, num_rows: int) -> int:
        """Maximum number of pieces of a batch of ``num_rows``."""
        return self._cutter(num_rows).capacity

    def cut(self, context_lens: npt.NDArray[np.int32], first_row: npt.NDArray[np.int32] | None = None) -> Pieces:
        """Cut a batch.

        Args:
            context_lens: ``[runs]``, tokens that the last row of each run attends to, itself included.
            first_row: ``[runs + 1]``, as `DecodeInputs.first_row`; None: each run is one row.
        """
        if first_row is None:
            return self._cutter(len(context_lens)).cut(context_lens)
        return self._cutter(int(first_row[-1])).cut(context_lens, int(np.diff(first_row).max()))

    def _cutter(self, num_rows: int) -> PieceCutter:
        cutter = self._cutters.get(num_rows)
        if cutter is None:
            shape, num_kv_heads = self._launch_shape(num_rows), self.layout.num_kv_heads
            cutter = PieceCutter(num_rows, num_kv_heads, shape.block, self._num_multiprocessors, shape.programs_per_sm)
            self._cutters[num_rows] = cutter
        return cutter

    def attend(self, layer: int, q: Tensor, out: Tensor) -> None:
        assert self._inputs is not None, "no batch has begun"
        inputs, cache = self._inputs, self.kv_cache[:, layer]
        num_rows, _, head_dim = q.shape
        num_kv_heads, capacity = self.layout.num_kv_heads, len(inputs.pieces)
        lse_shape = capacity, num_kv_heads, self._query_rows
        partial = torch.empty(*lse_shape, head_dim, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
        lanes, group_lanes = triton.next_power_of_2(head_dim), self._group_lanes
        shape = self._launch_shape(num_rows)
        is_small = num_rows * num_kv_heads <= MAX_SMALL_BATCH_PROGRAMS
        merged_values = _MERGED_VALUES_OF_SMALL_BATCH if is_small else _MERGED_VALUES
        rules = self._rules
        window, scale = rules.window(layer), head_dim**-0.5 if rules.scale is None else rules.scale
        kernel: Any = _decode_kernel
        kernel[(num_kv_heads, capacity)](
            q, cache, partial_lse if self.kv_scales is None else self.kv_scales[layer],
            partial_lse if rules.sinks is None else rules.sinks[layer],
            inputs.pieces, inputs.first_piece, inputs.first_row, inputs.indptr, inputs.indices, inputs.positions,
            inputs.num_stored, inputs.chunk_len,
            out, partial, partial_lse, self._counters, *cache.stride()[:3], scale, rules.cap or 0.0, window or 0,
            self._group, self._query_rows, num_kv_heads, head_dim,
            lanes, self.layout.block_size, shape.block, MAX_SPLITS,
            group_lanes, max(1, merged_values * shape.num_warps // (group_lanes * lanes)), shape.stages,
            is_small, self.kv_scales is not None, shape.is_direct,
            window is not None, rules.cap is not None, rules.sinks is not None, self._overlap,
            num_warps=shape.num_warps, launch_pdl=self._overlap,
        )  # fmt: skip

    def attend_transformed(self, layer: int, qkv: Tensor, heads: HeadTransform, out: Tensor) -> None:
        assert self._inputs is not None, "no batch has begun"
        assert self._row is not None, "it transforms no heads"
        inputs = self._inputs
        row: RowCluster | RowDecode = self._row
        if self._is_short:
            assert self._short_row is not None, "it has no kernel for short rows"
            row = self._short_row
        row.attend(layer, qkv, heads, inputs.positions, inputs.slot_mapping, inputs.indices, out)

    def _launch_shape(self, num_rows: int) -> _LaunchShape:
        layout, programs = self.layout, num_rows * self.layout.num_kv_heads
        is_direct = (
            layout.dtype == FP8
            and self._rules.are_usual
            and layout.head_dim in (64, 128)
            and layout.block_size % TILE_TOKENS == 0
            and self._query_rows == _MIN_QUERY_ROWS
        )
        return _launch_shape(programs, triton.next_power_of_2(layout.head_dim), layout.dtype == FP8, is_direct)


class _LaunchShape(NamedTuple):
    """How a batch's programs run.

    Attributes:
        block: tokens per load.
        stages: loads in flight.
        programs_per_sm: programs that a multiprocessor holds.
        is_direct: whether FP8 goes straight to registers.
    """

    block: int
    stages: int
    num_warps: int
    programs_per_sm: int
    is_direct: bool = False


def _launch_shape(programs: int, lanes: int, is_fp8: bool, is_direct: bool) -> _LaunchShape:
    """Choose the shape that was fastest in a sweep (docs/benchmarks.md); programs per SM follow from registers.

    Args:
        programs: rows times KV heads of the batch.
        lanes: head_dim, rounded up to a power of two.
        is_fp8: whether the cache is in FP8.
        is_direct: whether `hbserve.attention.fp8_direct` can read it.
    """
    if lanes > 128:
        return _LaunchShape(32, 2, 4, 2)
    if programs <= MAX_SMALL_BATCH_PROGRAMS:
        return _LaunchShape(32, 1, 2, 4)
    if is_direct:
        return _LaunchShape(32, 1, 1, 8, is_direct=True)
    if is_fp8:  # half the bytes of a load: two must be in flight
        return _LaunchShape(64, 5, 2, 4) if programs < 1792 else _LaunchShape(32, 5, 1, 7)
    if programs <= 128:
        return _LaunchShape(32, 3, 2, 6)
    return _LaunchShape(64, 3, 2, 4) if programs < 1792 else _LaunchShape(32, 4, 1, 8)
