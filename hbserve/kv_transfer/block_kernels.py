"""A Triton kernel that moves blocks between an arena and a buffer and computes their checksums in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE_WORDS = 4096


# One version for all numbers of blocks: another one would be compiled beside the steps.
@triton.jit(do_not_specialize=["index", "num_tiles", "tiles_of_block"])
def _move_kernel(  # type: ignore[no-untyped-def]
    arena,
    index,
    buffer,
    weights,
    sums,
    num_words,
    arena_stride,
    num_tiles,
    tiles_of_block,
    has_buffer: tl.constexpr,
    to_arena: tl.constexpr,
    tile_words: tl.constexpr,
):
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        block = (tile // tiles_of_block).to(tl.int64)
        offsets = (tile % tiles_of_block) * tile_words + tl.arange(0, tile_words)
        mask = offsets < num_words
        in_arena = arena + tl.load(index + block) * arena_stride + offsets
        if to_arena:
            words = tl.load(buffer + block * num_words + offsets, mask=mask, other=0)
            tl.store(in_arena, words, mask=mask)
        else:
            words = tl.load(in_arena, mask=mask, other=0)
            if has_buffer:
                tl.store(buffer + block * num_words + offsets, words, mask=mask)
        products = words * tl.load(weights + offsets, mask=mask, other=0)
        tl.atomic_add(sums + block, tl.sum(products, axis=0))


def move(
    arena: torch.Tensor,
    index: torch.Tensor,
    buffer: torch.Tensor | None,
    weights: torch.Tensor,
    num_programs: int,
    to_arena: bool = False,
) -> torch.Tensor:
    """Copy blocks of an arena into a buffer, or back; return their checksums, int64 ``[block]``.

    Args:
        arena: int64 ``[block, word]``; a block's words are contiguous.
        index: the blocks, int64.
        buffer: int64 ``[block, word]``, contiguous; None: nothing is copied.
        weights: int64 ``[word]``, by which a checksum multiplies the words.
        num_programs: thread blocks of the launch, at most.
        to_arena: copy from the buffer to the arena.
    """
    num_words = arena.shape[1]
    tiles_of_block = triton.cdiv(num_words, _TILE_WORDS)
    sums = torch.zeros(len(index), dtype=torch.int64, device=arena.device)
    num_tiles = len(index) * tiles_of_block
    _move_kernel[(min(num_programs, num_tiles),)](
        arena,
        index,
        arena if buffer is None else buffer,
        weights,
        sums,
        num_words,
        arena.stride(0),
        num_tiles,
        tiles_of_block,
        has_buffer=buffer is not None,
        to_arena=to_arena,
        tile_words=_TILE_WORDS,
        num_warps=8,
    )
    return sums
