"""Triton kernels for the operations between matrix products and attention on a GPU.

Each kernel does in one pass over memory what the plain functions in `hbserve.layers.ops` and `hbserve.layers.rotary`
do in several. Those functions are the reference. The kernels compute sums and products in float32, and round values
to the model's dtype where the plain functions round them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.layers.rotary import RotaryEmbedding
from hbserve.platform.cuda_driver import overlaps


@triton.jit
def add_residual(values, residual, mask, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add float32 values to a row of the residual, in place; return the rounded sum, in float32."""
    values += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    values = values.to(dtype).to(tl.float32)
    tl.store(residual, values.to(dtype), mask=mask)
    return values


@triton.jit
def store_rms_norm(values, weights, out, mask, eps, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store the RMS norm of a row of float32 values."""
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / size + eps)
    normed = (values * scale).to(out.dtype.element_ty)
    tl.store(out, normed * weights, mask=mask)


@triton.jit
def _embed_kernel(  # type: ignore[no-untyped-def]
    given, last, slots, embedding, out, scale, num_tokens, size, block: tl.constexpr, overlap: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.load(given + row)
    if token < 0:
        token = tl.load(last + tl.load(slots + row))
    # Without a largest logit nothing was sampled; the host finds that in the result of the step before.
    token = tl.where((token >= 0) & (token < num_tokens), token, 0)
    values = tl.load(embedding + token * size + columns, mask=columns < size, other=0.0)
    tl.store(out + row * size + columns, (values.to(tl.float32) * scale).to(values.dtype), mask=columns < size)


def embed(given: Tensor, last: Tensor, slots: Tensor, embedding: Tensor, scale: float) -> Tensor:
    """Compute `hbserve.layers.ops.LayerOps.embed` where ``embedding`` has the whole vocabulary."""
    num_rows, size = len(given), embedding.shape[1]
    out = torch.empty(num_rows, size, dtype=embedding.dtype, device=embedding.device)
    block, overlap = 1024, overlaps(embedding.device)
    _embed_kernel[(num_rows, triton.cdiv(size, block))](
        given, last, slots, embedding, out, scale, embedding.shape[0], size, block, overlap,
        num_warps=4, launch_pdl=overlap,
    )  # fmt: skip
    return out


@triton.jit
def _add_rms_norm_kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, out, stride, eps,
    size: tl.constexpr, block: tl.constexpr, has_residual: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.arange(0, block)
    mask = columns < size
    weights = tl.load(weight + columns, mask=mask, other=0.0)
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    values = tl.load(x + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    if has_residual:
        values = add_residual(values, residual + row * size + columns, mask, out.dtype.element_ty)
    store_rms_norm(values, weights, out + row * size + columns, mask, eps, size)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `hbserve.layers.norms.rms_norm` of ``x [rows, size]`` with contiguous rows."""
    return _launch_norm(x, None, weight, eps)


def add_rms_norm_(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add ``x`` to ``residual`` in place and return the RMS norm of the sum; both contiguous ``[rows, size]``."""
    return _launch_norm(x, residual, weight, eps)


def _launch_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    size = x.shape[1]
    block = triton.next_power_of_2(size)
    overlap = overlaps(x.device)
    _add_rms_norm_kernel[(x.shape[0],)](
        x, x if residual is None else residual, weight, out, x.stride(0), eps,
        size, block, residual is not None, overlap,
        num_warps=max(1, min(16, block // 256)), launch_pdl=overlap,
    )  # fmt: skip
    return out


@triton.jit
def _silu_and_mul_kernel(  # type: ignore[no-untyped-def]
    gate_up, out, size: tl.constexpr, block: tl.constexpr, overlap: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    mask = columns < size
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    gate = tl.load(gate_up + row * 2 * size + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + columns, mask=mask, other=0.0)
    activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty)
    tl.store(out + row * size + columns, activated * up, mask=mask)


def silu_and_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute `hbserve.layers.activations.silu_and_mul` of ``[tokens, gate | up]``; it and ``out`` are contiguous."""
    num_tokens, double = gate_up.shape
    if out is None:
        out = torch.empty(num_tokens, double // 2, dtype=gate_up.dtype, device=gate_up.device)
    block = 1024
    overlap = overlaps(gate_up.device)
    _silu_and_mul_kernel[(num_tokens, triton.cdiv(double // 2, block))](
        gate_up, out, double // 2, block, overlap, launch_pdl=overlap
    )
    return out


@triton.jit
def _mix_stage(x, num_heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr):  # type: ignore[no-untyped-def]
    halves = tl.permute(tl.reshape(x, (num_heads, groups, 2, size)), (0, 1, 3, 2))
    a, b = tl.split(halves)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (num_heads, 2 * groups * size))


@triton.jit
def _mix(x, num_heads: tl.constexpr, half: tl.constexpr, stages: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute `hbserve.layers.rotary.hadamard` of lanes ``[heads, half]``; ``stages`` is log2(half)."""
    y = x.to(tl.float32)
    for stage in tl.static_range(stages):
        y = _mix_stage(y, num_heads, 1 << stage, half >> (stage + 1))
    return (y * tl.exp2(-0.5 * stages)).to(x.dtype)


@triton.jit
def _norm_rotate_store_kernel(  # type: ignore[no-untyped-def]
    qkv, q_out, cache, kv_scales, q_weight, k_weight, positions, slots, inverse_frequencies, magnitude, eps,
    stride_block, stride_kv, stride_token,  # of the cache
    num_heads: tl.constexpr, num_kv_heads: tl.constexpr, head_dim: tl.constexpr, half: tl.constexpr,
    rotated_dim: tl.constexpr, is_interleaved: tl.constexpr, block_size: tl.constexpr, has_norm: tl.constexpr,
    is_fp8: tl.constexpr, mix_stages: tl.constexpr,
    heads_per_program: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    # A lane has two dimensions of a head, lower and upper: a pair that turns, or two of the rest, which does not turn.
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * heads_per_program + tl.arange(0, heads_per_program)[:, None]
    lane = tl.arange(0, half)[None, :]
    in_head = lane < head_dim // 2
    turns = lane < rotated_dim // 2
    lower, upper = lane, lane + rotated_dim // 2
    if is_interleaved:
        lower, upper = 2 * lane, 2 * lane + 1
    if rotated_dim < head_dim:
        lower = tl.where(turns, lower, lane + rotated_dim // 2)
        upper = tl.where(turns, upper, lane + head_dim // 2)
    mask = in_head & (head < num_heads + 2 * num_kv_heads)
    is_q = head < num_heads
    is_v = head >= num_heads + num_kv_heads
    # Before gdc_wait() the kernel may read only weights and what the host has copied for this step.
    if has_norm:
        weight_a = tl.where(is_q, tl.load(q_weight + lower, mask=in_head), tl.load(k_weight + lower, mask=in_head))
        weight_b = tl.where(is_q, tl.load(q_weight + upper, mask=in_head), tl.load(k_weight + upper, mask=in_head))
    position = tl.load(positions + token).to(tl.float32)
    slot = tl.load(slots + token)  # negative for a padded row, which is not stored
    angle = position * tl.load(inverse_frequencies + lane, mask=turns, other=0.0)
    cos, sin = tl.cos(angle) * magnitude, tl.sin(angle) * magnitude
    if rotated_dim < head_dim:
        cos = tl.where(turns, cos, 1.0)
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    source = qkv + (token * (num_heads + 2 * num_kv_heads) + head) * head_dim
    first = tl.load(source + lower, mask=mask, other=0.0)
    second = tl.load(source + upper, mask=mask, other=0.0)
    dtype = first.dtype
    a, b = first.to(tl.float32), second.to(tl.float32)
    if has_norm:
        square = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)
        scale = tl.rsqrt(square / head_dim + eps)[:, None]
        a = ((a * scale).to(dtype) * weight_a).to(tl.float32)
        b = ((b * scale).to(dtype) * weight_b).to(tl.float32)
    first = tl.where(is_v, first, (a * cos - b * sin).to(dtype))
    second = tl.where(is_v, second, (b * cos + a * sin).to(dtype))
    if mix_stages > 0:
        first = tl.where(is_v, first, _mix(first, heads_per_program, half, mix_stages))
        second = tl.where(is_v, second, _mix(second, heads_per_program, half, mix_stages))
    q_target = q_out + (token * num_heads + head) * head_dim
    tl.store(q_target + lower, first, mask=mask & is_q)
    tl.store(q_target + upper, second, mask=mask & is_q)
    kv_head = head - num_heads - tl.where(is_v, num_kv_heads, 0)
    if is_fp8:
        at = kv_head + tl.where(is_v, num_kv_heads, 0)
        scale = tl.load(kv_scales + at, mask=(at >= 0) & (at < 2 * num_kv_heads), other=1.0)
        first = tl.clamp(first.to(tl.float32) / scale, -448.0, 448.0)
        second = tl.clamp(second.to(tl.float32) / scale, -448.0, 448.0)
    place = (slot // block_size) * stride_block + (slot % block_size) * stride_token + tl.where(is_v, stride_kv, 0)
    kv_target = cache + place + kv_head * head_dim
    is_stored = mask & (head >= num_heads) & (slot >= 0)
    tl.store(kv_target + lower, first.to(cache.dtype.element_ty), mask=is_stored)
    tl.store(kv_target + upper, second.to(cache.dtype.element_ty), mask=is_stored)


def norm_rotate_store(
    qkv: Tensor,
    cache: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    slots: Tensor,
    rotary: RotaryEmbedding,
    eps: float,
    out: Tensor,
    kv_scales: Tensor | None = None,
) -> None:
    """Normalise q and k per head, rotate them, and write k and v to the cache and q to ``out``.

    Where the cache is in FP8, q and k are mixed after that; see `RotaryEmbedding.mix`.

    Args:
        qkv: contiguous ``[tokens, (heads + 2 kv heads) * head_dim]``.
        cache: one layer, ``[block, k/v, token, kv head, head_dim]``, strided in its first dimension.
        norms: weights ``[head_dim]`` of the RMS norms of q and k; None: no norms.
        positions, slots: int64 ``[tokens]``; the kernel does not store a token with a negative slot.
        out: contiguous ``[tokens, heads, head_dim]``.
        kv_scales: float32 ``[k/v, kv heads]`` of a cache in FP8; None: the cache has the dtype of ``qkv``.
    """
    num_tokens = qkv.shape[0]
    _, _, block_size, num_kv_heads, head_dim = cache.shape
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    q_weight, k_weight = norms or (qkv, qkv)
    # A sweep on an H200 (docs/quantization.md): few tokens use more multiprocessors with one head per program, some
    # have a warp for each head, and many fill the GPU.
    heads_per_program, num_warps = (1, 1) if num_tokens <= 8 else (8, 8) if num_tokens <= 48 else (8, 2)
    overlap = overlaps(qkv.device)
    _norm_rotate_store_kernel[(num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, heads_per_program))](
        qkv, out, cache, qkv if kv_scales is None else kv_scales, q_weight, k_weight, positions, slots,
        rotary.inverse_frequencies, rotary.magnitude, eps,
        *cache.stride()[:3],
        num_heads, num_kv_heads, head_dim, triton.next_power_of_2(head_dim // 2),
        rotary.rotated_dim, rotary.is_interleaved, block_size, norms is not None, kv_scales is not None,
        0 if kv_scales is None else rotary.mix_stages, heads_per_program, overlap,
        num_warps=num_warps, launch_pdl=overlap,
    )  # fmt: skip
