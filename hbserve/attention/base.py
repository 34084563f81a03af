"""What the forward pass asks of an attention backend, and what a backend is told of a step."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from hbserve.kv_cache.layout import KVLayout
from hbserve.model_spec import ModelSpec
from hbserve.platform import Platform


@dataclass(frozen=True)
class AttentionBatch:
    """The rows of one step: sequences, each with the tokens it computes now.

    Rows of a single token come first, whether they decode or end a prompt: kernels want them
    apart, and so their tokens are the first ``num_decode_rows`` of the flat batch.

    Attributes:
        num_decode_rows: rows with one token.
        query_starts: int32 ``[rows + 1]``, on the host: row i's tokens are
            ``query_starts[i] .. query_starts[i + 1] - 1`` of the flat batch.
        context_lens: int32 ``[rows]``, on the host: tokens of the sequence up to and including this step's.
        block_tables: int32 ``[rows, width]``, on the host: block ids of positions 0..; what lies past
            the context is undefined.
        slot_mapping: int64 ``[tokens]``, on the device: where each token's KV goes,
            ``block id * block size + offset in the block``.
    """

    num_decode_rows: int
    query_starts: npt.NDArray[np.int32]
    context_lens: npt.NDArray[np.int32]
    block_tables: npt.NDArray[np.int32]
    slot_mapping: torch.Tensor


@dataclass(frozen=True)
class PageTables:
    """The pages of a batch, on the host.

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


class Attention(ABC):
    """What the forward pass sees of attention: causal, of one rank, over a block-major KV cache.

    All layers share one softmax scale, ``1 / sqrt(head_dim)``.

    Args:
        layout: of the cache.
        kv_cache: ``[block, layer, k/v, token, kv head, head dim]``, a view of the KV arena, used in place.
    """

    slot_mapping: torch.Tensor
    """Of the step that has begun; see `AttentionBatch`."""

    def __init__(self, layout: KVLayout, kv_cache: torch.Tensor) -> None:
        self.layout, self.kv_cache = layout, kv_cache

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the step's keys and values ``[tokens, kv heads, head_dim]`` to the cache.

        All rows are written before any is read, so a row may share blocks that another row of the
        same step fills.
        """
        block_size = self.layout.block_size
        blocks, offsets = self.slot_mapping // block_size, self.slot_mapping % block_size
        self.kv_cache[blocks, layer, 0, offsets] = k
        self.kv_cache[blocks, layer, 1, offsets] = v

    @abstractmethod
    def attend(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        """Attend over the cache, which has the step's own keys and values: each token to its past.

        Args:
            q: ``[tokens, heads, head_dim]``.
            out: contiguous, of the same shape; written.
        """


class AttentionBackend(Attention):
    """Attention of any batch, through block tables.

    Args:
        layout, kv_cache: see `Attention`.
        tp_size: ranks that share the query heads.
    """

    name: ClassVar[str]
    preferred_block_size: ClassVar[int]
    """Tokens per block that suit the kernels best."""

    block_size_multiple: ClassVar[int] = 1
    """What the tokens per block must be a multiple of."""

    def __init__(
        self, spec: ModelSpec, layout: KVLayout, kv_cache: torch.Tensor, platform: Platform, tp_size: int = 1
    ) -> None:
        super().__init__(layout, kv_cache)
        self.spec, self.platform = spec, platform
        self.num_heads = spec.num_heads // tp_size

    @classmethod
    @abstractmethod
    def supports(cls, spec: ModelSpec, dtype: torch.dtype, platform: Platform) -> str | None:
        """None, or why this backend cannot serve that model in that dtype on that device."""

    @abstractmethod
    def begin(self, batch: AttentionBatch) -> None:
        """Prepare for a step, once for all layers; keeps ``slot_mapping``."""


def library_problem(package: str, wheel: str, spec: ModelSpec, dtype: torch.dtype, platform: Platform) -> str | None:
    """Why a library of CUDA kernels cannot be used for a model, whatever its head size; None if it can.

    Args:
        package: that is imported; ``wheel`` is what to install.
    """
    if platform.name != "cuda":
        return "needs a CUDA device"
    if importlib.util.find_spec(package) is None:
        return f"is not installed (pip install {wheel})"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"has no kernels for {dtype}"
    if any(window is not None for window in spec.sliding_windows):
        return "is not set up for sliding windows"
    return None
