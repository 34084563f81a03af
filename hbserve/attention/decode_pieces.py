"""How a decode step's attention is cut into pieces that GPU programs compute side by side.

Sequences of a batch differ in length, by a hundred times. A piece is a run of up to `chunk_len` tokens of one
sequence, and one program attends to it for one KV head. Programs begin with the longest pieces, as many at a time as
the GPU holds, and each that ends makes room for the next ("longest processing time first", Graham 1969). The step
ends with the last of them, so what is looked for is the chunk length with which that is early: long pieces leave the
GPU half empty at the end, short ones cost more, for each has to be begun and merged. All this is host work of every
step: arrays, no loops over sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_SPLITS = 64
"""Pieces of one sequence, at most; a piece is packed as ``row * MAX_SPLITS + split``."""

FEW_PROGRAMS = 16
"""Up to so many rows and KV heads a piece is a few tokens, and latency is all."""

_EXTRA_PROGRAMS_OF_FEW = 512
_EXTRA_PROGRAMS = 2048
"""Programs beyond one for each row and KV head; one without a piece costs about half a nanosecond."""

_PIECE_COST_TOKENS = 32
"""What it takes to begin and to merge a piece."""

_ALONE = 1.6
"""How many times its share of the memory's bandwidth a program reaches when others have ended."""

_MERGE_COST_TOKENS = 60
"""What the step ends later by if any row is cut: partial results are merged at its end."""

_PARTS_OF_LONGEST = np.array([1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64])
"""Chunk lengths that are tried, as parts of the longest sequence."""

_MULTIPROCESSORS_OF_H200 = 132


@dataclass(frozen=True)
class Pieces:
    """A batch in pieces.

    Attributes:
        chunk_len: tokens of a piece, except a row's last.
        pieces: int32 ``[capacity]``, each ``row * MAX_SPLITS + split`` and of the tokens from ``split * chunk_len``,
            by falling number of tokens; -1 behind the last.
        first_piece: int32 ``[rows]``, the number of pieces of all rows before this one.
    """

    chunk_len: int
    pieces: npt.NDArray[np.int32]
    first_piece: npt.NDArray[np.int32]


@dataclass(frozen=True)
class PieceCutter:
    """Cuts batches of one padded size.

    Attributes:
        num_rows: rows of a batch, at least 1.
        num_kv_heads: programs of a piece.
        block: tokens that a program loads at a time; chunks are whole blocks.
        num_multiprocessors: of the GPU, or of the process's share of it.
        programs_each: programs that a multiprocessor holds at a time.
    """

    num_rows: int
    num_kv_heads: int
    block: int
    num_multiprocessors: int
    programs_each: int

    @property
    def _few(self) -> bool:
        return self.num_rows * self.num_kv_heads <= FEW_PROGRAMS

    @property
    def _extra(self) -> int:
        return (_EXTRA_PROGRAMS_OF_FEW if self._few else _EXTRA_PROGRAMS) // self.num_kv_heads

    @property
    def capacity(self) -> int:
        """Pieces there may be, at most."""
        return self.num_rows + min(self._extra, (MAX_SPLITS - 1) * self.num_rows)

    def cut(self, context_lens: npt.NDArray[np.int32]) -> Pieces:
        """Cut a batch.

        Args:
            context_lens: ``[num_rows]``, each at least 1.
        """
        chunk_len = self.chunk_len(context_lens)
        pieces = np.full(self.capacity, -1, np.int32)
        if self.num_rows == 1:  # one stream's step is short: the same in a fifth of the time
            count = -(-int(context_lens[0]) // chunk_len)
            pieces[:count] = np.arange(count)
            return Pieces(chunk_len, pieces, np.zeros(1, np.int32))
        counts = -(-context_lens // chunk_len)
        ends = np.cumsum(counts)
        first_piece = ends - counts
        rows = np.repeat(np.arange(self.num_rows), counts)
        splits = np.arange(len(rows)) - first_piece[rows]
        lens = np.minimum(context_lens[rows] - splits * chunk_len, chunk_len)
        # Equal ones in the order of their splits, so that batches of one length begin with all rows' first.
        order = np.argsort(splits - lens * MAX_SPLITS, kind="stable")
        pieces[: len(rows)] = (rows * MAX_SPLITS + splits)[order]
        return Pieces(chunk_len, pieces, first_piece.astype(np.int32))

    def chunk_len(self, context_lens: npt.NDArray[np.int32]) -> int:
        """The chunk length with which a batch's pieces end early, and fit."""
        longest, total = int(context_lens.max()), int(context_lens.sum())
        # A row has at most one piece that is shorter, so there are fewer than rows + total / chunk.
        least = max(longest / MAX_SPLITS, total / self._extra)
        if self._few:
            share = min(1.0, self.num_multiprocessors / _MULTIPROCESSORS_OF_H200)
            return self._whole_blocks(max(least, total / (self._extra * share)))
        blocks = -(-longest // (_PARTS_OF_LONGEST * self.block))
        candidates = np.unique(np.maximum(blocks * self.block, self._whole_blocks(least)))
        return int(candidates[np.argmin(self._ends(context_lens, candidates))])

    def _whole_blocks(self, tokens: float) -> int:
        return max(1, math.ceil(tokens / self.block)) * self.block

    def _ends(self, context_lens: npt.NDArray[np.int32], chunk_lens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """When the last program ends, for each chunk length; in tokens read by one of as many as the GPU holds."""
        room = max(1, self.num_multiprocessors * self.programs_each // self.num_kv_heads)  # pieces
        num_whole_of_row = (context_lens - 1) // chunk_lens[:, None]
        num_whole = num_whole_of_row.sum(axis=1)
        rounds = -(-(int(num_whole.max()) + self.num_rows) // room)
        lens = np.zeros((len(chunk_lens), rounds * room), np.int32)
        tails = context_lens - num_whole_of_row * chunk_lens[:, None] + _PIECE_COST_TOKENS
        index = np.arange(rounds * room)
        np.copyto(lens, (chunk_lens + _PIECE_COST_TOKENS)[:, None], where=index < self.num_rows + num_whole[:, None])
        lens[:, : self.num_rows] = tails
        lens.sort(axis=1)
        ends = lens[:, -room:]
        for at in range(room * (rounds - 1), 0, -room):
            ends = ends[:, ::-1] + lens[:, at - room : at]
            ends.sort(axis=1)
        # As long as all run each gets its share; the last ones get more.
        running = np.arange(room, 0, -1) / room
        gaps = np.diff(ends, axis=1, prepend=0)
        end: npt.NDArray[np.float64] = gaps @ np.maximum(running, 1 / _ALONE) + _MERGE_COST_TOKENS * (num_whole > 0)
        return end
