"""KV tiers of simulated workers: memories with contents that can be checked, and copies that go wrong.

Each direction of each tier has its own copies. A copy takes its time for each block, so that everything else can happen
between two of them. A load writes whatever it finds, and says afterwards which blocks have a wrong checksum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from hbserve.messages.tiers import (
    FindBlocks,
    FoundBlocks,
    LoadBlocks,
    StoreBlocks,
    StoredBlock,
    TierCommand,
    TierInfo,
    TierResult,
)
from tests.fault_search.memory import NOTHING
from tests.fault_search.scenario import BLOCK_SIZE

if TYPE_CHECKING:
    from tests.fault_search.worker import Worker

_COPY_S = 0.0006
"""Time that the copy of a block is said to take: about as long as computing it."""


class TierMemory:
    """The slots of a tier, or of a store values by name: as many, of which the one that was stored first makes room."""

    def __init__(self, kind: str, name: str, num_slots: int, is_own: bool = False) -> None:
        self.info = TierInfo(name=kind, memory=name, num_slots=num_slots, is_own=is_own, by_name=kind == "store")
        self._kept: dict[int, StoredBlock] = {}  # by slot
        self._slots = [[NOTHING] * BLOCK_SIZE for _ in range(num_slots)]
        self.named: dict[bytes, list[int]] = {}
        self.checksums: dict[bytes, list[int]] = {}  # that values have with them

    def place(self, key: bytes, slot: int, stores: bool) -> list[int] | None:
        """Return the contents of a block, which the caller may change; None: a store has none of this name."""
        if not self.info.by_name:
            return self._slots[slot]
        if stores and key not in self.named:
            if len(self.named) == len(self._slots):
                del self.named[next(iter(self.named))]
            self.named[key] = [NOTHING] * BLOCK_SIZE
        return self.named.get(key)

    def keep(self, key: bytes, slot: int, checksum: int) -> None:
        """Note that a block was stored: a scheduler that comes later learns what a disk has."""
        self.checksums[key] = [checksum]
        if self.info.name == "disk":
            self._kept[slot] = StoredBlock(key=key, slot=slot, checksums=[checksum])

    def as_it_is(self) -> TierInfo:
        """Return what a worker that introduces itself says of the tier."""
        return msgspec.structs.replace(self.info, kept=list(self._kept.values()))


_Lane = tuple[str, bool]
"""A tier's name, and whether blocks are stored."""


class Copies:
    """A worker's copies to and from its tiers: of each tier and direction one after the other."""

    def __init__(self, worker: Worker, memories: Sequence[TierMemory]) -> None:
        self._worker = worker
        self._memories = {memory.info.name: memory for memory in memories}
        self._num_epochs = 0
        self._busy: set[_Lane] = set()
        self._queues: defaultdict[_Lane, list[TierCommand]] = defaultdict(list)

    @property
    def infos(self) -> list[TierInfo]:
        return [memory.as_it_is() for memory in self._memories.values()]

    def forget_all(self) -> None:
        """Begin an epoch: no copy of the one before touches anything any more."""
        self._num_epochs += 1
        self._busy.clear()
        self._queues.clear()

    def handle(self, command: TierCommand) -> None:
        if command.epoch == self._worker.epoch:
            self._queues[_lane(command)].append(command)
            self._start_next(_lane(command))

    def find(self, command: FindBlocks) -> None:
        """Answer a lookup after a while, wrongly or not at all while the tier is bad."""
        worker, rng, memory = self._worker, self._worker.world.tier_rng, self._memories[command.tier]
        is_bad = worker.world.is_tier_bad and rng.random() < 0.5
        number = next((n for n, key in enumerate(command.keys) if key not in memory.named), len(command.keys))
        error = "it did not work" if is_bad and rng.random() < 0.5 else None
        if is_bad:
            number = rng.randint(0, len(command.keys))
        epoch = worker.epoch

        def answer() -> None:
            if worker.epoch == epoch:
                worker.send(FoundBlocks(epoch=epoch, lookup_id=command.lookup_id, num_found=number, error=error))

        worker.after(3.0 if is_bad and rng.random() < 0.3 else rng.choice((0.0, 0.001, 0.02)), answer)

    def _start_next(self, lane: _Lane) -> None:
        if self._queues[lane] and lane not in self._busy:
            self._busy.add(lane)
            command = self._queues[lane].pop(0)
            world = self._worker.world
            failure = None
            if world.is_tier_bad and world.tier_rng.random() < 0.7:
                failure = world.tier_rng.choice(("backend", "checksum", "slow"))
            self._copy(command, failure, 0, {}, [])

    def _copy(
        self,
        command: TierCommand,
        failure: str | None,
        index: int,
        failures: dict[int, str],
        checksums: list[list[int]],
    ) -> None:
        """Copy one block, and the others after it."""
        worker, rng, memory = self._worker, self._worker.world.tier_rng, self._memories[command.tier]
        if index == len(command.slots):
            self._end(command, failures, checksums)
            return
        block = worker.arena.blocks[command.block_ids[index]]
        key, stores = command.keys[index], isinstance(command, StoreBlocks)
        slot = memory.place(key, command.slots[index], stores)
        if slot is None:
            failures[index] = "missing"
        elif stores:
            slot[:] = block
            checksums.append([hash(tuple(block))])
            memory.keep(key, command.slots[index], checksums[-1][0])
            if failure == "checksum":  # the memory forgets
                slot[0] ^= 1
        else:
            if failure == "checksum" and rng.random() < 0.5:
                slot[-1] ^= 1
            for offset, contents in enumerate(slot):
                worker.arena.write(command.block_ids[index], offset, contents)
            assert isinstance(command, LoadBlocks)
            # What a lookup has found brings its checksum with it.
            expected = command.checksums[index] or memory.checksums[key]
            if [hash(tuple(slot))] != expected:
                failures[index] = "checksum"
                memory.named.pop(key, None)
        if failure == "backend" and rng.random() < 0.5:
            failures[index] = "backend"
        delay_s = rng.choice((0.0, 0.0, 0.001, 0.02)) if failure != "slow" else rng.choice((0.1, 3.0))
        epochs = self._num_epochs

        def go_on() -> None:
            if self._num_epochs == epochs:
                self._copy(command, failure, index + 1, failures, checksums)

        worker.after(delay_s, go_on)

    def _end(self, command: TierCommand, failures: dict[int, str], checksums: list[list[int]]) -> None:
        worker = self._worker
        worker.send(
            TierResult(
                epoch=worker.epoch,
                job_id=command.job_id,
                failures=failures,
                error="it did not work" if failures else None,
                checksums=[] if isinstance(command, LoadBlocks) else checksums,
                num_bytes=64 * len(command.slots),
                seconds=_COPY_S * len(command.slots),
            )
        )
        self._busy.discard(_lane(command))
        self._start_next(_lane(command))


def _lane(command: TierCommand) -> _Lane:
    return command.tier, isinstance(command, StoreBlocks)
