"""Which sizes of step get CUDA graphs first, which later, and that no request waits for two captures."""

from __future__ import annotations

import pytest

from hbserve.engine.graph_sizes import DelayLimit, GraphSizes, first_sizes

SIZES = [1, 2, 4, 8, 16, 24, 32, 64, 128, 256]


@pytest.mark.parametrize(
    ("sizes", "first"),
    [
        (SIZES, [256, 64, 8, 1]),
        ([1, 2, 4, 8], [8, 1]),
        ([1, 2, 3], [3, 1]),
        ([5], [5]),
        ([64, 96, 128, 725], [725, 64]),
        ([], []),
    ],
)
def test_few_sizes_come_first_and_the_largest_holds_every_step(sizes: list[int], first: list[int]) -> None:
    assert first_sizes(sizes) == first
    assert GraphSizes(sizes, defers=True).first == first
    assert GraphSizes(sizes, defers=False).first == sizes[::-1]
    assert GraphSizes(sizes, defers=True).max == max(sizes, default=0)


def captured(*sizes: int) -> GraphSizes:
    graphs = GraphSizes(SIZES, defers=True)
    for size in sizes:
        graphs.add(size)
    return graphs


def test_a_step_takes_the_next_larger_captured_size() -> None:
    graphs = captured(256, 64, 8, 1)
    assert graphs.min_captured == 1
    assert [graphs.choose(count) for count in (1, 2, 8, 9, 64, 65, 256)] == [1, 8, 8, 64, 64, 256, 256]
    assert graphs.best(17) == 24
    graphs.add(24)
    assert [graphs.choose(count) for count in (8, 9, 17, 24, 25)] == [8, 24, 24, 24, 64]


def test_the_size_that_most_steps_miss_is_next_and_then_the_smallest() -> None:
    graphs = captured(256, 64, 8, 1)
    assert graphs.next() == (2, 0)
    for count in (17, 24, 20, 30, 8, 1):
        graphs.choose(count)
    assert graphs.next() == (24, 3)
    graphs.add(24)
    assert graphs.next() == (32, 1)
    graphs.add(32)
    order = []
    while (wanted := graphs.next()) is not None:
        order.append(wanted)
        graphs.add(wanted[0])
    assert order == [(2, 0), (4, 0), (16, 0), (128, 0)]
    assert graphs.missing == []
    assert [graphs.choose(count) for count in (3, 17, 100)] == [4, 24, 128]


def test_missing_sizes_can_be_given_up() -> None:
    graphs = captured(256, 64, 8, 1)
    graphs.choose(20)
    graphs.give_up()
    assert graphs.next() is None
    assert graphs.choose(20) == 64
    assert graphs.next() is None
    assert graphs.max == 256


def test_a_request_waits_for_one_capture_at_most() -> None:
    delays = DelayLimit()
    delays.on_installed([0, 1])
    assert not delays.allows(3, [0, 1]), "few steps have missed the size"
    assert delays.allows(1000, [0, 1])
    delays.on_captured([0, 1])
    delays.on_installed([2])
    assert not delays.allows(1000, [0, 2]), "slot 0 has waited"
    assert delays.allows(1000, [2])
    delays.on_installed([0])
    assert delays.allows(1000, [0, 2])
    assert not delays.allows(1000, [1])
