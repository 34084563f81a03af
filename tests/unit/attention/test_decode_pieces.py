"""Pieces of decode attention: they cover each token once, and fit into a captured graph."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hbserve.attention.decode_pieces import MAX_SPLITS, PieceCutter, join_rows

LENGTHS = st.integers(1, 200) | st.integers(1, 40_000) | st.sampled_from([1, 64, 65, 1500, 131_072])


@given(
    lens=st.lists(LENGTHS, min_size=1, max_size=300)
    | st.tuples(LENGTHS, st.integers(1, 600)).map(lambda s: [s[0]] * s[1]),
    num_kv_heads=st.sampled_from([1, 2, 3, 8, 32]),
    block=st.sampled_from([32, 64]),
    num_multiprocessors=st.sampled_from([1, 14, 132, 160]),
    programs_per_sm=st.sampled_from([2, 4, 8]),
)
@settings(deadline=None)
def test_pieces_cover_each_token_once_and_fit(
    lens: list[int], num_kv_heads: int, block: int, num_multiprocessors: int, programs_per_sm: int
) -> None:
    cutter = PieceCutter(len(lens), num_kv_heads, block, num_multiprocessors, programs_per_sm)
    cut = cutter.cut(np.array(lens, np.int32))
    assert len(cut.pieces) == cutter.capacity
    assert cut.chunk_len % block == 0
    pieces = cut.pieces[cut.pieces >= 0]
    assert (cut.pieces[len(pieces) :] == -1).all()
    rows, splits = pieces // MAX_SPLITS, pieces % MAX_SPLITS
    begins = splits * cut.chunk_len
    sizes = np.minimum(np.array(lens)[rows] - begins, cut.chunk_len)
    assert (sizes > 0).all()
    assert (np.diff(sizes) <= 0).all()
    assert np.bincount(rows, sizes, len(lens)).tolist() == lens
    assert len(np.unique(pieces)) == len(pieces)
    assert np.array_equal(np.sort(cut.first_piece[rows] + splits), np.arange(len(pieces)))


def test_one_row_has_as_many_pieces_as_it_may() -> None:
    cutter = PieceCutter(1, 8, 32, 132, 4)
    assert [cutter.cut(np.array([length], np.int32)).chunk_len for length in (1, 2048, 2049, 8192)] == [32, 32, 64, 128]


def test_rows_of_one_length_are_cut_only_where_they_would_leave_the_gpu_idle() -> None:
    def chunk_len(num_rows: int, length: int) -> int:
        return PieceCutter(num_rows, 8, 64, 132, 4).cut(np.full(num_rows, length, np.int32)).chunk_len

    assert chunk_len(64, 1500) >= 1500
    assert chunk_len(200, 600) >= 600
    assert chunk_len(32, 1500) == 768
    assert chunk_len(16, 6000) == 1536


def test_one_long_row_among_short_ones_is_cut_like_them() -> None:
    lens = np.array([700] * 63 + [32_000], np.int32)
    assert PieceCutter(64, 8, 64, 132, 4).cut(lens).chunk_len <= 2048


def test_rows_of_one_sequence_are_joined_to_runs() -> None:
    places = np.array([0, 0, 1, 2, 3, 4, 5, 0, 1])  # sequences of 1, 6 and 2 new tokens
    assert join_rows(places, 11, 4).tolist() == [0, 1, 5, 7, 9, 10, 11]
    assert join_rows(places, 9, 1).tolist() == [*range(10)]
    assert join_rows(np.zeros(0, np.int64), 2, 4).tolist() == [0, 1, 2]


def test_a_batch_may_have_fewer_runs_than_rows() -> None:
    cutter = PieceCutter(64, 8, 64, 132, 4)
    cut = cutter.cut(np.array([4000, 10], np.int32))
    assert len(cut.pieces) == cutter.capacity
    runs, splits = np.divmod(cut.pieces[cut.pieces >= 0], MAX_SPLITS)
    assert np.bincount(runs).tolist() == [-(-4000 // cut.chunk_len), 1]
    assert sorted((cut.first_piece[runs] + splits).tolist()) == [*range(len(runs))]


def test_a_run_of_several_rows_has_fewer_pieces_because_its_merge_takes_longer() -> None:
    for num_rows in (1, 4, 32):
        cutter = PieceCutter(num_rows, 8, 32, 132, 6)
        lens = [cutter.cut(np.array([1000], np.int32), rows).chunk_len for rows in (1, 2, 4)]
        assert lens == sorted(set(lens))
