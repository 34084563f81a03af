"""Attention of a single row in clusters of blocks: what `hbserve.attention.row_decode` does, in less time.

`row_cluster.cu` is the kernel, and says how it works. Blocks of a cluster merge their results in shared memory. In
Triton they would go through global memory, behind a counter, which takes as long as all the rest.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import torch
from torch import Tensor

from hbserve.attention.base import HeadTransform
from hbserve.attention.row_decode import RowDecode
from hbserve.platform.cuda_driver import overlaps
from hbserve.platform.cuda_source import ClusterKernel, can_compile

_SOURCE = Path(__file__).with_suffix(".cu")
MAX_SHORT_TOKENS = 4096
"""Tokens of a sequence up to which this kernel is the faster one; each KV head has few multiprocessors."""

_CLUSTER, _WARPS = 8, 8
"""Blocks of a cluster, and warps of a block."""
_MAX_GROUP, _MAX_HEAD_DIM = 8, 256
_DTYPES = (torch.bfloat16, torch.float16)


class RowCluster:
    """Attention of batches of one row over one KV cache, fit for a CUDA graph.

    The kernel is compiled when the first layer is computed: only then the transform of heads is known. Where the
    process's share of the device has no room for a cluster, `RowDecode` computes instead.

    Args:
        kv_cache: see `hbserve.attention.base.Attention`; in the dtype of keys and values.
        num_heads: query heads of this rank.
        counters: see `RowDecode`.
    """

    def __init__(self, kv_cache: Tensor, num_heads: int, counters: Tensor) -> None:
        self._cache = kv_cache
        self._without_clusters = RowDecode(kv_cache, num_heads, counters)
        self._num_heads, self._num_kv_heads = num_heads, kv_cache.shape[4]
        self._kernels: dict[tuple[int, bool, bool], ClusterKernel] = {}

    @staticmethod
    def supports(kv_cache: Tensor, num_heads: int) -> bool:
        """Whether there is a kernel for such a cache on its device."""
        num_kv_heads, head_dim = kv_cache.shape[4:]
        return (
            kv_cache.dtype in _DTYPES
            and num_heads // num_kv_heads <= _MAX_GROUP
            and head_dim <= _MAX_HEAD_DIM
            and head_dim % 8 == 0
            and can_compile(kv_cache.device)
        )

    def attend(
        self, layer: int, qkv: Tensor, heads: HeadTransform, position: Tensor, slot: Tensor, pages: Tensor, out: Tensor
    ) -> None:
        """Do what `RowDecode.attend` does."""
        cache = self._cache[:, layer]
        kernel = self._kernel(heads)
        if not kernel.fits:
            self._without_clusters.attend(layer, qkv, heads, position, slot, pages, out)
            return
        q_norm, k_norm = heads.norms or (qkv, qkv)
        scale = self._cache.shape[-1] ** -0.5 * math.log2(math.e)
        kernel.launch(
            self._num_kv_heads,
            qkv, cache, q_norm, k_norm, heads.inverse_frequencies, position, slot, pages, out,
            *[ctypes.c_int64(stride) for stride in cache.stride()[:3]], ctypes.c_int(len(pages)),
            ctypes.c_float(scale), ctypes.c_float(heads.magnitude), ctypes.c_float(heads.eps),
            overlap=overlaps(qkv.device),
        )  # fmt: skip

    def _kernel(self, heads: HeadTransform) -> ClusterKernel:
        key = heads.rotated_dim, heads.is_interleaved, heads.norms is not None
        kernel = self._kernels.get(key)
        if kernel is None:
            _, _, _, page, num_kv_heads, head_dim = self._cache.shape
            num_warps = _WARPS if head_dim <= 128 else _WARPS // 2  # by registers
            macros = {
                "GROUP": self._num_heads // num_kv_heads,
                "KV_HEADS": num_kv_heads,
                "HEAD_DIM": head_dim,
                "ROTATED_DIM": heads.rotated_dim,
                "IS_INTERLEAVED": int(heads.is_interleaved),
                "HAS_NORM": int(heads.norms is not None),
                "PAGE": page,
                "IS_BFLOAT16": int(self._cache.dtype == torch.bfloat16),
                "WARPS": num_warps,
                "CLUSTER": _CLUSTER,
            }
            kernel = ClusterKernel(_SOURCE, "row_cluster", macros, 32 * num_warps, _CLUSTER, self._cache.device)
            self._kernels[key] = kernel
        return kernel
