"""Attention with torch's own kernel: it runs everywhere and is the reference for the other backends.

The backend gathers keys and values from the cache through the block tables. It reads only what a step has written,
even at masked positions: unwritten memory may hold NaN, and zero times NaN is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from hbserve.attention.base import AttentionBackend, AttentionBatch, as_bytes
from hbserve.float8 import FP8, widened
from hbserve.kv_cache.layout import KVLayout
from hbserve.model_families.declaration import Scales
from hbserve.model_spec import ModelSpec
from hbserve.platform import Platform

_QUERY_TILE_TOKENS = 1024
"""Maximum queries of one kernel call with a mask: the mask stays small however long the prompt is."""


@dataclass(frozen=True)
class _Gather:
    """One kernel call: queries, and the cache rows of their keys.

    Attributes:
        queries: tokens of the flat batch: a slice for a prompt chunk, an index ``[rows]`` for decodes.
        rows: cache rows ``[sequences * keys]`` of layer 0's keys; see `SdpaBackend._row_of`.
        mask: bool, True where a query sees a key: ``[queries, keys]`` for a chunk, ``[rows, 1, 1, keys]`` for
            decodes. None: decodes see all keys, and a chunk the causal triangle.
    """

    queries: slice | Tensor
    rows: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class _WindowPlan:
    """All kernel calls of a step for the layers with one size of sliding window."""

    decodes: list[_Gather]
    chunks: list[_Gather]


class SdpaBackend(AttentionBackend):
    """`torch.nn.functional.scaled_dot_product_attention` on gathered keys and values."""

    name = "sdpa"
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
        # One row per token, layer and k/v; the rows of a layer are those of layer 0 plus a constant.
        self._cache_rows = as_bytes(kv_cache).view(-1, layout.num_kv_heads * layout.head_dim)
        self._scratch = self._cache_rows.new_empty(0)
        self._plans: dict[int | None, _WindowPlan] = {}
        self._slot_rows = torch.empty(0, dtype=torch.int64)

    @classmethod
    def supports(cls, spec: ModelSpec, dtype: torch.dtype, platform: Platform) -> str | None:
        return None

    def begin(self, batch: AttentionBatch) -> None:
        self.slot_mapping = batch.slot_mapping
        self._slot_rows = self._row_of(batch.slot_mapping)
        tables = torch.from_numpy(batch.block_tables).to(self.platform.device)
        self._plans = {window: self._plan(batch, tables, window) for window in set(self.spec.sliding_windows)}

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        if self._has_store_kernel:
            super().store(layer, k, v)
            return
        key_row = layer * 2 * self.layout.block_size
        k, v = self.cells_of(layer, k, v)
        self._cache_rows.index_copy_(0, self._slot_rows + key_row, k.flatten(1))
        self._cache_rows.index_copy_(0, self._slot_rows + key_row + self.layout.block_size, v.flatten(1))

    def attend(self, layer: int, q: Tensor, out: Tensor) -> None:
        plan = self._plans[self.spec.sliding_windows[layer]]
        sinks, scales = None if self.sinks is None else self.sinks[layer], self.spec.scales
        for gather in plan.decodes:
            keys, values = self._keys_and_values(layer, gather.rows, q.dtype)
            out[gather.queries] = _attend_decodes(q[gather.queries], keys, values, gather.mask, scales, sinks)
        for gather in plan.chunks:
            keys, values = self._keys_and_values(layer, gather.rows, q.dtype)
            out[gather.queries] = _attend_chunk(q[gather.queries], keys, values, gather.mask, scales, sinks)

    def _row_of(self, slots: Tensor) -> Tensor:
        """Turn slots (``block id * block size + offset``) into cache rows of layer 0's keys."""
        block_size = self.layout.block_size
        rows_per_block = self.layout.num_stored_layers * 2 * block_size
        return slots // block_size * rows_per_block + slots % block_size

    def _keys_and_values(self, layer: int, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[len(rows), kv heads, head_dim]`` of a layer, in the model's dtype."""
        key_row = layer * 2 * self.layout.block_size
        keys = self._gather(rows, key_row)
        values = self._gather(rows, key_row + self.layout.block_size, behind_keys=True)
        if self.kv_scales is None:
            return keys, values
        key_scales, value_scales = self.kv_scales[layer, :, :, None]
        return (
            (widened(keys.view(FP8)) * key_scales).to(dtype),
            (widened(values.view(FP8)) * value_scales).to(dtype),
        )

    def _gather(self, rows: Tensor, first_row: int, behind_keys: bool = False) -> Tensor:
        """Copy keys or values ``[len(rows), kv heads, head_dim]`` to scratch memory; values go behind the keys.

        Fresh memory for each layer would cost five times as much on the CPU, because of page faults.
        """
        width = self._cache_rows.shape[1]
        num_elements = rows.numel() * width
        if self._scratch.numel() < 2 * num_elements:
            self._scratch = self._cache_rows.new_empty(2 * num_elements)
        target = self._scratch[num_elements : 2 * num_elements] if behind_keys else self._scratch[:num_elements]
        torch.index_select(self._cache_rows, 0, rows + first_row, out=target.view(-1, width))
        return target.view(-1, self.layout.num_kv_heads, self.layout.head_dim)

    def _plan(self, batch: AttentionBatch, tables: Tensor, window: int | None) -> _WindowPlan:
        contexts = batch.context_lens
        begins = np.zeros_like(contexts) if window is None else np.maximum(contexts - window, 0)
        decodes = [
            self._plan_decodes(tables, rows, begins[rows], contexts[rows])
            for rows in _rows_by_length((contexts - begins)[: batch.num_decode_rows])
        ]
        chunks: list[_Gather] = []
        for row in range(batch.num_decode_rows, len(contexts)):
            first, end = int(batch.query_starts[row]), int(batch.query_starts[row + 1])
            start = int(contexts[row]) - (end - first)
            # torch's kernel without a mask needs no tiles
            needs_tiles = start > 0 or window is not None or not _suits_kernel(self.spec.scales, self.sinks)
            tile = _QUERY_TILE_TOKENS if needs_tiles else end - first
            for begin in range(first, end, tile):
                queries = slice(begin, min(begin + tile, end))
                chunks.append(self._plan_chunk(tables[row], queries, start + begin - first, window))
        return _WindowPlan(decodes, chunks)

    def _plan_decodes(
        self, tables: Tensor, rows: npt.NDArray[np.int64], begins: npt.NDArray[np.int32], ends: npt.NDArray[np.int32]
    ) -> _Gather:
        lengths = ends - begins
        index, first, length = (self._to_device(x)[:, None] for x in (rows, begins, lengths))
        offsets = torch.arange(int(lengths.max()), device=self.platform.device)
        seen = offsets < length
        # a padded position reads the row's first key, which a step has written, and is masked
        cache_rows = self._cache_rows_of(tables, index, first + offsets * seen)
        mask = None if (lengths == lengths[0]).all() else seen[:, None, None, :]
        return _Gather(index[:, 0], cache_rows.flatten(), mask)

    def _plan_chunk(self, table: Tensor, queries: slice, start: int, window: int | None) -> _Gather:
        """Plan queries at positions from ``start`` of the sequence with that block table."""
        end = start + queries.stop - queries.start
        begin = 0 if window is None else max(0, start - window + 1)
        keys = torch.arange(begin, end, device=self.platform.device)
        cache_rows = self._cache_rows_of(table, None, keys)
        if start == 0 and (window is None or end <= window):
            return _Gather(queries, cache_rows, None)
        query_positions = torch.arange(start, end, device=self.platform.device)[:, None]
        mask = keys <= query_positions
        if window is not None:
            mask &= keys > query_positions - window
        return _Gather(queries, cache_rows, mask)

    def _cache_rows_of(self, tables: Tensor, rows: Tensor | None, positions: Tensor) -> Tensor:
        """Look up the cache rows of positions in ``tables[rows]``, or in a single table if ``rows`` is None."""
        block_size = self.layout.block_size
        blocks = positions // block_size
        block_ids = (tables[blocks] if rows is None else tables[rows, blocks]).long()
        return self._row_of(block_ids * block_size + positions % block_size)

    def _to_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.platform.device)


def _rows_by_length(lengths: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int64]]:
    """Group rows whose numbers of keys differ by less than a factor of two, which limits the cost of padding."""
    exponents = np.frexp(lengths - 0.5)[1]
    return [np.flatnonzero(exponents == exponent) for exponent in np.unique(exponents)]


def _attend_decodes(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scales: Scales, sinks: Tensor | None
) -> Tensor:
    """Attend with one query per sequence, ``q [rows, heads, dim]``; all rows have equally many keys and values."""
    rows, _, head_dim = q.shape
    num_kv_heads = keys.shape[1]
    keys, values = (x.view(rows, -1, num_kv_heads, head_dim).transpose(1, 2) for x in (keys, values))
    # query heads of a KV head stand in for the query length: as fast as one head, without copies
    grouped = q.view(rows, num_kv_heads, -1, head_dim)
    sinks = None if sinks is None else sinks.view(num_kv_heads, -1, 1)
    return _attend(grouped, keys, values, mask, False, scales, sinks).reshape(q.shape)


def _attend_chunk(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scales: Scales, sinks: Tensor | None
) -> Tensor:
    """Attend with queries of one sequence, ``q [queries, heads, dim]``; keys and values ``[keys, kv heads, dim]``."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    # The batch is the query heads of a KV head, and all of it shares one copy of the keys. It is not the other way
    # round: where one query is left for its last tile, torch's memory-efficient kernel takes heads whose keys have
    # stride 0 for queries, and the result is wrong (https://github.com/pytorch/pytorch/issues/191937).
    grouped = q.view(num_queries, num_kv_heads, group, head_dim).permute(2, 1, 0, 3)
    keys, values = (x.transpose(0, 1)[None].expand(group, -1, -1, -1) for x in (keys, values))
    sinks = None if sinks is None else sinks.view(num_kv_heads, group).T[:, :, None, None]
    out = _attend(grouped, keys, values, mask, mask is None, scales, sinks)
    return out.permute(2, 1, 0, 3).reshape(q.shape)


def _suits_kernel(scales: Scales, sinks: Tensor | None) -> bool:
    """Whether torch's kernel computes the scores: it knows neither a soft cap nor sinks."""
    return scales.attention_cap is None and sinks is None


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scales: Scales,
    sinks: Tensor | None,
) -> Tensor:
    """Attend with ``[batch, heads, length, dim]`` each.

    Args:
        sinks: float32, broadcasts to ``[batch, heads, length, 1]``.
    """
    if _suits_kernel(scales, sinks):
        return F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, is_causal=is_causal, scale=scales.attention
        )
    scale = q.shape[-1] ** -0.5 if scales.attention is None else scales.attention
    scores, cap = q @ keys.transpose(-1, -2) * scale, scales.attention_cap
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
        scores, keys_end = torch.cat((scores, column), -1), scores.shape[-1]
        return scores.softmax(-1, dtype=torch.float32)[..., :keys_end].to(q.dtype) @ values
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ values
