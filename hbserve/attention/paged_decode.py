"""Attention of one query per sequence over the paged KV cache, as a Triton kernel.

Decoding is bound by reading keys and values, so all that counts is to keep enough reads in flight.
Sequences are split into chunks, one program for each chunk and KV head, and the program that ends
last merges its sequence's chunks (Dao et al. 2023, "Flash-Decoding"; counted by an atomic as in
stream-K). The chunk length is data, not a constant, so that a captured graph serves every mix of
lengths, and there is no schedule to compute on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.attention.base import Attention
from hbserve.kv_cache.layout import KVLayout
from hbserve.layers.overlap import overlaps
from hbserve.models.spec import ModelSpec

_MIN_QUERY_ROWS = 16
"""Rows of the smallest matrix product that tensor cores do."""

_MIN_SPLITS, _MAX_SPLITS = 4, 64
_WANTED_PROGRAMS = 512
"""About four for each multiprocessor of an H200."""

_EARLY_PROGRAMS = 16
"""Up to so many rows and heads a chunk is a piece or two, and latency is all: the first is loaded ahead of the wait."""


@triton.jit
def _decode_kernel(  # type: ignore[no-untyped-def]
    q,
    cache,
    order,
    indptr,
    indices,
    positions,
    chunk_len,
    out,
    partial,
    partial_lse,
    counters,
    stride_block,
    stride_kv,
    stride_token,
    scale,
    group: tl.constexpr,
    query_rows: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    lanes: tl.constexpr,
    page: tl.constexpr,
    block: tl.constexpr,
    num_splits: tl.constexpr,
    stages: tl.constexpr,
    early: tl.constexpr,
    overlap: tl.constexpr,
):
    head = tl.program_id(0)
    split = tl.program_id(2)
    # What the host has copied for this step is there, and so are keys and values of earlier steps; what the kernel in
    # front writes may not be.
    sequence = tl.load(order + tl.program_id(1)).to(tl.int64)
    length = (tl.load(positions + sequence) + 1).to(tl.int32)
    chunk = tl.load(chunk_len)
    start = split * chunk
    if start >= length:
        return
    end = tl.minimum(start + chunk, length)
    first_page = tl.load(indptr + sequence)
    member = tl.arange(0, query_rows)
    lane = tl.arange(0, lanes)
    in_group = member[:, None] < group
    in_head = lane[None, :] < head_dim
    heads = sequence * num_kv_heads * group + head * group + member
    keys = cache + head * head_dim
    if early:  # the first piece, without the step's own token
        token = start + tl.arange(0, block)
        page_id = tl.load(indices + first_page + token // page, mask=token < end, other=0).to(tl.int64)
        offset = page_id * stride_block + (token % page) * stride_token
        mask = (token < tl.minimum(end, length - 1))[:, None] & in_head
        early_key = tl.load(keys + offset[:, None] + lane[None, :], mask=mask, other=0.0)
        early_value = tl.load(keys + stride_kv + offset[:, None] + lane[None, :], mask=mask, other=0.0)
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    query = tl.load(q + heads[:, None] * head_dim + lane[None, :], mask=in_group & in_head, other=0.0)
    # in base 2: exp2 is one instruction
    query = (query.to(tl.float32) * (scale * 1.4426950408889634)).to(query.dtype)
    highest = tl.full((query_rows,), -1e30, tl.float32)
    total = tl.zeros((query_rows,), tl.float32)
    weighted = tl.zeros((query_rows, lanes), tl.float32)
    begin = start
    if early:
        own = token == length - 1
        mask = own[:, None] & in_head
        key = tl.load(keys + offset[:, None] + lane[None, :], mask=mask, other=0.0)
        value = tl.load(keys + stride_kv + offset[:, None] + lane[None, :], mask=mask, other=0.0)
        key = tl.where(own[:, None], key, early_key)
        value = tl.where(own[:, None], value, early_value)
        score = tl.where((token < end)[None, :], tl.dot(query, tl.trans(key)), -1e30)
        highest = tl.max(score, axis=1)
        weight = tl.exp2(score - highest[:, None])
        total = tl.sum(weight, axis=1)
        weighted = tl.dot(weight.to(value.dtype), value)
        begin += block
    for at in tl.range(begin, end, block, num_stages=stages):
        token = at + tl.arange(0, block)
        there = token < end
        page_id = tl.load(indices + first_page + token // page, mask=there, other=0).to(tl.int64)
        offset = page_id * stride_block + (token % page) * stride_token
        mask = there[:, None] & in_head
        key = tl.load(keys + offset[:, None] + lane[None, :], mask=mask, other=0.0)
        value = tl.load(keys + stride_kv + offset[:, None] + lane[None, :], mask=mask, other=0.0)
        score = tl.where(there[None, :], tl.dot(query, tl.trans(key)), -1e30)
        new_highest = tl.maximum(highest, tl.max(score, axis=1))
        shrink = tl.exp2(highest - new_highest)
        weight = tl.exp2(score - new_highest[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        weighted = weighted * shrink[:, None] + tl.dot(weight.to(value.dtype), value)
        highest = new_highest
    result = weighted / total[:, None]
    if length <= chunk:
        target = out + heads[:, None] * head_dim + lane[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=in_group & in_head)
    else:
        rows = heads * num_splits + split
        tl.store(partial + rows[:, None] * head_dim + lane[None, :], result, mask=in_group & in_head)
        tl.store(partial_lse + rows, highest + tl.log2(total), mask=member < group)
        tl.debug_barrier()  # all of the program's stores come before its count
        counter = counters + sequence * num_kv_heads + head
        num_chunks = (length + chunk - 1) // chunk
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_chunks - 1:
            tl.store(counter, 0)  # for the next layer
            parts = tl.arange(0, num_splits)
            used = parts < num_chunks
            for one in tl.static_range(group):
                row = sequence * num_kv_heads * group + head * group + one
                lse = tl.load(partial_lse + row * num_splits + parts, mask=used, other=-1e30, cache_modifier=".cg")
                share = tl.exp2(lse - tl.max(lse, axis=0))
                values = tl.load(
                    partial + (row * num_splits + parts[:, None]) * head_dim + lane[None, :],
                    mask=used[:, None] & in_head,
                    other=0.0,
                    cache_modifier=".cg",
                )
                merged = tl.sum(values * share[:, None], axis=0) / tl.sum(share, axis=0)
                tl.store(out + row * head_dim + lane, merged.to(out.dtype.element_ty), mask=lane < head_dim)


@dataclass(frozen=True)
class DecodeInputs:
    """A batch of decoding sequences, on the device.

    Attributes:
        order: int32 ``[rows]``, the rows by falling length: the longest begin first, so that all end together.
        indptr: int32 ``[rows + 1]``, row i's blocks are ``indices[indptr[i]:indptr[i + 1]]``.
        positions: int64 ``[rows]``, of the queries; a row attends to one token more than that.
        slot_mapping: int64 ``[rows]``, see `hbserve.attention.base.AttentionBatch`.
        chunk_len: int32 ``[1]``, from `PagedDecode.chunk_len`.
    """

    order: torch.Tensor
    indptr: torch.Tensor
    indices: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    chunk_len: torch.Tensor


class PagedDecode(Attention):
    """Decode attention of batches of up to ``max_rows`` sequences, fit for a CUDA graph.

    Args:
        layout, kv_cache: see `Attention`.
        num_heads: query heads of this rank.
    """

    def __init__(self, layout: KVLayout, kv_cache: torch.Tensor, num_heads: int, max_rows: int) -> None:
        super().__init__(layout, kv_cache)
        self._group = num_heads // layout.num_kv_heads
        self._counters = torch.zeros(max_rows * layout.num_kv_heads, dtype=torch.int32, device=kv_cache.device)
        self._overlap = overlaps(kv_cache.device)
        self._inputs: DecodeInputs | None = None

    @staticmethod
    def supports(spec: ModelSpec, layout: KVLayout) -> str | None:
        """None, or why it cannot serve that model."""
        if layout.dtype not in (torch.bfloat16, torch.float16):
            return f"has no kernel for {layout.dtype}"
        if any(window is not None for window in spec.sliding_windows):
            return "has no kernel for sliding windows"
        return None

    def begin(self, inputs: DecodeInputs) -> None:
        """From here on `attend` is of that batch."""
        self._inputs, self.slot_mapping = inputs, inputs.slot_mapping

    def num_splits(self, num_rows: int) -> int:
        """Into how many chunks a sequence may be split; each costs a program of every row that does not need it."""
        programs = num_rows * self.layout.num_kv_heads
        return max(_MIN_SPLITS, min(_MAX_SPLITS, 1 << (-(-4096 // programs) - 1).bit_length()))

    def chunk_len(self, num_rows: int, context_lens: npt.NDArray[np.int32]) -> int:
        """Tokens of a chunk, for a step with these context lengths that is padded to ``num_rows``.

        As long as there are programs enough to fill the card: splitting costs a merge.
        """
        even = int(context_lens.sum()) * self.layout.num_kv_heads / _WANTED_PROGRAMS
        least = int(context_lens.max()) / self.num_splits(num_rows)
        block = _shape(num_rows * self.layout.num_kv_heads, self.layout.head_dim)[0]
        return max(1, math.ceil(max(even, least) / block)) * block

    def attend(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        assert self._inputs is not None, "no batch has begun"
        inputs, cache = self._inputs, self.kv_cache[:, layer]
        num_rows, num_heads, head_dim = q.shape
        num_kv_heads = self.layout.num_kv_heads
        splits = self.num_splits(num_rows)
        partial = torch.empty(num_rows, num_heads, splits, head_dim, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(num_rows, num_heads, splits, dtype=torch.float32, device=q.device)
        lanes = triton.next_power_of_2(head_dim)
        block, stages, num_warps = _shape(num_rows * num_kv_heads, lanes)
        kernel: Any = _decode_kernel
        kernel[(num_kv_heads, num_rows, splits)](
            q,
            cache,
            inputs.order,
            inputs.indptr,
            inputs.indices,
            inputs.positions,
            inputs.chunk_len,
            out,
            partial,
            partial_lse,
            self._counters,
            cache.stride(0),
            cache.stride(1),
            cache.stride(2),
            head_dim**-0.5,
            self._group,
            max(_MIN_QUERY_ROWS, triton.next_power_of_2(self._group)),
            num_kv_heads,
            head_dim,
            lanes,
            self.layout.block_size,
            block,
            splits,
            stages,
            num_rows * num_kv_heads <= _EARLY_PROGRAMS,
            self._overlap,
            num_warps=num_warps,
            launch_pdl=self._overlap,
        )


def _shape(programs: int, lanes: int) -> tuple[int, int, int]:
    """Tokens of a piece, pieces in flight, and warps of a program; from a sweep, docs/benchmarks.md."""
    if lanes > 128:
        return 32, 2, 4
    if programs <= 16:
        return 32, 1, 2
    if programs <= 128:
        return 32, 3, 2
    return (64, 3, 2) if programs < 1792 else (32, 4, 1)
