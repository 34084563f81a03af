"""Attention by FlashInfer: tensor-core decode, FlashAttention-3 paged prefill on Hopper."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hbserve.attention.base import AttentionBackend, AttentionBatch, PageTables, library_problem
from hbserve.kv_cache.layout import KVLayout
from hbserve.model_spec import ModelSpec
from hbserve.platform import Platform

_WORKSPACE_BYTES = 256 << 20
_INT_WORKSPACE_BYTES = 8 << 20
_HEAD_DIMS = (64, 128, 256)
_MAX_SHORT_QUERIES = 128
"""Maximum of prompt tokens in a step for which a kernel is used that splits the keys of a sequence.

FlashAttention-3's programs each have 128 queries of a head and all their keys, so few queries leave most of a GPU idle.
On an H200, 16 queries of Qwen3-8B behind 32,768 keys take 444 µs a layer, and 54 µs if the keys are split. 128 queries
take 445 and 213 µs, and 256 take the same time with both kernels.
"""
_NUM_SCHEDULE_BUFFERS = 8
"""Host buffers for schedules: the copy of one to the device may still be pending when later steps are planned."""


class FlashInferBackend(AttentionBackend):
    """FlashInfer's paged wrappers over the strided view of one layer of the arena."""

    name = "flashinfer"
    preferred_block_size = 16
    short_chunk_tokens = 2

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
        import flashinfer

        device = platform.device
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._host_schedules = [
            torch.empty(_INT_WORKSPACE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(_NUM_SCHEDULE_BUFFERS)
        ]
        self._host_schedule_copied: list[torch.cuda.Event | None] = [None] * _NUM_SCHEDULE_BUFFERS
        self._schedule = 0
        self._prefill: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend="auto")
        self._decode: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(self._workspace, "NHD", use_tensor_cores=True)
        self._short_prefill: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend="fa2")
        self._chunks = self._prefill  # the wrapper of the step's chunks
        self._num_decode_rows = 0
        self._num_tokens = 0

    @staticmethod
    def supports_heads(head_dim: int) -> bool:
        """Return whether FlashInfer is there and has kernels for a head size."""
        return head_dim in _HEAD_DIMS and importlib.util.find_spec("flashinfer") is not None

    @classmethod
    def supports(cls, spec: ModelSpec, dtype: torch.dtype, platform: Platform) -> str | None:
        problem = library_problem("flashinfer", "flashinfer-python", spec, dtype, platform)
        if problem is None and spec.head_dim not in _HEAD_DIMS:
            problem = f"has no kernels for head size {spec.head_dim}, only for {', '.join(map(str, _HEAD_DIMS))}"
        return problem

    def begin(self, batch: AttentionBatch) -> None:
        self.slot_mapping = batch.slot_mapping
        self._num_decode_rows = batch.num_decode_rows
        self._num_tokens = int(batch.query_starts[-1])
        tables = PageTables.build(batch.context_lens, batch.block_tables, self.layout.block_size)
        split, pages = batch.num_decode_rows, int(tables.indptr[batch.num_decode_rows])
        indptr, indices, last_page_len = map(torch.from_numpy, (tables.indptr, tables.indices, tables.last_page_len))
        layout = self.layout
        shape = self.num_heads, layout.num_kv_heads, layout.head_dim, layout.block_size
        if split:
            decode_pages = indptr[: split + 1], indices[:pages], last_page_len[:split]
            with self._next_schedule(self._decode):
                self._decode.plan(*decode_pages, *shape, q_data_type=layout.dtype)
        if split < len(batch.context_lens):
            query_starts = torch.from_numpy(batch.query_starts[split:] - batch.query_starts[split])
            prompt_pages = indptr[split:] - indptr[split], indices[pages:], last_page_len[split:]
            self._chunks = self._short_prefill if int(query_starts[-1]) <= _MAX_SHORT_QUERIES else self._prefill
            with self._next_schedule(self._chunks):
                self._chunks.plan(query_starts, *prompt_pages, *shape, causal=True, q_data_type=layout.dtype)

    def attend(self, layer: int, q: Tensor, out: Tensor) -> None:
        cache = self.kv_cache[:, layer]
        split = self._num_decode_rows
        if split:
            self._decode.run(q[:split], cache, out=out[:split])
        if split < self._num_tokens:
            self._chunks.run(q[split:], cache, out=out[split:])

    @contextlib.contextmanager
    def _next_schedule(self, wrapper: Any) -> Iterator[None]:
        """Give a wrapper a host buffer to plan in; wait first if the device still copies from that buffer."""
        self._schedule = (self._schedule + 1) % _NUM_SCHEDULE_BUFFERS
        copied = self._host_schedule_copied[self._schedule]
        if copied is not None:
            copied.synchronize()
        wrapper._pin_memory_int_workspace_buffer = self._host_schedules[self._schedule]
        yield
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._host_schedule_copied[self._schedule] = event
