"""What a system holds when it is idle: processes, descriptors, memory, shared memory, files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.chaos import processes
from benchmarks.chaos.service import Service, unreturned, until

IDLE_S = 60.0
"""Time in which an idle system gives everything back."""
_SPARE_MEMORY_MB = 60.0
_LATE = frozenset({"grammar process", "slow tokenizer"})
"""Kinds of processes that start when they are first needed, and not again until then."""
_LATE_DESCRIPTORS = 6
"""What a worker keeps for its grammar process."""


@dataclass
class Census:
    """What an idle system holds.

    Attributes:
        kinds: number of processes by kind.
        descriptors, memory_mb: the most of one process, by kind.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    descriptors: dict[str, int] = field(default_factory=dict)
    memory_mb: dict[str, float] = field(default_factory=dict)
    num_segments: int = 0
    files: list[str] = field(default_factory=list)

    @classmethod
    def take(cls, running: Service) -> Census:
        """Look at the system."""
        census = cls()
        for process in processes.descendants():
            held = processes.holdings(process)
            if held is None:
                continue
            kind = process.kind
            census.kinds[kind] += 1
            census.descriptors[kind] = max(census.descriptors.get(kind, 0), held.descriptors.total())
            census.memory_mb[kind] = max(census.memory_mb.get(kind, 0.0), held.memory_mb)
        census.num_segments = len(processes.shared_segments())
        census.files = sorted(path.name for path in running.folder.rglob("*"))
        return census

    def more_than(self, before: Census, spare_descriptors: int = 0) -> Iterator[str]:
        """Say what has come beside what there was; processes that are missing count too.

        Args:
            spare_descriptors: that a worker may have besides.
        """
        kinds, kinds_before = ({kind: one.kinds[kind] for kind in one.kinds.keys() - _LATE} for one in (self, before))
        if kinds != kinds_before:
            yield f"processes {kinds}, not {kinds_before}"
        for kind, number in self.descriptors.items():
            spare = spare_descriptors + _LATE_DESCRIPTORS if kind.endswith("worker") else 0
            if number > before.descriptors.get(kind, number) + spare:
                yield f"{number} descriptors of the {kind}, not {before.descriptors[kind]}"
        for kind, size in self.memory_mb.items():
            if size > before.memory_mb.get(kind, size) + _SPARE_MEMORY_MB:
                yield f"{size:.0f} MB of the {kind}, not {before.memory_mb[kind]:.0f}"
        if self.num_segments != before.num_segments:
            yield f"{self.num_segments} shared memory segments, not {before.num_segments}"
        if len(self.files) > len(before.files):
            yield f"temporary files {self.files}, not {before.files}"


async def settled(running: Service, before: Census | None, spare_descriptors: int = 0) -> list[str]:
    """Wait until an idle system holds no more than before; return what it still holds at the deadline."""
    found: list[str] = []

    async def is_settled() -> bool:
        found[:] = await unreturned(running)
        if not found and before is not None:
            found.extend(Census.take(running).more_than(before, spare_descriptors))
        return not found

    await until(is_settled, IDLE_S)
    return found
