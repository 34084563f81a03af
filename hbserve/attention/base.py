"""The interface between the forward pass and an attention backend, and the description of a step's batch."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hbserve.float8 import FP8, rounded
from hbserve.kv_cache.layout import KVLayout
from hbserve.model_spec import ModelSpec
from hbserve.platform import Platform
from hbserve.platform.cuda_driver import has_triton


@dataclass(frozen=True)
class AttentionBatch:
    """The rows of one step: sequences, each with the tokens that the step computes for it.

    Rows with a single token come first, whether they decode or end a prompt, because kernels treat them apart::

        row              0   1   2        3             num_decode_rows = 2
        flat batch      [a] [b] [c c c c] [d d d]
        query_starts     0   1   2        6      9

    Attributes:
        num_decode_rows: rows with one token.
        query_starts: int32 ``[rows + 1]``, on the host: row i's tokens are
            ``query_starts[i] .. query_starts[i + 1] - 1`` of the flat batch.
        context_lens: int32 ``[rows]``, on the host: tokens of the sequence including this step's.
        block_tables: int32 ``[rows, width]``, on the host: block ids from position 0; entries past the context are
            undefined.
        slot_mapping: int64 ``[tokens]``, on the device: the place of each token's KV in the cache,
            ``block id * block size + offset in the block``.
    """

    num_decode_rows: int
    query_starts: npt.NDArray[np.int32]
    context_lens: npt.NDArray[np.int32]
    block_tables: npt.NDArray[np.int32]
    slot_mapping: Tensor


@dataclass(frozen=True)
class PageTables:
    """A batch's block tables without gaps, on the host, in the form that attention kernels take.

    Attributes:
        indptr: int32 ``[rows + 1]``; row i's pages are ``indices[indptr[i]:indptr[i + 1]]``.
        indices: int32 ``[pages]``, block ids.
        last_page_len: int32 ``[rows]``, tokens in the row's last page.
    """

    indptr: npt.NDArray[np.int32]
    indices: npt.NDArray[np.int32]
    last_page_len: npt.NDArray[np.int32]

    @staticmethod
    def build(context_lens: npt.NDArray[np.int32], block_tables: npt.NDArray[np.int32], block_size: int) -> PageTables:
        """Join block tables ``[rows, width]`` of rows with context lengths ``[rows]``."""
        pages = -(-context_lens // block_size)
        indptr = np.zeros(len(pages) + 1, np.int32)
        np.cumsum(pages, out=indptr[1:])
        indices = block_tables[np.arange(block_tables.shape[1]) < pages[:, None]]
        return PageTables(indptr, indices, (context_lens - (pages - 1) * block_size).astype(np.int32))


@dataclass(frozen=True)
class ScoreRules:
    """How attention scores become weights, where a model differs from ``softmax(q . k / sqrt(head_dim))``.

    Attributes:
        scale: factor of the scores; None: ``1 / sqrt(head_dim)``.
        cap: soft cap of the scaled scores; None: there is none.
        windows: per layer, tokens that a token sees, itself included; None: all. Empty: all layers see all.
        sinks: float32 ``[layers, heads]`` of this rank; None: there are none.
    """

    scale: float | None = None
    cap: float | None = None
    windows: tuple[int | None, ...] = ()
    sinks: Tensor | None = None

    @staticmethod
    def of(spec: ModelSpec, sinks: Tensor | None = None) -> ScoreRules:
        """Return the rules of a model; ``sinks`` as the attribute."""
        windows = spec.sliding_windows if any(window is not None for window in spec.sliding_windows) else ()
        return ScoreRules(spec.scales.attention, spec.scales.attention_cap, windows, sinks)

    @property
    def are_usual(self) -> bool:
        """Whether the model does not differ."""
        return self.scale is None and self.cap is None and not self.windows and self.sinks is None

    def window(self, layer: int) -> int | None:
        """Return the window of a layer."""
        return self.windows[layer] if self.windows else None


class HeadTransform(NamedTuple):
    """What is done to heads of queries and keys before attention.

    Attributes:
        norms: weights ``[head_dim]`` of the RMS norms of q and k; None: no norms.
        eps: of these norms.
        inverse_frequencies, magnitude, rotated_dim, is_interleaved: see `hbserve.layers.rotary.RotaryEmbedding`.
    """

    norms: tuple[Tensor, Tensor] | None
    eps: float
    inverse_frequencies: Tensor
    magnitude: float
    rotated_dim: int
    is_interleaved: bool


class Attention(ABC):
    """Causal attention of one rank over a block-major KV cache.

    All layers share one factor of the scores: ``1 / sqrt(head_dim)``, unless `Scales` has another.

    Args:
        layout: layout of the cache.
        kv_cache: ``[block, layer, k/v, token, kv head, head dim]``, a view of the KV arena, used in place.
        kv_scales: float32 ``[layers, k/v, kv heads]``, for a cache in FP8 only; None: all are 1.

    Attributes:
        kv_scales: factors of what lies in the cache; None: the cache has the dtype of keys and values.
    """

    slot_mapping: Tensor
    """Slot mapping of the step that has begun; see `AttentionBatch`."""

    transforms_heads: bool = False
    """Whether the step that has begun has one row, and `attend_transformed` computes it."""

    def __init__(self, layout: KVLayout, kv_cache: Tensor, kv_scales: Tensor | None = None) -> None:
        self.layout, self.kv_cache = layout, kv_cache
        self.kv_scales: Tensor | None = None
        if layout.dtype == FP8:
            shape = layout.num_layers, 2, layout.num_kv_heads
            ones = torch.ones(shape, dtype=torch.float32, device=kv_cache.device)
            self.kv_scales = ones if kv_scales is None else kv_scales.view(shape)
        self._has_store_kernel = has_triton(kv_cache.device)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the step's keys and values ``[tokens, kv heads, head_dim]`` to the cache.

        All rows are written before any row is read, so a row may share blocks that another row of the same step fills.
        On a GPU with Triton, a token with a negative slot is not stored.
        """
        if self._has_store_kernel:
            from hbserve.attention.stored_cells import store_cells

            scales = None if self.kv_scales is None else self.kv_scales[layer]
            store_cells(_row_major(k), _row_major(v), self.kv_cache[:, layer], scales, self.slot_mapping)
            return
        block_size = self.layout.block_size
        blocks, offsets = self.slot_mapping // block_size, self.slot_mapping % block_size
        cells = as_bytes(self.kv_cache)
        cells[blocks, layer, 0, offsets], cells[blocks, layer, 1, offsets] = self.cells_of(layer, k, v)

    def cells_of(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[tokens, kv heads, head_dim]`` as the cache holds them, FP8 as uint8."""
        if self.kv_scales is None:
            return k, v
        scales = self.kv_scales[layer, :, None, :, None]
        return as_bytes(rounded(k.float() / scales[0])), as_bytes(rounded(v.float() / scales[1]))

    @abstractmethod
    def attend(self, layer: int, q: Tensor, out: Tensor) -> None:
        """Let each token attend to its sequence up to itself; `store` has written the step's keys and values.

        Args:
            q: ``[tokens, heads, head_dim]``.
            out: receives the result; contiguous, same shape.
        """

    def attend_transformed(self, layer: int, qkv: Tensor, heads: HeadTransform, out: Tensor) -> None:
        """Norm and rotate heads, store the newest key and value, and attend, in one kernel; if `transforms_heads`.

        Args:
            qkv: contiguous ``[1, (heads + 2 kv heads) * head_dim]``.
            out: receives the result; contiguous ``[1, heads, head_dim]``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no such kernel")


def _row_major(heads: Tensor) -> Tensor:
    """Return ``[tokens, heads, head_dim]`` with the heads of each token side by side."""
    return heads if heads.stride()[1:] == (heads.shape[2], 1) else heads.contiguous()


def as_bytes(cells: Tensor) -> Tensor:
    """View FP8 as uint8, which torch can index; other dtypes stay as they are."""
    return cells.view(torch.uint8) if cells.dtype == FP8 else cells


class AttentionBackend(Attention):
    """Attention of any batch, through block tables.

    Args:
        layout, kv_cache, kv_scales: see `Attention`.
        tp_size: number of ranks that share the query heads.
        sinks: float32 ``[layers * heads]``, those of this rank's heads (`Family.has_sinks`); None: there are none.
    """

    name: ClassVar[str]
    preferred_block_size: ClassVar[int]
    """Tokens per block that suit the kernels best."""

    block_size_multiple: ClassVar[int] = 1
    """Tokens per block must be a multiple of this."""

    short_chunk_tokens: int | None = None
    """Tokens of a chunk that has other kernels than long ones have; None: all chunks have the same."""

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
        super().__init__(layout, kv_cache, kv_scales)
        self.spec, self.platform = spec, platform
        self.num_heads = spec.num_heads // tp_size
        self.sinks = None if sinks is None else sinks.view(spec.num_layers, self.num_heads)

    @classmethod
    @abstractmethod
    def supports(cls, spec: ModelSpec, dtype: torch.dtype, platform: Platform) -> str | None:
        """Return None, or the reason why this backend cannot serve that model in that dtype on that device."""

    @abstractmethod
    def begin(self, batch: AttentionBatch) -> None:
        """Prepare for a step, once for all layers; sets ``slot_mapping``."""


def library_problem(package: str, wheel: str, spec: ModelSpec, dtype: torch.dtype, platform: Platform) -> str | None:
    """Return the reason why a library of CUDA kernels cannot serve a model, whatever its head size; None if it can.

    Args:
        package: name to import.
        wheel: name to install.
    """
    if has_unusual_scores(spec):
        return "is not set up for a factor, a soft cap or sinks of attention scores"
    if platform.name != "cuda":
        return "needs a CUDA device"
    if importlib.util.find_spec(package) is None:
        return f"is not installed (pip install {wheel})"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"has no kernels for {dtype}"
    if any(window is not None for window in spec.sliding_windows):
        return "is not set up for sliding windows"
    if spec.kv_format is not None:
        return "is not set up for KV in FP8"
    return None


def has_unusual_scores(spec: ModelSpec) -> bool:
    """Whether attention scores have another factor than ``1 / sqrt(head_dim)``, a soft cap, or sinks."""
    return spec.family.has_sinks or spec.scales.attention is not None or spec.scales.attention_cap is not None
