"""Attention by the paged functions of flash-attn (Dao 2023, FlashAttention-2), over blocks of 256 tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbserve.attention.base import AttentionBackend, AttentionBatch, library_problem
from hbserve.kv_cache.layout import KVLayout
from hbserve.model_spec import ModelSpec
from hbserve.platform import Platform

_PAGE_MULTIPLE = 256
_MAX_HEAD_DIM = 256


class FlashAttnBackend(AttentionBackend):
    """``flash_attn_with_kvcache`` for single tokens, ``flash_attn_varlen_func`` for longer rows."""

    name = "flash_attn"
    preferred_block_size = _PAGE_MULTIPLE
    block_size_multiple = _PAGE_MULTIPLE

    def __init__(
        self,
        spec: ModelSpec,
        layout: KVLayout,
        kv_cache: Tensor,
        platform: Platform,
        tp_size: int = 1,
        kv_scales: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        super().__init__(spec, layout, kv_cache, platform, tp_size, kv_scales, sinks)
        import flash_attn

        self._decode: Any = flash_attn.flash_attn_with_kvcache
        self._prefill: Any = flash_attn.flash_attn_varlen_func
        self._batch: AttentionBatch | None = None

    @classmethod
    def supports(cls, spec: ModelSpec, dtype: torch.dtype, platform: Platform) -> str | None:
        problem = library_problem("flash_attn", "flash-attn", spec, dtype, platform)
        if problem is None and (spec.head_dim > _MAX_HEAD_DIM or spec.head_dim % 8):
            problem = f"has no kernels for head size {spec.head_dim}, only for multiples of 8 up to {_MAX_HEAD_DIM}"
        return problem

    def begin(self, batch: AttentionBatch) -> None:
        self.slot_mapping = batch.slot_mapping
        self._batch = batch
        split = batch.num_decode_rows
        device = self.platform.device
        self._tables = torch.from_numpy(batch.block_tables).to(device, non_blocking=True)
        self._context_lens = torch.from_numpy(batch.context_lens).to(device, non_blocking=True)
        if split < len(batch.context_lens):
            query_starts = batch.query_starts[split:] - batch.query_starts[split]
            self._max_query_len = int((query_starts[1:] - query_starts[:-1]).max())
            self._max_context_len = int(batch.context_lens[split:].max())
            self._query_starts = torch.from_numpy(query_starts).to(device, non_blocking=True)
            self._key_starts = torch.nn.functional.pad(self._context_lens[split:].cumsum(0, dtype=torch.int32), (1, 0))

    def attend(self, layer: int, q: Tensor, out: Tensor) -> None:
        assert self._batch is not None, "no step has begun"
        keys, values = self.kv_cache[:, layer, 0], self.kv_cache[:, layer, 1]
        split = self._batch.num_decode_rows
        if split:
            lens, tables = self._context_lens[:split], self._tables[:split]
            out[:split] = self._decode(
                q[:split, None], keys, values, cache_seqlens=lens, block_table=tables, causal=True
            )[:, 0]
        if split < len(q):
            out[split:] = self._prefill(
                q[split:], keys, values, self._query_starts, self._key_starts,
                self._max_query_len, self._max_context_len, causal=True, block_table=self._tables[split:],
            )  # fmt: skip
