"""How a decode step's attention is cut into pieces that GPU programs compute side by side.

Sequences of a batch differ in length, by a hundred times. A piece is a run of up to `chunk_len` tokens of one
sequence, and one program attends to it for one KV head. Programs begin with the longest pieces, as many at a time as
the GPU holds, and each that ends makes room for the next ("longest processing time first", Graham 1969). The step
ends with the last of them, so what is looked for is the chunk length with which that is early: long pieces leave the
GPU half empty at the end, short ones cost more, for each has to be begun and merged. All this is host work of every
step: arrays, no loops over sequences.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_SPLITS = 64
"""Pieces of one sequence, at most; a piece is packed as ``row * MAX_SPLITS + split``."""

MAX_SMALL_BATCH_PROGRAMS = 16
"""Up to so many rows and KV heads a piece is a few tokens, and latency is all."""

_EXTRA_PROGRAMS_OF_SMALL_BATCH = 512
_EXTRA_PROGRAMS = 2048
"""Programs beyond one for each row and KV head; one without a piece costs about half a nanosecond."""

_PIECE_COST_TOKENS = 48
"""What it takes to begin and to merge a piece."""

_LATENCY_SHARE, _MIN_SHARE = 0.3, 0.5
"""How long a program takes for its tokens when others have ended, over what it takes among as many as there is room
for: with half of the room in use 0.65, since part of it is latency, and not below a half. From times of 157 chunk
lengths over 12 mixes, which this tells within 3 % (root mean square); docs/benchmarks.md."""

_MAX_ROUNDS = 8
"""So many pieces in a program's place, one after the other, are followed; a small share of a GPU has more."""

_FRACTIONS_OF_LONGEST = 1 / np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64])
_FRACTIONS_OF_EVEN_SHARE = np.array([0.515, 0.75, 1.03, 1.3])
"""Chunk lengths that are tried: parts of the longest sequence, and of what each program has if all have as much and
there are as many as there is room for, or twice as many."""

_SMS_OF_H200 = 132


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
        block_tokens: tokens that a program loads at a time; chunks are whole blocks.
        num_multiprocessors: of the GPU, or of the process's share of it.
        programs_per_sm: programs that a multiprocessor holds at a time.
    """

    num_rows: int
    num_kv_heads: int
    block_tokens: int
    num_multiprocessors: int
    programs_per_sm: int

    @property
    def _is_small(self) -> bool:
        return self.num_rows * self.num_kv_heads <= MAX_SMALL_BATCH_PROGRAMS

    @property
    def _extra_programs(self) -> int:
        return (_EXTRA_PROGRAMS_OF_SMALL_BATCH if self._is_small else _EXTRA_PROGRAMS) // self.num_kv_heads

    @property
    def _num_concurrent(self) -> int:
        """Pieces that the GPU computes at a time."""
        return max(1, self.num_multiprocessors * self.programs_per_sm // self.num_kv_heads)

    @property
    def capacity(self) -> int:
        """Pieces there may be, at most."""
        return self.num_rows + min(self._extra_programs, (MAX_SPLITS - 1) * self.num_rows)

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
        min_tokens = max(longest / MAX_SPLITS, total / self._extra_programs)
        if self._is_small:
            share = min(1.0, self.num_multiprocessors / _SMS_OF_H200)
            return self._whole_blocks(max(min_tokens, total / (self._extra_programs * share)))
        even_share = total / self._num_concurrent
        tokens = np.concatenate((longest * _FRACTIONS_OF_LONGEST, even_share * _FRACTIONS_OF_EVEN_SHARE))
        num_blocks = np.ceil(np.clip(tokens, min(min_tokens, longest), longest) / self.block_tokens).astype(np.int32)
        candidates = np.unique(num_blocks) * self.block_tokens
        return int(candidates[np.argmin(self._end_times(context_lens, candidates))])

    def _whole_blocks(self, tokens: float) -> int:
        return max(1, math.ceil(tokens / self.block_tokens)) * self.block_tokens

    def _end_times(
        self, context_lens: npt.NDArray[np.int32], chunk_lens: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.float64]:
        """When the last program ends, for each chunk length; in tokens read by one of as many as the GPU holds."""
        width = self._num_concurrent
        num_whole_of_row = (context_lens - 1) // chunk_lens[:, None]
        num_whole = num_whole_of_row.sum(axis=1)
        rounds = -(-(int(num_whole.max()) + self.num_rows) // width)
        lens = np.zeros((len(chunk_lens), rounds * width), np.int32)
        tails = context_lens - num_whole_of_row * chunk_lens[:, None] + _PIECE_COST_TOKENS
        index = np.arange(rounds * width)
        np.copyto(lens, (chunk_lens + _PIECE_COST_TOKENS)[:, None], where=index < self.num_rows + num_whole[:, None])
        lens[:, : self.num_rows] = tails
        lens.sort(axis=1)
        # Each takes one at a time, whoever is first the longest. Of many, the longest even out.
        end = min(rounds, _MAX_ROUNDS) * width
        ends = lens[:, end - width : end] + lens[:, end:].sum(axis=1, keepdims=True, dtype=np.int32) // width
        for begin in range(end - width, 0, -width):
            ends = ends[:, ::-1] + lens[:, begin - width : begin]
            ends.sort(axis=1)
        last: npt.NDArray[np.float64] = ends @ _end_weights(width)
        return last


@functools.cache
def _end_weights(width: int) -> npt.NDArray[np.float64]:
    """Turns when programs would end if all ran at one pace, in rising order, into when the last one really does."""
    running = np.arange(width, 0, -1) / width
    pace = np.maximum(_LATENCY_SHARE + (1 - _LATENCY_SHARE) * running, _MIN_SHARE)
    return -np.diff(pace, append=0)  # of sum(pace * diff(ends)), by parts
