"""Triton kernels for greedy and plain random sampling, which a CUDA graph can capture, and for their noise.

The noise is that of `hbserve.engine.noise`, bit for bit up to the logarithm. So a seeded request gets the same tokens
from either sampler.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hbserve.layers.parallel import TensorParallel, vocab_shard

_BLOCK = 4096


@triton.jit
def _mix(bits):  # type: ignore[no-untyped-def]
    bits = bits ^ (bits >> 16)
    bits = bits * 0x85EBCA6B
    bits = bits ^ (bits >> 13)
    bits = bits * 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def _key(seed, position, salt: tl.constexpr):  # type: ignore[no-untyped-def]
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    bits = _mix(low ^ salt)
    bits = _mix(bits + high)
    return _mix(bits + position.to(tl.uint32))


@triton.jit
def _noise(ids, seed, position):  # type: ignore[no-untyped-def]
    first = _key(seed, position, 0x9E3779B9)
    second = _key(seed, position, 0x7F4A7C15)
    bits = _mix(_mix(ids.to(tl.uint32) ^ first) ^ second)
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # -log1p(-u), by its series where u is small: there the noise is large and decides
    series = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3 + uniform * (0.25 + uniform * (0.2 + uniform / 6)))))
    return -tl.log(tl.where(uniform < 0.05, series, -tl.log(1.0 - uniform)))


@triton.jit
def _noise_kernel(seeds, positions, out, vocab_size, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * block + tl.arange(0, block)
    noise = _noise(ids, tl.load(seeds + row), tl.load(positions + row))
    tl.store(out + row * vocab_size + ids, noise, mask=ids < vocab_size)


@triton.jit
def _best_of_block_kernel(  # type: ignore[no-untyped-def]
    logits, temperatures, seeds, positions, best, best_ids, first_id, vocab_size, num_blocks, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    ids = part * block + tl.arange(0, block)
    mask = ids < vocab_size
    scores = tl.load(logits + row * vocab_size + ids, mask=mask, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        seed = tl.load(seeds + row)
        position = tl.load(positions + row) + 1  # of the token that is sampled
        scores = scores / tl.maximum(temperature, 1e-6) + _noise(ids + first_id, seed, position)
    scores = tl.where(mask, scores, float("-inf"))
    value, index = tl.max(scores, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best + row * num_blocks + part, value)
    tl.store(best_ids + row * num_blocks + part, first_id + part * block + index)


@triton.jit
def _best_of_row_kernel(  # type: ignore[no-untyped-def]
    best, best_ids, out, out_ids, num_blocks, block: tl.constexpr
):
    row = tl.program_id(0)
    parts = tl.arange(0, block)
    values = tl.load(best + row * num_blocks + parts, mask=parts < num_blocks, other=float("-inf"))
    value, index = tl.max(values, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(out + row, value)
    tl.store(out_ids + row, tl.load(best_ids + row * num_blocks + index).to(out_ids.dtype.element_ty))


def fast_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return the noise of `hbserve.engine.noise.gumbel_noise`, in one pass."""
    out = torch.empty(len(seeds), vocab_size, dtype=torch.float32, device=seeds.device)
    _noise_kernel[(len(seeds), triton.cdiv(vocab_size, _BLOCK))](seeds, positions, out, vocab_size, _BLOCK, num_warps=8)
    return out


def fast_sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    vocab_size: int,
    parallel: TensorParallel,
) -> torch.Tensor:
    """Sample a token per row: the most likely at temperature 0, else one drawn by the Gumbel-max trick.

    Args:
        logits: contiguous ``[rows, part]``, of this rank's part of the vocabulary.
        temperatures: float32 ``[rows]``.
        seeds, positions: int64 ``[rows]``; the position of the row's input, one before the sampled token's.
        vocab_size: of all ranks together.
        parallel: the ranks, which exchange only the best token of each rank.

    Returns:
        int64 ``[rows]``.
    """
    rows, part = logits.shape
    num_blocks = triton.cdiv(part, _BLOCK)
    best = torch.empty(rows, num_blocks, dtype=torch.float32, device=logits.device)
    best_ids = torch.empty(rows, num_blocks, dtype=torch.int32, device=logits.device)
    first_id, _ = vocab_shard(vocab_size, parallel.rank, parallel.size)
    _best_of_block_kernel[(rows, num_blocks)](
        logits, temperatures, seeds, positions, best, best_ids, first_id, part, num_blocks, _BLOCK, num_warps=8
    )
    if parallel.size > 1:
        best, best_ids = _best_of_row(best, best_ids, torch.int32)
        best, best_ids = parallel.gather(best[:, None]), parallel.gather(best_ids[:, None])
    return _best_of_row(best, best_ids, torch.int64)[1]


def _best_of_row(best: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the greatest value of each row, the first of equals, and its id."""
    assert best.is_contiguous()
    assert ids.is_contiguous()
    rows, num_blocks = best.shape
    out = torch.empty(rows, dtype=torch.float32, device=best.device)
    out_ids = torch.empty(rows, dtype=dtype, device=best.device)
    block = triton.next_power_of_2(num_blocks)
    _best_of_row_kernel[(rows,)](best, ids, out, out_ids, num_blocks, block, num_warps=1)
    return out, out_ids
