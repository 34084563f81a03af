"""Attention by FlashInfer: tensor-core decode, FlashAttention-3 paged prefill on Hopper.

Decode steps can be captured in CUDA graphs: `plan_graph` writes a step's page tables and FlashInfer's
own schedule into buffers that a captured graph reads (see `hbserve.engine.decode_graphs`).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from hbserve.attention.base import AttentionBackend, AttentionBatch
from hbserve.kv_cache.layout import KVLayout
from hbserve.models.spec import ModelSpec
from hbserve.platform import Platform

_WORKSPACE_BYTES = 256 << 20
_INT_WORKSPACE_BYTES = 8 << 20
_HEAD_DIMS = (64, 128, 256)
_NUM_SCHEDULE_BUFFERS = 8
"""Host copies of a schedule: the copy to the device may still be pending when later steps are planned."""


@dataclass(frozen=True)
class PageTables:
    """Sequences as FlashInfer wants them, on the host.

    Attributes:
        indptr: int32 ``[rows + 1]``, row i's pages are ``indices[indptr[i]:indptr[i + 1]]``.
        last_page_len: int32 ``[rows]``, tokens in the last page.
    """

    indptr: npt.NDArray[np.int32]
    indices: npt.NDArray[np.int32]
    last_page_len: npt.NDArray[np.int32]

    @staticmethod
    def build(context_lens: npt.NDArray[np.int32], block_tables: npt.NDArray[np.int32], block_size: int) -> PageTables:
        """From context lengths ``[rows]`` and block tables ``[rows, width]``."""
        pages = -(-context_lens // block_size)
        indptr = np.zeros(len(pages) + 1, np.int32)
        np.cumsum(pages, out=indptr[1:])
        indices = block_tables[np.arange(block_tables.shape[1]) < pages[:, None]]
        return PageTables(indptr, indices, (context_lens - (pages - 1) * block_size).astype(np.int32))


class FlashInferBackend(AttentionBackend):
    """FlashInfer's paged wrappers over the strided view of one layer of the arena."""

    name = "flashinfer"
    preferred_block_size = 16

    def __init__(
        self, spec: ModelSpec, layout: KVLayout, kv_cache: torch.Tensor, platform: Platform, tp_size: int = 1
    ) -> None:
        super().__init__(spec, layout, kv_cache, platform, tp_size)
        import flashinfer

        self._decode_class: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper
        device = platform.device
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._schedule = torch.empty(_INT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._host_schedules = [
            torch.empty(_INT_WORKSPACE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(_NUM_SCHEDULE_BUFFERS)
        ]
        self._host_schedule_free: list[torch.cuda.Event | None] = [None] * _NUM_SCHEDULE_BUFFERS
        self._next_schedule = 0
        self._prefill: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend="auto")
        self._decode: Any = self._decode_class(self._workspace, "NHD", use_tensor_cores=True)
        self._num_decode_rows = 0
        self._num_tokens = 0
        self._graph_decode: Any = None

    @classmethod
    def supports(cls, spec: ModelSpec, dtype: torch.dtype, platform: Platform) -> str | None:
        if platform.name != "cuda":
            return "needs a CUDA device"
        if importlib.util.find_spec("flashinfer") is None:
            return "is not installed (pip install flashinfer-python)"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"has no kernels for {dtype}"
        if spec.head_dim not in _HEAD_DIMS:
            return f"has no kernels for head size {spec.head_dim}, only for {', '.join(map(str, _HEAD_DIMS))}"
        if any(window is not None for window in spec.sliding_windows):
            return "is not set up for sliding windows"
        return None

    # --- eager steps -----------------------------------------------------------------------------

    def begin(self, batch: AttentionBatch) -> None:
        self.slot_mapping = batch.slot_mapping
        self._graph_decode = None
        self._num_decode_rows = batch.num_decode_rows
        self._num_tokens = int(batch.query_starts[-1])
        tables = PageTables.build(batch.context_lens, batch.block_tables, self.layout.block_size)
        split, pages = batch.num_decode_rows, int(tables.indptr[batch.num_decode_rows])
        if split:
            self._use_next_schedule(self._decode)
            self._decode.plan(
                torch.from_numpy(tables.indptr[: split + 1]),
                torch.from_numpy(tables.indices[:pages]),
                torch.from_numpy(tables.last_page_len[:split]),
                self.num_heads,
                self.layout.num_kv_heads,
                self.layout.head_dim,
                self.layout.block_size,
                q_data_type=self.layout.dtype,
            )
            self._schedule_is_queued()
        if split < len(batch.context_lens):
            self._use_next_schedule(self._prefill)
            self._prefill.plan(
                torch.from_numpy(batch.query_starts[split:] - batch.query_starts[split]),
                torch.from_numpy(tables.indptr[split:] - tables.indptr[split]),
                torch.from_numpy(tables.indices[pages:]),
                torch.from_numpy(tables.last_page_len[split:]),
                self.num_heads,
                self.layout.num_kv_heads,
                self.layout.head_dim,
                self.layout.block_size,
                causal=True,
                q_data_type=self.layout.dtype,
            )
            self._schedule_is_queued()

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        cache = self.kv_cache[:, layer]
        if self._graph_decode is not None:
            return cast(torch.Tensor, self._graph_decode.run(q, cache))
        out = torch.empty_like(q)
        split = self._num_decode_rows
        if split:
            self._decode.run(q[:split], cache, out=out[:split])
        if split < self._num_tokens:
            self._prefill.run(q[split:], cache, out=out[split:])
        return out

    # --- captured decode steps -------------------------------------------------------------------

    def make_graph_decode(self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor) -> Any:
        """A decode wrapper for a fixed batch size that reads these int32 device buffers."""
        wrapper = self._decode_class(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=indptr,
            paged_kv_indices_buffer=indices,
            paged_kv_last_page_len_buffer=last_page_len,
        )
        # One schedule on the device serves all batch sizes: each step writes it, in the stream's order.
        wrapper._int_workspace_buffer = self._schedule
        return wrapper

    def plan_graph(self, wrapper: Any, tables: PageTables) -> None:
        """FlashInfer's schedule for a step of a captured graph; the tables are copied by the caller.

        The first time in full, later only what changes from step to step: the wrapper's own ``plan``
        spends most of its time on checks and on copies of its own.
        """
        self._use_next_schedule(wrapper)
        batch_size = len(tables.last_page_len)
        if not hasattr(wrapper, "_cached_module"):
            wrapper.plan(
                torch.from_numpy(tables.indptr),
                torch.from_numpy(tables.indices),
                torch.from_numpy(tables.last_page_len),
                self.num_heads,
                self.layout.num_kv_heads,
                self.layout.head_dim,
                self.layout.block_size,
                q_data_type=self.layout.dtype,
            )
            wrapper.query_starts = torch.arange(batch_size + 1, dtype=torch.int32)
        else:
            lengths = (np.diff(tables.indptr) - 1) * self.layout.block_size + tables.last_page_len
            wrapper._plan_info = wrapper._cached_module.plan(
                self._workspace,
                self._schedule,
                wrapper._pin_memory_int_workspace_buffer,
                wrapper.query_starts,
                torch.from_numpy(tables.indptr),
                torch.from_numpy(lengths.astype(np.int32)),
                batch_size,
                batch_size,
                self.num_heads,
                self.layout.num_kv_heads,
                self.layout.block_size,
                True,  # within a CUDA graph
                self.layout.head_dim,
                self.layout.head_dim,
                False,  # causal: one query sees all there is
                -1,  # no window
                -1,  # no fixed split
                False,  # split long sequences
                0,
            )
        self._schedule_is_queued()

    def begin_graph(self, wrapper: Any, slot_mapping: torch.Tensor) -> None:
        """From here on `attend` records that wrapper's kernels."""
        self._graph_decode = wrapper
        self.slot_mapping = slot_mapping

    def _use_next_schedule(self, wrapper: Any) -> None:
        self._next_schedule = (self._next_schedule + 1) % _NUM_SCHEDULE_BUFFERS
        queued = self._host_schedule_free[self._next_schedule]
        if queued is not None:
            queued.synchronize()
        wrapper._pin_memory_int_workspace_buffer = self._host_schedules[self._next_schedule]

    def _schedule_is_queued(self) -> None:
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._host_schedule_free[self._next_schedule] = event
