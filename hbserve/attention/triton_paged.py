"""Attention by HBServe's own Triton kernels, the only ones here that read KV in FP8 on a GPU."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hbserve.attention.base import AttentionBackend, AttentionBatch, PageTables, ScoreRules
from hbserve.attention.flashinfer import FlashInferBackend
from hbserve.kv_cache.layout import KVLayout
from hbserve.model_spec import ModelSpec
from hbserve.platform import Platform

if TYPE_CHECKING:
    from hbserve.attention.paged_decode import PagedDecode
    from hbserve.attention.paged_prefill import PrefillInputs
    from hbserve.attention.widened_prefill import WidenedPrefill


class TritonBackend(AttentionBackend):
    """`PagedDecode` for single tokens, `hbserve.attention.paged_prefill` for longer rows.

    Long chunks over KV in FP8 go through `WidenedPrefill`, where FlashInfer has kernels for the model.
    """

    name = "triton"
    preferred_block_size = 16

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
        self._rules = ScoreRules.of(spec, self.sinks)
        self._decode: PagedDecode | None = None
        self._max_decode_rows = 0
        self._num_decode_rows = 0
        self._chunks: PrefillInputs | None = None
        self._is_widened = False
        self._widened: WidenedPrefill | None = None
        if self.kv_scales is not None and self._rules.are_usual and FlashInferBackend.supports_heads(spec.head_dim):
            from hbserve.attention.widened_prefill import WidenedPrefill

            self._widened = WidenedPrefill(spec, layout, platform, tp_size)
            self.short_chunk_tokens = 2

    @classmethod
    def supports(cls, spec: ModelSpec, dtype: torch.dtype, platform: Platform) -> str | None:
        if platform.name != "cuda":
            return "needs a CUDA device"
        if importlib.util.find_spec("triton") is None:
            return "is not installed (pip install triton)"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"has no kernels for {dtype}"
        if spec.head_dim > 256:
            return f"has no kernels for head size {spec.head_dim}, only up to 256"
        return None

    def begin(self, batch: AttentionBatch) -> None:
        self.slot_mapping = batch.slot_mapping
        tables = PageTables.build(batch.context_lens, batch.block_tables, self.layout.block_size)
        split = self._num_decode_rows = batch.num_decode_rows
        if split:
            self._begin_decodes(batch, tables, split)
        self._chunks, self._is_widened = None, False
        if split < len(batch.context_lens):
            starts, contexts = batch.query_starts[split:], batch.context_lens[split:]
            if self._widened is not None and self._widened.suits(np.diff(starts), contexts):
                self._is_widened = True
                tables_of_chunks = batch.block_tables[split:]
                self._widened.begin(
                    AttentionBatch(0, starts - starts[0], contexts, tables_of_chunks, batch.slot_mapping[split:])
                )
            else:
                self._begin_chunks(batch, tables, split)

    def _begin_decodes(self, batch: AttentionBatch, tables: PageTables, num_rows: int) -> None:
        from hbserve.attention.paged_decode import DecodeInputs, PagedDecode

        if self._decode is None or num_rows > self._max_decode_rows:
            self._max_decode_rows = max(num_rows, 2 * self._max_decode_rows)
            self._decode = PagedDecode(
                self.layout, self.kv_cache, self.num_heads, self._max_decode_rows, self.kv_scales, self._rules
            )
        lens = batch.context_lens[:num_rows]
        cut = self._decode.cut(lens)
        positions = self._on_device(lens.astype(np.int64) - 1)
        self._decode.begin(
            DecodeInputs(
                pieces=self._on_device(cut.pieces),
                first_piece=self._on_device(cut.first_piece),
                first_row=self._on_device(np.arange(num_rows + 1, dtype=np.int32)),
                indptr=self._on_device(tables.indptr[: num_rows + 1]),
                indices=self._on_device(tables.indices[: tables.indptr[num_rows]]),
                positions=positions,
                num_stored=positions,
                slot_mapping=batch.slot_mapping[:num_rows],
                chunk_len=self._on_device(np.array([cut.chunk_len], np.int32)),
            )
        )

    def _begin_chunks(self, batch: AttentionBatch, tables: PageTables, first_row: int) -> None:
        from hbserve.attention.paged_prefill import PrefillInputs, cut_tiles

        starts = batch.query_starts[first_row:]
        lens = np.diff(starts)
        first_positions = batch.context_lens[first_row:] - lens
        self._chunks = PrefillInputs(
            tiles=self._on_device(cut_tiles(lens, first_positions, self.num_heads // self.layout.num_kv_heads)),
            first_query=self._on_device(starts),
            first_position=self._on_device(first_positions),
            indptr=self._on_device(tables.indptr[first_row:]),
            indices=self._on_device(tables.indices),
        )

    def attend(self, layer: int, q: Tensor, out: Tensor) -> None:
        split = self._num_decode_rows
        if split:
            assert self._decode is not None, "no step has begun"
            self._decode.attend(layer, q[:split], out[:split])
        if self._is_widened:
            assert self._widened is not None, "a step with it has begun"
            assert self.kv_scales is not None, "the cache is in FP8"
            self._widened.attend(q[split:], self.kv_cache[:, layer], self.kv_scales[layer], out[split:])
        if self._chunks is not None:
            from hbserve.attention.paged_prefill import attend_chunks

            scales = None if self.kv_scales is None else self.kv_scales[layer]
            attend_chunks(layer, q, self.kv_cache[:, layer], scales, self._chunks, self.layout, self._rules, out)

    def _on_device(self, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Tensor:
        host = torch.from_numpy(np.ascontiguousarray(array))
        return host.pin_memory().to(self.platform.device, non_blocking=True)
