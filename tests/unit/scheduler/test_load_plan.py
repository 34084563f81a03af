"""Which part of a stored prefix is loaded: by times that are known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbserve.kv_cache.tier_directory import TierDirectory, TierEntry
from hbserve.messages.tiers import TierInfo
from hbserve.scheduler.tiers.load_plan import choose_load
from hbserve.scheduler.tiers.tier import StoredRun, Tier

TOKENS = 10  # of a block


def tier(name: str) -> Tier:
    return Tier(TierInfo(name=name, memory=name, num_slots=1), TierDirectory(name, 1))


HOST, DISK = tier("host"), tier("disk")


def runs(*lengths: tuple[Tier, int], first: int = 0) -> list[StoredRun]:
    found = []
    for where, length in lengths:
        found.append(StoredRun(where, first, [TierEntry(bytes([index]), index) for index in range(length)]))
        first += length
    return found


def choose(
    found: list[StoredRun], host_s: float, disk_s: float = 0.0, is_idle: bool = True, compute_s: float = 1.0
) -> list[tuple[str, int, int]]:
    """Times are of a block."""
    chosen = choose_load(
        found,
        TOKENS,
        lambda tokens, start: compute_s * tokens / TOKENS,
        lambda where, number: number * (host_s if where is HOST else disk_s),
        is_idle,
    )
    return [(run.tier.info.name, run.first, run.end) for run in chosen]


def test_an_idle_device_computes_the_beginning_while_the_end_is_loaded() -> None:
    assert choose(runs((HOST, 100)), host_s=2 / 3) == [("host", 40, 100)]
    assert choose(runs((HOST, 100), first=50), host_s=2 / 3) == [("host", 90, 150)]
    assert choose(runs((HOST, 100)), host_s=1.0) == [("host", 50, 100)]
    assert choose(runs((HOST, 100)), host_s=9.0) == [("host", 90, 100)]


def test_a_load_that_is_much_faster_is_not_split() -> None:
    assert choose(runs((HOST, 100)), host_s=1 / 3) == [("host", 0, 100)]


def test_where_others_compute_all_is_loaded_unless_computing_is_sooner() -> None:
    assert choose(runs((HOST, 100)), host_s=2 / 3, is_idle=False) == [("host", 0, 100)]
    assert choose(runs((HOST, 100)), host_s=9.0, is_idle=False) == [("host", 90, 100)]


def test_nothing_is_loaded_where_even_one_block_takes_longer_than_all_of_them_computed() -> None:
    assert choose(runs((HOST, 10)), host_s=11.0) == []
    assert choose([], host_s=1.0) == []


def test_without_a_prediction_all_is_loaded() -> None:
    assert choose(runs((HOST, 10), (DISK, 5)), 1.0, 1.0, compute_s=0.0) == [("host", 0, 10), ("disk", 10, 15)]


def test_two_tiers_load_side_by_side_and_a_slow_one_is_left_out() -> None:
    assert choose(runs((HOST, 40), (DISK, 10)), 0.1, 0.4, is_idle=False) == [("host", 0, 40), ("disk", 40, 50)]
    assert choose(runs((HOST, 40), (DISK, 10)), 0.1, 50.0, is_idle=False) == [("host", 0, 40)]


@given(
    st.lists(st.tuples(st.sampled_from([HOST, DISK]), st.integers(1, 30)), max_size=4),
    st.floats(0.01, 20.0),
    st.floats(0.01, 20.0),
    st.booleans(),
)
def test_what_is_loaded_is_one_piece_of_the_prefix_and_never_later_than_computing(
    lengths: list[tuple[Tier, int]], host_s: float, disk_s: float, is_idle: bool
) -> None:
    found = runs(*lengths)
    chosen = choose(found, host_s, disk_s, is_idle)
    if not chosen:
        return
    assert [first for _, first, _ in chosen[1:]] == [end for _, _, end in chosen[:-1]]
    first, end, all_end = chosen[0][1], chosen[-1][2], found[-1].end
    load_s = {"host": 0.0, "disk": 0.0}
    for name, begin, stop in chosen:
        load_s[name] += (stop - begin) * (host_s if name == "host" else disk_s)
    total_s = max(first, *load_s.values()) + all_end - end
    assert total_s <= all_end + 1e-9 or total_s == pytest.approx(all_end)
