"""What a KV tier holds: contents of blocks outside the device's memory, by prefix hash. Used by the scheduler only.

The pool (`hbserve.kv_cache.block_pool`) says where contents are on the device; a directory says where they are in a
tier, whether or not a device has them too. The state of contents in one tier; `TRANSITIONS` holds the same as a table::

                begin_store           end_store             begin_load
        absent ────────────► storing ───────────► stored ◄────────────► loading
          ▲ │                   │                    ▲ │     end_load      │
          │ └───────────────────│────────────────────┘ │                   │
          │       add_found     │                      │                   │
          └─────────────────────┴──────────────────────┴───────────────────┘
             forget: the copy failed, is late, or has a wrong checksum; evict: another needs the slot (stored only)

A *slot* is the place of one block in a tier. Contents that are forgotten while a worker may still copy from or to their
slot cannot be found any more, but the slot is free only when the last of these jobs has ended.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from hbserve.messages.tiers import StoredBlock


class TierState(Enum):
    """State of contents in one tier."""

    ABSENT = "absent"
    STORING = "storing"
    STORED = "stored"
    LOADING = "loading"


TRANSITIONS = frozenset(
    {
        (TierState.ABSENT, "begin_store", TierState.STORING),
        (TierState.ABSENT, "add_found", TierState.STORED),
        (TierState.STORING, "end_store", TierState.STORED),
        (TierState.STORING, "forget", TierState.ABSENT),
        (TierState.STORED, "begin_load", TierState.LOADING),
        (TierState.STORED, "begin_store", TierState.ABSENT),  # evicted for other contents
        (TierState.STORED, "forget", TierState.ABSENT),
        (TierState.LOADING, "begin_load", TierState.LOADING),
        (TierState.LOADING, "end_load", TierState.STORED),  # the last load
        (TierState.LOADING, "end_load", TierState.LOADING),
        (TierState.LOADING, "forget", TierState.ABSENT),
    }
)
"""Every legal change of contents' state: before, operation of the directory, after."""


@dataclass(eq=False, slots=True)
class TierEntry:
    """Contents of one block in a tier; only their `TierDirectory` changes it.

    Attributes:
        key: their prefix hash.
        checksums: by rank; empty: the tier has them; None: they are being stored.
        num_jobs: copies under way from or to the slot.
        is_forgotten: the directory does not find them any more.
    """

    key: bytes
    slot: int
    checksums: list[int] | None = None
    num_jobs: int = 0
    is_forgotten: bool = False

    @property
    def state(self) -> TierState:
        """The state of the contents."""
        if self.is_forgotten:
            return TierState.ABSENT
        if self.checksums is None:
            return TierState.STORING
        return TierState.LOADING if self.num_jobs else TierState.STORED


@dataclass(slots=True)
class TierStats:
    """Totals of one tier since the start of the scheduler.

    Attributes:
        store_s, load_s: time that copies took, without waiting for others.
        saved_prompt_tokens: prompt tokens whose KV was loaded instead of computed.
        skipped_blocks: not stored, because the tier was behind or had no slot that could be evicted.
        failures: blocks, by what was wrong with them.
    """

    stored_blocks: int = 0
    stored_bytes: int = 0
    store_s: float = 0.0
    loaded_blocks: int = 0
    loaded_bytes: int = 0
    load_s: float = 0.0
    saved_prompt_tokens: int = 0
    evicted_blocks: int = 0
    skipped_blocks: int = 0
    failures: dict[str, int] = field(default_factory=dict)

    def count_failures(self, kind: str, number: int = 1) -> None:
        """Count blocks of which the same was wrong."""
        self.failures[kind] = self.failures.get(kind, 0) + number


class TierDirectory:
    """Contents of one tier, least recently used first; owner of its slots. Moves no bytes.

    Args:
        name: of the tier.
        num_slots: blocks that fit.
    """

    def __init__(self, name: str, num_slots: int) -> None:
        self.name, self.num_slots = name, num_slots
        self.stats = TierStats()
        self._free = list(range(num_slots))  # a heap, so that the slots of a prompt are neighbours
        self._entries: OrderedDict[bytes, TierEntry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_free_slots(self) -> int:
        """Slots that hold nothing and that no copy touches."""
        return len(self._free)

    def get(self, key: bytes) -> TierEntry | None:
        """Return contents that can be loaded."""
        entry = self._entries.get(key)
        return entry if entry is not None and entry.checksums is not None else None

    def __contains__(self, key: bytes) -> bool:
        """Whether contents are stored, or are being stored."""
        return key in self._entries

    def touch(self, keys: Iterable[bytes]) -> None:
        """Note a use of contents; the last one named is evicted last."""
        for key in keys:
            if key in self._entries:
                self._entries.move_to_end(key)

    def adopt(self, kept: Iterable[StoredBlock]) -> None:
        """Take in contents that the tier has held since before the start; of two alike, or in one slot, the first."""
        free = set(self._free)
        for block in kept:
            if block.slot in free and block.key not in self._entries and block.checksums:
                free.remove(block.slot)
                self._entries[block.key] = TierEntry(block.key, block.slot, block.checksums)
        self._free = sorted(free)

    def add_found(self, keys: Sequence[bytes]) -> None:
        """Take in contents that a lookup has found, the beginning of a prompt first; evicts as `begin_store` does."""
        for key in keys:
            if key not in self._entries:
                if not self._free and not self._evict():
                    return
                self._entries[key] = TierEntry(key, heapq.heappop(self._free), checksums=[])
        self.touch(reversed(keys))

    # --- storing ---------------------------------------------------------------------------------

    def begin_store(self, key: bytes) -> TierEntry | None:
        """Take a slot for contents that are absent; evicts if none is free. None: no slot can be freed now."""
        assert key not in self._entries, "contents are stored twice"
        if not self._free and not self._evict():
            return None
        entry = self._entries[key] = TierEntry(key, heapq.heappop(self._free), num_jobs=1)
        return entry

    def _evict(self) -> bool:
        for entry in self._entries.values():
            if not entry.num_jobs:
                self.stats.evicted_blocks += 1
                self.forget(entry)
                return True
        return False

    def end_store(self, entry: TierEntry, checksums: list[int] | None) -> None:
        """A copy into a slot has ended; ``checksums``: by rank, None if it has failed."""
        assert entry.num_jobs == 1, "contents are stored by one job"
        entry.num_jobs = 0
        if entry.is_forgotten:
            self._free_if_unused(entry)
        elif checksums:
            entry.checksums = checksums
        else:
            self.forget(entry)

    # --- loading ---------------------------------------------------------------------------------

    def begin_load(self, entry: TierEntry) -> None:
        """A copy out of a slot begins."""
        assert entry.state in (TierState.STORED, TierState.LOADING), f"{entry.state} contents cannot be loaded"
        entry.num_jobs += 1

    def end_load(self, entry: TierEntry, is_sound: bool) -> None:
        """A copy out of a slot has ended; contents that were not sound are forgotten."""
        assert entry.num_jobs > 0, "more loads end than began"
        entry.num_jobs -= 1
        if not is_sound:
            self.forget(entry)
        else:
            self._free_if_unused(entry)

    # --- forgetting ------------------------------------------------------------------------------

    def forget(self, entry: TierEntry) -> None:
        """Find contents no more. Their slot is free when no copy touches it any more."""
        if not entry.is_forgotten:
            entry.is_forgotten = True
            del self._entries[entry.key]
        self._free_if_unused(entry)

    def forget_all(self) -> None:
        """Find no contents more."""
        for entry in list(self._entries.values()):
            self.forget(entry)

    def _free_if_unused(self, entry: TierEntry) -> None:
        if entry.is_forgotten and not entry.num_jobs and entry.slot >= 0:
            heapq.heappush(self._free, entry.slot)
            entry.slot = -1

    # --- for tests and debugging -----------------------------------------------------------------

    def check_consistency(self, jobs: Sequence[TierEntry]) -> None:
        """Assert that every slot is free, or belongs to one entry that is known or has jobs.

        Args:
            jobs: one entry for each copy under way.
        """
        entries = {id(entry): entry for entry in (*self._entries.values(), *jobs)}.values()
        slots = [*self._free, *(entry.slot for entry in entries)]
        assert sorted(slots) == list(range(self.num_slots)), "a slot is leaked, or has two contents"
        for entry in entries:
            assert entry.num_jobs == sum(job is entry for job in jobs), "the copies of a slot are miscounted"
            assert entry.is_forgotten or self._entries[entry.key] is entry
