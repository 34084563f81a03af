"""Attention of long prompt chunks over KV in FP8: its pages are widened to the model's dtype, layer by layer.

FlashAttention-3 is faster than the kernel that reads FP8 itself, and reads only 16-bit keys and values. A layer's pages
of a step are therefore copied to a scratch cache of one layer first. The copy takes little beside the attention that
follows, if there are many queries to each key.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from hbserve.attention.base import AttentionBatch, PageTables
from hbserve.attention.flashinfer import FlashInferBackend
from hbserve.kv_cache.layout import KVLayout
from hbserve.model_spec import ModelSpec
from hbserve.platform import Platform

_MIN_QUERIES_PER_ROW = 128
_MAX_TOKENS = 65536
"""Tokens of all contexts of a step: 256 MiB of scratch for 8 heads of 128 elements."""

_BLOCK = 2048


@triton.jit
def _widen_pages_kernel(  # type: ignore[no-untyped-def]
    cache, scales, indices, out, stride_block, stride_kv,
    num_heads: tl.constexpr, head_dim: tl.constexpr, size: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    page, kv = tl.program_id(0), tl.program_id(1)
    source = cache + tl.load(indices + page).to(tl.int64) * stride_block + kv * stride_kv
    target = out + (page.to(tl.int64) * 2 + kv) * size
    for first in range(0, size, block):
        at = first + tl.arange(0, block)
        mask = at < size
        scale = tl.load(scales + kv * num_heads + at // head_dim % num_heads, mask=mask, other=0.0)
        values = tl.load(source + at, mask=mask, other=0.0).to(tl.float32) * scale
        tl.store(target + at, values.to(out.dtype.element_ty), mask=mask)


class WidenedPrefill:
    """Attention of a step's chunks by FlashInfer, over a scratch cache.

    Args:
        layout: of the cache in FP8.
        tp_size: number of ranks that share the query heads.
    """

    def __init__(self, spec: ModelSpec, layout: KVLayout, platform: Platform, tp_size: int) -> None:
        self._spec, self._layout, self._platform, self._tp_size = spec, layout, platform, tp_size
        self._backend: FlashInferBackend | None = None
        self._batch: AttentionBatch | None = None

    @staticmethod
    def suits(query_lens: npt.NDArray[np.int32], context_lens: npt.NDArray[np.int32]) -> bool:
        """Return whether a step's chunks have enough queries for their contexts, which must fit into the scratch."""
        has_queries = int(query_lens.sum()) >= _MIN_QUERIES_PER_ROW * len(query_lens)
        return has_queries and int(context_lens.sum()) <= _MAX_TOKENS

    def begin(self, batch: AttentionBatch) -> None:
        """Prepare for a step of chunks alone: its rows, with query starts from 0."""
        tables = PageTables.build(batch.context_lens, batch.block_tables, self._layout.block_size)
        indices = torch.from_numpy(tables.indices).pin_memory()
        self._indices = indices.to(self._platform.device, non_blocking=True)
        counts = np.diff(tables.indptr)
        scratch_tables = tables.indptr[:-1, None] + np.arange(counts.max(), dtype=np.int32)
        self._batch = AttentionBatch(0, batch.query_starts, batch.context_lens, scratch_tables, batch.slot_mapping)
        self._is_planned = False

    def attend(self, q: Tensor, cache: Tensor, scales: Tensor, out: Tensor) -> None:
        """Let each token of the chunks attend to its sequence up to itself.

        Args:
            q, out: contiguous ``[tokens, heads, head_dim]``, of the chunks.
            cache: one layer in FP8, ``[block, k/v, token, kv head, head_dim]``, strided in its first dimension.
            scales: float32 ``[k/v, kv heads]``.
        """
        assert self._batch is not None, "no step has begun"
        backend = self._backend_for(q.dtype)
        if not self._is_planned:
            backend.begin(self._batch)
            self._is_planned = True
        num_pages, size = len(self._indices), cache[0, 0].numel()
        scratch = torch.empty(num_pages, 1, *cache.shape[1:], dtype=q.dtype, device=q.device)
        _widen_pages_kernel[(num_pages, 2)](
            cache, scales, self._indices, scratch, cache.stride(0), cache.stride(1),
            self._layout.num_kv_heads, self._layout.head_dim, size, _BLOCK, num_warps=4,
        )  # fmt: skip
        backend.kv_cache = scratch
        backend.attend(0, q, out)

    def _backend_for(self, dtype: torch.dtype) -> FlashInferBackend:
        layout = self._layout
        if self._backend is None or self._backend.layout.dtype != dtype:
            wide = KVLayout(1, layout.block_size, layout.num_kv_heads, layout.head_dim, dtype)
            empty = torch.empty(0, 1, *wide.block_shape[1:], dtype=dtype, device=self._platform.device)
            self._backend = FlashInferBackend(self._spec, wide, empty, self._platform, self._tp_size)
        return self._backend
