"""Triton kernels for greedy and plain random sampling, which a CUDA graph can capture, and for their noise.

The noise is that of `hbserve.engine.noise`, bit for bit up to the logarithm. So a seeded request gets the same tokens
from either sampler.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.layers.parallel import TensorParallel, vocab_shard
from hbserve.platform.cuda_driver import overlaps

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
def _best_of(best, best_ids, first, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the greatest of ``count`` values, the first of equals, and its id."""
    parts = tl.arange(0, block)
    values = tl.load(best + first + parts, mask=parts < count, other=float("-inf"), cache_modifier=".cg")
    value, index = tl.max(values, axis=0, return_indices=True, return_indices_tie_break_left=True)
    return value, tl.load(best_ids + first + index, cache_modifier=".cg")


@triton.jit
def _sample_kernel(  # type: ignore[no-untyped-def]
    logits, temperatures, seeds, positions, slots,
    last, out, out_best, best, best_ids, counters,  # written
    first_id, vocab_size, num_parts,
    block: tl.constexpr, part_lanes: tl.constexpr, feeds_back: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = part * block + tl.arange(0, block)
    mask = ids < vocab_size
    # The noise does not depend on the logits: compute it while the kernel before ends.
    temperature = tl.load(temperatures + row)
    divisor = tl.where(temperature > 0, tl.maximum(temperature, 1e-6), 1.0)
    noise = tl.zeros((block,), tl.float32)
    if temperature > 0:
        position = tl.load(positions + row) + 1  # of the token that is sampled
        noise = _noise(ids + first_id, tl.load(seeds + row), position)
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    scores = tl.load(logits + row * vocab_size + ids, mask=mask, other=float("-inf")).to(tl.float32)
    scores = tl.where(mask, scores / divisor + noise, float("-inf"))
    value, index = tl.max(scores, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best + row * num_parts + part, value)
    tl.store(best_ids + row * num_parts + part, first_id + part * block + index)
    tl.debug_barrier()  # all stores of the program come before its count
    if tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
        tl.store(counters + row, 0)  # for the next step
        best_value, token = _best_of(best, best_ids, row * num_parts, num_parts, part_lanes)
        tl.store(out_best + row, best_value)
        tl.store(out + row, token.to(out.dtype.element_ty))
        if feeds_back:
            tl.store(last + tl.load(slots + row), token.to(tl.int64))


@triton.jit
def _best_of_ranks_kernel(best, best_ids, out, num_ranks, lanes: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    _, token = _best_of(best, best_ids, row * num_ranks, num_ranks, lanes)
    tl.store(out + row, token.to(tl.int64))


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
    slots: torch.Tensor,
    last: torch.Tensor,
    counters: torch.Tensor,
    vocab_size: int,
    parallel: TensorParallel,
) -> torch.Tensor:
    """Sample a token per row: the most likely at temperature 0, else one drawn by the Gumbel-max trick.

    Args:
        logits: contiguous ``[rows, part]``, of this rank's part of the vocabulary.
        temperatures: float32 ``[rows]``.
        seeds, positions: int64 ``[rows]``; the position of the row's input, one before the sampled token's.
        slots: int64 ``[rows]``. last: int64 ``[slots]``, gets the sampled tokens.
        counters: int32, zeros, at least one for each row; zeros again afterwards.
        vocab_size: of all ranks together.
        parallel: the ranks, which exchange only the best token of each rank.

    Returns:
        int64 ``[rows]``.
    """
    rows, part = logits.shape
    num_parts = triton.cdiv(part, _BLOCK)
    device, is_alone = logits.device, parallel.size == 1
    best = torch.empty(rows, num_parts, dtype=torch.float32, device=device)
    best_ids = torch.empty(rows, num_parts, dtype=torch.int32, device=device)
    row_best = torch.empty(rows, dtype=torch.float32, device=device)
    row_ids = torch.empty(rows, dtype=torch.int64 if is_alone else torch.int32, device=device)
    first_id, _ = vocab_shard(vocab_size, parallel.rank, parallel.size)
    overlap = overlaps(device)
    _sample_kernel[(rows, num_parts)](
        logits, temperatures, seeds, positions, slots, last, row_ids, row_best, best, best_ids, counters,
        first_id, part, num_parts, _BLOCK, triton.next_power_of_2(num_parts), is_alone, overlap,
        num_warps=8, launch_pdl=overlap,
    )  # fmt: skip
    if is_alone:
        return row_ids
    best, best_ids = parallel.gather(row_best[:, None]), parallel.gather(row_ids[:, None])
    assert best.is_contiguous()
    assert best_ids.is_contiguous()
    sampled = torch.empty(rows, dtype=torch.int64, device=device)
    _best_of_ranks_kernel[(rows,)](
        best, best_ids, sampled, parallel.size, triton.next_power_of_2(parallel.size), num_warps=1
    )
    last[slots] = sampled
    return sampled
