"""Cuts a decode step's attention into pieces that GPU programs compute side by side.

The contexts of a batch differ in length by up to a hundred times. A piece is at most `chunk_len` consecutive tokens
of one run; one program per KV head attends to it. A run is a sequence with one new token or a few
(`hbserve.attention.paged_decode`). Example: three runs, ``chunk_len`` 4, one column per token::

    run 0   |0 0 0 0|0 0|                      splits 0, 1
    run 1   |1 1 1|                            split  0
    run 2   |2 2 2 2|2 2 2 2|2|                splits 0, 1, 2

    pieces       (0,0) (2,0) (2,1) (1,0) (0,1) (2,2)  -1 ...     (run, split), longest first, padded to `capacity`
    first_piece    0     2     3                                 pieces of all runs above; one entry per run

The GPU starts programs in this order, as many at a time as it has room for, and each program that ends makes room for
the next ("longest processing time first", Graham 1969). A step ends with its last program, so `PieceCutter.chunk_len`
looks for the chunk length with the earliest end: long pieces leave the GPU half empty at the end, while short pieces
cost more, because each must be started and merged. The thread that launches steps does this on the host for every
step; it uses arrays and no loops over sequences.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_SPLITS = 64
"""Maximum number of pieces of one run; a piece is packed as ``run * MAX_SPLITS + split``."""

MAX_SMALL_BATCH_PROGRAMS = 16
"""Maximum rows times KV heads of a small batch: its pieces are a few tokens long, because only latency matters."""

_EXTRA_PROGRAMS_OF_SMALL_BATCH = 512
_EXTRA_PROGRAMS = 2048
"""Programs beyond one for each row and KV head; a program without a piece costs about half a nanosecond."""

_PIECE_COST_TOKENS = 48
"""Cost of starting and merging a piece, in tokens read."""

_MERGE_COST_TOKENS, _MERGED_PIECES = 20, 8
"""Cost of merging so many pieces of one row of a run, in tokens read. A run's last program merges row after row; the
first row is part of the cost of a piece."""

_LATENCY_SHARE, _MIN_SHARE = 0.3, 0.5
"""Time of a program while only a share of the room is in use, relative to its time when the GPU is full:
``0.3 + 0.7 * share``, because part of the time is latency, and at least 0.5. So a program takes 0.65 of the time when
half of the room is in use. Fitted to the times of 157 chunk lengths over 12 mixes; it predicts them within 3 % (root
mean square, docs/benchmarks.md)."""

_MAX_ROUNDS = 8
"""Maximum number of pieces simulated one after the other in one place; only a small share of a GPU has more."""

_FRACTIONS_OF_LONGEST = 1 / np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64])
_FRACTIONS_OF_EVEN_SHARE = np.array([0.515, 0.75, 1.03, 1.3])
"""Chunk lengths to try: fractions of the longest sequence, and of the even share. The even share is the batch's tokens
divided by the number of pieces that fit on the GPU at a time; 0.515 makes two pieces per place, 1.03 makes one."""

_SMS_OF_H200 = 132


def join_rows(places: npt.NDArray[np.int64], size: int, max_run_rows: int) -> npt.NDArray[np.int32]:
    """Join a batch's rows to runs.

    Args:
        places: ``[rows]``, the place of each row's token among the new tokens of its sequence: 0, 1, ...
        size: rows of the batch with padding, which comes last; a row of padding is a run.

    Returns:
        ``[runs + 1]``; run i is rows ``first_row[i] .. first_row[i + 1] - 1``, at most ``max_run_rows``.
    """
    padding = np.arange(len(places), size + 1)
    return np.append(np.flatnonzero(places % max_run_rows == 0), padding).astype(np.int32)


@dataclass(frozen=True)
class Pieces:
    """A batch in pieces.

    Attributes:
        chunk_len: tokens of a piece; the last piece of a run may have fewer.
        pieces: int32 ``[capacity]``. Each entry is ``run * MAX_SPLITS + split`` and covers the run's tokens from
            ``split * chunk_len``. Sorted by falling number of tokens; -1 behind the last piece.
        first_piece: int32 ``[runs]``, the number of pieces of all runs before this one.
    """

    chunk_len: int
    pieces: npt.NDArray[np.int32]
    first_piece: npt.NDArray[np.int32]


@dataclass(frozen=True)
class PieceCutter:
    """A cutter for batches of one padded size.

    Attributes:
        num_rows: rows of a batch, at least 1; it has at most as many runs.
        num_kv_heads: programs per piece.
        block_tokens: tokens that a program loads at a time; a chunk is a whole number of blocks.
        num_multiprocessors: multiprocessors of the GPU, or of the process's share of it.
        programs_per_sm: programs that a multiprocessor holds at a time.
    """

    num_rows: int
    num_kv_heads: int
    block_tokens: int
    num_multiprocessors: int
    programs_per_sm: int

    @functools.cached_property
    def _is_small(self) -> bool:
        return self.num_rows * self.num_kv_heads <= MAX_SMALL_BATCH_PROGRAMS

    @functools.cached_property
    def _extra_programs(self) -> int:
        return (_EXTRA_PROGRAMS_OF_SMALL_BATCH if self._is_small else _EXTRA_PROGRAMS) // self.num_kv_heads

    @functools.cached_property
    def _num_concurrent(self) -> int:
        """Pieces that the GPU computes at a time."""
        return max(1, self.num_multiprocessors * self.programs_per_sm // self.num_kv_heads)

    @functools.cached_property
    def capacity(self) -> int:
        """Maximum number of pieces of a batch."""
        return self.num_rows + min(self._extra_programs, (MAX_SPLITS - 1) * self.num_rows)

    def cut(self, context_lens: npt.NDArray[np.int32], max_run_rows: int = 1) -> Pieces:
        """Cut a batch.

        Args:
            context_lens: ``[runs]``, of each run, at least 1.
            max_run_rows: rows of the run that has most.
        """
        chunk_len = self.chunk_len(context_lens, max_run_rows)
        pieces = np.full(self.capacity, -1, np.int32)
        if len(context_lens) == 1:  # the step of one stream is short; this takes a fifth of the time
            count = -(-int(context_lens[0]) // chunk_len)
            pieces[:count] = np.arange(count)
            return Pieces(chunk_len, pieces, np.zeros(1, np.int32))
        counts = -(-context_lens // chunk_len)
        ends = np.cumsum(counts)
        first_piece = ends - counts
        runs = np.repeat(np.arange(len(context_lens)), counts)
        splits = np.arange(len(runs)) - first_piece[runs]
        lens = np.minimum(context_lens[runs] - splits * chunk_len, chunk_len)
        # Pieces of one length are sorted by split, so a batch of equal runs starts with the first piece of every run.
        order = np.argsort(splits - lens * MAX_SPLITS, kind="stable")
        pieces[: len(runs)] = (runs * MAX_SPLITS + splits)[order]
        return Pieces(chunk_len, pieces, first_piece.astype(np.int32))

    def chunk_len(self, context_lens: npt.NDArray[np.int32], max_run_rows: int = 1) -> int:
        """Choose the chunk length whose pieces fit into `capacity` and end earliest."""
        longest, total = int(context_lens.max()), int(context_lens.sum())
        # Only the last piece of a run is shorter than a chunk, so there are fewer than runs + total / chunk pieces.
        min_tokens = max(longest / MAX_SPLITS, total / self._extra_programs)
        if self._is_small:
            share = min(1.0, self.num_multiprocessors / _SMS_OF_H200)
            min_tokens = max(min_tokens, total / (self._extra_programs * share))
            return max(1, math.ceil(min_tokens / self.block_tokens)) * self.block_tokens * max_run_rows
        even_share = total / self._num_concurrent
        tokens = np.concatenate((longest * _FRACTIONS_OF_LONGEST, even_share * _FRACTIONS_OF_EVEN_SHARE))
        num_blocks = np.ceil(np.clip(tokens, min(min_tokens, longest), longest) / self.block_tokens).astype(np.int32)
        candidates = np.unique(num_blocks) * self.block_tokens
        times = self._end_times(context_lens, candidates)
        if max_run_rows > 1:
            merges = np.ceil(np.ceil(longest / candidates) / _MERGED_PIECES)
            times = times + (max_run_rows - 1) * _MERGE_COST_TOKENS * merges
        return int(candidates[np.argmin(times)])

    def _end_times(
        self, context_lens: npt.NDArray[np.int32], chunk_lens: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.float64]:
        """Predict for each chunk length when the last program ends.

        The unit is the time in which one program reads a token while the GPU is full. The simulation deals the
        pieces, longest first, to ``width`` places, round by round; in each round the place that is free first takes
        the longest piece.
        """
        width = self._num_concurrent
        num_runs = len(context_lens)
        num_whole_of_run = (context_lens - 1) // chunk_lens[:, None]
        num_whole = num_whole_of_run.sum(axis=1)
        rounds = -(-(int(num_whole.max()) + num_runs) // width)
        # One row per chunk length: the last pieces of all runs, then the whole pieces, then zeros.
        lens = np.zeros((len(chunk_lens), rounds * width), np.int32)
        tails = context_lens - num_whole_of_run * chunk_lens[:, None] + _PIECE_COST_TOKENS
        index = np.arange(rounds * width)
        np.copyto(lens, (chunk_lens + _PIECE_COST_TOKENS)[:, None], where=index < num_runs + num_whole[:, None])
        lens[:, :num_runs] = tails
        lens.sort(axis=1)
        # The longest pieces, in rounds beyond _MAX_ROUNDS, are so many that they spread evenly over all places.
        end = min(rounds, _MAX_ROUNDS) * width
        ends = lens[:, end - width : end] + lens[:, end:].sum(axis=1, keepdims=True, dtype=np.int32) // width
        for begin in range(end - width, 0, -width):
            ends = ends[:, ::-1] + lens[:, begin - width : begin]
            ends.sort(axis=1)
        last: npt.NDArray[np.float64] = ends @ _end_weights(width)
        return last


@functools.cache
def _end_weights(width: int) -> npt.NDArray[np.float64]:
    """Compute the weights ``[width]`` whose product with the places' end times is the end of the last program.

    The end times, in rising order, assume that all programs run at the pace of a full GPU. As programs end, the
    remaining ones run faster: the real end is ``sum(pace * diff(ends))``, here summed by parts.
    """
    running = np.arange(width, 0, -1) / width
    pace = np.maximum(_LATENCY_SHARE + (1 - _LATENCY_SHARE) * running, _MIN_SHARE)
    return -np.diff(pace, append=0)
