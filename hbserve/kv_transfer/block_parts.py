"""Copies between the blocks of an arena and buffers to send or received ones.

Called in the threads of links and in worker threads, on a GPU on the current stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from hbserve.kv_transfer.head_split import WHOLE, Part
from hbserve.messages.transfer import ALL_LAYERS, LayerGroup

_WORD_BYTES = 8
_SCRATCH_ROWS = 4
_HALF = LayerGroup(index=0, count=2)


class BlockParts:
    """View of an arena as blocks of rows; copies parts of all rows out and in.

    Args:
        kv_blocks: ``[block, byte]``, uint8; a block's bytes are contiguous.
        num_rows: equal rows of a block, see `head_split`.
    """

    def __init__(self, kv_blocks: torch.Tensor, num_rows: int = 1) -> None:
        self.kv_blocks = kv_blocks
        self._num_rows = num_rows

    def of_layers(self, layers: LayerGroup) -> BlockParts:
        """Return the view of a group of layers, whose rows are neighbours in every block."""
        if layers.count == 1:
            return self
        num_bytes = self.kv_blocks.shape[1] // layers.count
        first = layers.index * num_bytes
        return BlockParts(self.kv_blocks[:, first : first + num_bytes], self._num_rows // layers.count)

    def part_bytes(self, part: Part) -> int:
        """Return the bytes of a part of one block."""
        return self.kv_blocks.shape[1] // part.count

    def lies_in_one_piece(self, block_ids: Sequence[int], part: Part) -> bool:
        """Whether `piece` returns these parts without a copy."""
        whole = part.count == 1 and self.kv_blocks.is_contiguous()
        return whole and block_ids[-1] - block_ids[0] + 1 == len(block_ids) and _ascends(block_ids)

    def piece(self, block_ids: Sequence[int]) -> torch.Tensor:
        """Return neighbouring whole blocks where they lie: ``[block, byte]``."""
        return self.kv_blocks[block_ids[0] : block_ids[0] + len(block_ids)]

    @torch.inference_mode()
    def take(self, block_ids: Sequence[int], part: Part, out: torch.Tensor) -> None:
        """Copy parts of blocks out, into a buffer: uint8 ``[block, byte]``, contiguous, on any device."""
        rows, arena = self._view(part)
        words = out.view(arena.dtype).view(len(block_ids), *rows)
        runs = list(_runs(block_ids))
        if self._copies_runs(runs):
            for first, start, count in runs:
                words[first : first + count].copy_(arena[start : start + count])
            return
        index = torch.tensor(block_ids, device=arena.device)
        if out.device == arena.device:
            torch.index_select(arena, 0, index, out=words)
        else:
            words.copy_(arena.index_select(0, index))

    @torch.inference_mode()
    def put(self, block_ids: Sequence[int], part: Part, buffer: torch.Tensor) -> None:
        """Copy such a buffer into parts of blocks."""
        rows, arena = self._view(part)
        words = buffer.view(arena.dtype).view(len(block_ids), *rows)
        runs = list(_runs(block_ids))
        if self._copies_runs(runs):
            for first, start, count in runs:
                arena[start : start + count].copy_(words[first : first + count])
            return
        index = torch.tensor(block_ids, device=arena.device)
        arena.index_copy_(0, index, words.to(arena.device))

    @torch.inference_mode()
    def rehearse(self, part: Part, device: torch.device) -> None:
        """Copy some zeros as `take` and `put` will, to and from buffers on ``device``, all layers and groups of them.

        A GPU loads a kernel at its first use, and each stream allocates memory of its own: both stop the GPU's steps.
        """
        scattered = range(0, 2 * _MAX_COPIED_RUNS + 1, 2)
        scratch = self._scratch(scattered[-1] + 1)
        for layers in (ALL_LAYERS, _HALF) if scratch._num_rows % _HALF.count == 0 else (ALL_LAYERS,):
            parts = scratch.of_layers(layers)
            for block_ids in (scattered, scattered[:1]):
                buffer = torch.empty(len(block_ids), parts.part_bytes(part), dtype=torch.uint8, device=device)
                parts.take(block_ids, part, buffer)
                parts.put(block_ids, part, buffer)

    @torch.inference_mode()
    def rehearse_merge(self, num_parts: int) -> None:
        """Merge some zeros as `merge` will, and allocate what it needs at most, for the same reasons."""
        device, num_bytes = self.kv_blocks.device, _MAX_BLOCKS * self.kv_blocks.shape[1]
        buffers = [torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        del buffers  # the stream keeps their memory
        scattered = range(0, 2 * _MAX_COPIED_RUNS + 1, 2)
        for block_ids in (scattered, scattered[:1]):
            self._scratch(scattered[-1] + 1).merge(block_ids, num_parts)

    def _scratch(self, num_blocks: int) -> BlockParts:
        """Return an arena of zeros, whose blocks have a few of the rows only."""
        num_rows = min(self._num_rows, _SCRATCH_ROWS)
        num_bytes = self.kv_blocks.shape[1] // self._num_rows * num_rows
        blocks = torch.zeros(num_blocks, num_bytes, dtype=torch.uint8, device=self.kv_blocks.device)
        return BlockParts(blocks, num_rows)

    @torch.inference_mode()
    def merge(self, block_ids: Sequence[int], num_parts: int) -> None:
        """Reorder blocks in which the parts lie one after the other, so that each row holds its share of all parts."""
        width = self.kv_blocks.shape[1] // self._num_rows // num_parts
        for start in range(0, len(block_ids), _MAX_BLOCKS):
            batch = block_ids[start : start + _MAX_BLOCKS]
            blocks = torch.empty(len(batch), self.kv_blocks.shape[1], dtype=torch.uint8, device=self.kv_blocks.device)
            self.take(batch, WHOLE, blocks)
            parts = self._words(blocks.view(len(batch), num_parts, self._num_rows, width))
            self.put(batch, WHOLE, parts.transpose(1, 2).contiguous().view(torch.uint8).view(len(batch), -1))

    @torch.inference_mode()
    def checksums(self, block_ids: Sequence[int], part: Part = WHOLE) -> list[int]:
        """Compute one 64-bit number for each block's part, see `checksums_of`."""
        num_bytes = self.part_bytes(part)
        sums: list[int] = []
        if part.count == 1 and num_bytes % _WORD_BYTES == 0:  # where they lie
            arena = self.kv_blocks.view(torch.int64)
            if self.kv_blocks.is_cuda:
                index = torch.tensor(block_ids, device=self.kv_blocks.device)
                sums = _checksums(arena, index).tolist()
                return sums
            for _, start, count in _runs(block_ids):
                sums += _checksums(arena[start : start + count], None).tolist()
            return sums
        for start in range(0, len(block_ids), _MAX_BLOCKS):
            batch = block_ids[start : start + _MAX_BLOCKS]
            buffer = torch.empty(len(batch), num_bytes, dtype=torch.uint8, device=self.kv_blocks.device)
            self.take(batch, part, buffer)
            sums += checksums_of(buffer).tolist()
        return sums

    def _copies_runs(self, runs: list[tuple[int, int, int]]) -> bool:
        """On the CPU, one copy for each run of neighbours is fastest; a GPU uses an index unless there are few runs."""
        return not self.kv_blocks.is_cuda or len(runs) <= _MAX_COPIED_RUNS

    def _view(self, part: Part) -> tuple[tuple[int, ...], torch.Tensor]:
        """Return the shape of one block's part, and the arena as parts: ``[block, (row,) word]``."""
        if part.count == 1:
            arena = self._words(self.kv_blocks)
            return (arena.shape[1],), arena
        width = self.kv_blocks.shape[1] // self._num_rows // part.count
        rows = self.kv_blocks.view(len(self.kv_blocks), self._num_rows, part.count, width)
        arena = self._words(rows)[:, :, part.index]
        return (self._num_rows, arena.shape[2]), arena

    @staticmethod
    def _words(rows: torch.Tensor) -> torch.Tensor:
        """View bytes as 8-byte words if they divide evenly, because kernels move elements."""
        return rows.view(torch.int64) if rows.shape[-1] % _WORD_BYTES == 0 else rows


def checksums_of(blocks: torch.Tensor) -> torch.Tensor:
    """Compute one 64-bit number for each block: int64 ``[block]``.

    It is the sum of the block's words times random odd numbers, modulo 2^64 (multiply-add hashing, Carter and Wegman
    1979). Any change of one word changes it; other changes and swapped words do almost certainly. Changes of the same
    high bit in two words cancel out with a chance of ``2 ** (bit - 63)``: always for bit 63. It guards against faults,
    not against an adversary.

    Args:
        blocks: uint8 ``[block, byte]``, contiguous.
    """
    return _checksums(blocks.view(torch.int64), None)


def checksum_of(words: torch.Tensor) -> int:
    """Compute the number of one block, as `checksums_of`, on the CPU.

    Args:
        words: int64 ``[word]``, contiguous.
    """
    return int(_on_cpu("w,w", words))


def take_blocks(arena: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Copy blocks out of an arena and return their checksums, as `checksums_of`, in one pass.

    Args:
        arena: int64 ``[block, word]``.
        index: the blocks, int64, on the same device.
        out: likewise, one row for each block.
    """
    if arena.device.type == "cuda":
        return _move(arena, index, out)
    torch.index_select(arena, 0, index, out=out)
    return _checksums(out, None)


def put_blocks(arena: torch.Tensor, index: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Copy blocks into an arena and return the checksums of what was copied; as `take_blocks`."""
    if arena.device.type == "cuda":
        return _move(arena, index, words, to_arena=True)
    arena.index_copy_(0, index, words)
    return _checksums(words, None)


def prepare_copies(block_bytes: int, device: torch.device) -> None:
    """Compile what `take_blocks`, `put_blocks` and checksums need, which would stop the steps beside the first copy."""
    if device.type == "cuda":
        blocks = torch.zeros(2, block_bytes // _WORD_BYTES, dtype=torch.int64, device=device)
        index = torch.zeros(1, dtype=torch.int64, device=device)
        put_blocks(blocks, index, blocks[1:])
        take_blocks(blocks, index, blocks[1:])
        _checksums(blocks, index)
        torch.cuda.current_stream(device).synchronize()


def _checksums(arena: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Return the checksums of rows of words; ``index``: None: of all."""
    if arena.device.type == "cuda":
        index = torch.arange(len(arena), device=arena.device) if index is None else index
        return _move(arena, index, None)
    return torch.from_numpy(_on_cpu("bw,w->b", arena if index is None else arena[index]))


def _on_cpu(sums: str, words: torch.Tensor) -> Any:
    weights = _weights(words.shape[-1], words.device)
    return np.einsum(sums, words.numpy(), weights.numpy())  # torch's products of integers take 1.4 times as long


def _move(arena: torch.Tensor, index: torch.Tensor, words: torch.Tensor | None, to_arena: bool = False) -> torch.Tensor:
    from hbserve.kv_transfer import block_kernels  # Triton is there on a GPU only

    return block_kernels.move(arena, index, words, _weights(arena.shape[1], arena.device), _NUM_PROGRAMS, to_arena)


_NUM_PROGRAMS = 132
"""Thread blocks of a launch, one for each multiprocessor of an H200. Beside steps, a short use of all of them costs
less than a long use of few: with 16, storing 4 GB/s beside 32 streams took 1.0 % of a step's time, with 132 0.7 %,
and loading 1.4 and 0.9 %."""


_MAX_COPIED_RUNS = 4
"""On a GPU: an index must be there before the kernel that uses it is launched, and a few launches are cheaper."""

_MAX_BLOCKS = 32
"""Blocks that `BlockParts.merge` and `BlockParts.checksums` copy at once, to bound their memory."""


def _ascends(block_ids: Sequence[int]) -> bool:
    return all(block == block_ids[0] + index for index, block in enumerate(block_ids))


def _runs(block_ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield each run of neighbours: its index in the list, its first block, and its length."""
    first = 0
    for index in range(1, len(block_ids) + 1):
        if index == len(block_ids) or block_ids[index] != block_ids[index - 1] + 1:
            yield first, block_ids[first], index - first
            first = index


@lru_cache(maxsize=8)
def _weights(count: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(20261121)
    return (torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1).to(device)
