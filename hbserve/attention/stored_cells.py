"""Writes a step's keys and values to the paged KV cache, as a Triton kernel: padded tokens have no place in it.

The kernels of `hbserve.layers.fused` do this with the rotation. Families that they do not compute store by this one, so
that their steps fit into CUDA graphs.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _store_kernel(  # type: ignore[no-untyped-def]
    k, v, cache, kv_scales, slots, stride_k, stride_v, stride_block, stride_kv, stride_token,
    head_dim: tl.constexpr, size: tl.constexpr, num_kv_heads: tl.constexpr, page: tl.constexpr, block: tl.constexpr,
    is_fp8: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    column = tl.program_id(1) * block + tl.arange(0, block)
    in_row = column < size
    key = tl.load(k + token * stride_k + column, mask=in_row, other=0.0)
    value = tl.load(v + token * stride_v + column, mask=in_row, other=0.0)
    if is_fp8:
        head = column // head_dim
        key_scale = tl.load(kv_scales + head, mask=in_row, other=1.0)
        value_scale = tl.load(kv_scales + num_kv_heads + head, mask=in_row, other=1.0)
        key = tl.clamp(key.to(tl.float32) / key_scale, -448.0, 448.0)
        value = tl.clamp(value.to(tl.float32) / value_scale, -448.0, 448.0)
    target = cache + (slot // page) * stride_block + (slot % page) * stride_token + column
    tl.store(target, key.to(cache.dtype.element_ty), mask=in_row)
    tl.store(target + stride_kv, value.to(cache.dtype.element_ty), mask=in_row)


def store_cells(k: Tensor, v: Tensor, cache: Tensor, kv_scales: Tensor | None, slots: Tensor) -> None:
    """Write keys and values ``[tokens, kv heads, head_dim]``; heads of a token are neighbours in memory.

    Args:
        cache: one layer, ``[block, k/v, token, kv head, head_dim]``, strided in its first dimension.
        kv_scales: float32 ``[k/v, kv heads]`` of a cache in FP8; None: the cache has the dtype of ``k``.
        slots: int64 ``[tokens]``; a token with a negative one is not stored.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    assert k.stride()[1:] == v.stride()[1:] == (head_dim, 1), "heads of a token are neighbours"
    size = num_kv_heads * head_dim
    kernel: Any = _store_kernel
    kernel[(num_tokens, triton.cdiv(size, _BLOCK))](
        k, v, cache, k if kv_scales is None else kv_scales, slots, k.stride(0), v.stride(0), *cache.stride()[:3],
        head_dim, size, num_kv_heads, cache.shape[2], _BLOCK, kv_scales is not None,
    )  # fmt: skip
