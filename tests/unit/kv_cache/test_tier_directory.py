"""The directory of a tier: every legal transition of contents, and random interleavings.

The legal transitions, by state before, operation, and state after (`SCENARIOS` has one directory for each):

    absent   begin_store  storing      stored   forget      absent
    storing  end_store    stored       loading  begin_load  loading
    storing  forget       absent       loading  end_load    stored
    stored   begin_load   loading      loading  end_load    loading
    stored   begin_store  absent       loading  forget      absent
    absent   add_found    stored
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hbserve.kv_cache.tier_directory import TRANSITIONS, TierDirectory, TierEntry, TierState
from hbserve.messages.tiers import StoredBlock

KEY, OTHER = b"a", b"b"
ABSENT, STORING, STORED, LOADING = TierState


def storing() -> tuple[TierDirectory, TierEntry]:
    directory = TierDirectory("host", 1)
    entry = directory.begin_store(KEY)
    assert entry is not None
    return directory, entry


def stored() -> tuple[TierDirectory, TierEntry]:
    directory, entry = storing()
    directory.end_store(entry, [7])
    return directory, entry


def loading(times: int = 1) -> tuple[TierDirectory, TierEntry]:
    directory, entry = stored()
    for _ in range(times):
        directory.begin_load(entry)
    return directory, entry


Make = Callable[[], tuple[TierDirectory, TierEntry]]
SCENARIOS: dict[tuple[TierState, str, TierState], tuple[Make, Callable[[TierDirectory, TierEntry], object]]] = {
    (STORING, "end_store", STORED): (storing, lambda d, e: d.end_store(e, [7])),
    (STORING, "forget", ABSENT): (storing, lambda d, e: d.end_store(e, None)),
    (STORED, "begin_load", LOADING): (stored, lambda d, e: d.begin_load(e)),
    (STORED, "begin_store", ABSENT): (stored, lambda d, e: d.begin_store(OTHER)),
    (STORED, "forget", ABSENT): (stored, lambda d, e: d.forget(e)),
    (LOADING, "begin_load", LOADING): (loading, lambda d, e: d.begin_load(e)),
    (LOADING, "end_load", STORED): (loading, lambda d, e: d.end_load(e, is_sound=True)),
    (LOADING, "end_load", LOADING): (lambda: loading(2), lambda d, e: d.end_load(e, is_sound=True)),
    (LOADING, "forget", ABSENT): (loading, lambda d, e: d.end_load(e, is_sound=False)),
}


@pytest.mark.parametrize("transition", SCENARIOS, ids=lambda t: f"{t[0].value}-{t[1]}-{t[2].value}")
def test_legal_transitions(transition: tuple[TierState, str, TierState]) -> None:
    before, _, after = transition
    make, operate = SCENARIOS[transition]
    directory, entry = make()
    assert entry.state is before
    operate(directory, entry)
    assert entry.state is after


def test_the_scenarios_are_all_transitions() -> None:
    assert SCENARIOS.keys() | {(ABSENT, "begin_store", STORING), (ABSENT, "add_found", STORED)} == TRANSITIONS


def test_what_a_lookup_has_found_can_be_loaded_and_is_evicted_from_the_end_of_its_prompt() -> None:
    directory = TierDirectory("store", 3)
    directory.add_found([b"1", b"2", b"3"])
    entry = directory.get(b"1")
    assert entry is not None
    assert (entry.state, entry.checksums) == (STORED, [])
    directory.add_found([b"1", b"4"])
    assert [key in directory for key in (b"1", b"2", b"3", b"4")] == [True, True, False, True]
    directory.check_consistency([])


def test_illegal_transitions() -> None:
    directory, entry = storing()
    with pytest.raises(AssertionError, match="STORING contents cannot be loaded"):
        directory.begin_load(entry)
    with pytest.raises(AssertionError, match="stored twice"):
        directory.begin_store(KEY)
    directory.end_store(entry, [7])
    with pytest.raises(AssertionError, match="more loads end than began"):
        directory.end_load(entry, is_sound=True)


@pytest.mark.parametrize("make", [storing, loading])
def test_a_slot_that_a_copy_touches_goes_to_no_other_contents(make: Make) -> None:
    """Neither by eviction, nor when its contents are forgotten because the copy is late."""
    directory, entry = make()
    assert directory.begin_store(OTHER) is None
    directory.forget(entry)
    assert KEY not in directory
    assert directory.begin_store(OTHER) is None
    if entry.checksums:
        directory.end_load(entry, is_sound=True)
    else:
        directory.end_store(entry, [7])
    assert KEY not in directory
    assert directory.begin_store(OTHER) is not None


def test_the_least_recently_used_contents_go_first() -> None:
    directory = TierDirectory("host", 3)
    for key in (b"0", b"1", b"2"):
        entry = directory.begin_store(key)
        assert entry is not None
        directory.end_store(entry, [1])
    directory.touch([b"1", b"0"])
    gone = []
    for key in (b"3", b"4", b"5"):
        before = {k for k in (b"0", b"1", b"2") if k in directory}
        directory.begin_store(key)
        gone += [k for k in before if k not in directory]
    assert gone == [b"2", b"1", b"0"]
    assert directory.stats.evicted_blocks == 3


def test_contents_from_before_the_start() -> None:
    directory = TierDirectory("disk", 3)
    kept = [(b"a", 2), (b"b", 2), (b"a", 1), (b"c", 7), (b"d", 0)]
    directory.adopt([StoredBlock(key=key, slot=slot, checksums=[5]) for key, slot in kept])
    assert [key for key in (b"a", b"b", b"c", b"d") if key in directory] == [b"a", b"d"]
    assert directory.num_free_slots == 1
    directory.check_consistency([])


class Directories(RuleBasedStateMachine):
    """Any order of operations keeps slots and counts right."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = TierDirectory("host", 4)
        self.stores: list[TierEntry] = []
        self.loads: list[TierEntry] = []

    @rule(key=st.sampled_from([b"%d" % n for n in range(7)]))
    def begin(self, key: bytes) -> None:
        entry = self.directory.get(key)
        if entry is not None:
            self.directory.begin_load(entry)
            self.loads.append(entry)
        elif key not in self.directory:
            entry = self.directory.begin_store(key)
            self.stores += [entry] if entry is not None else []

    @rule(index=st.integers(0, 3), is_sound=st.booleans())
    def end_load(self, index: int, is_sound: bool) -> None:
        if index < len(self.loads):
            self.directory.end_load(self.loads.pop(index), is_sound)

    @rule(index=st.integers(0, 3), is_sound=st.booleans())
    def end_store(self, index: int, is_sound: bool) -> None:
        if index < len(self.stores):
            self.directory.end_store(self.stores.pop(index), [1] if is_sound else None)

    @rule(index=st.integers(0, 3))
    def is_late(self, index: int) -> None:
        jobs = [*self.stores, *self.loads]
        if index < len(jobs):
            self.directory.forget(jobs[index])

    @invariant()
    def is_consistent(self) -> None:
        self.directory.check_consistency([*self.stores, *self.loads])


TestDirectories = Directories.TestCase
TestDirectories.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
