"""KV tiers of simulated workers: memory of the host with contents that can be checked, and copies that go wrong.

A copy takes its time for each block, so that everything else can happen between two of them. A load writes whatever it
finds, and says afterwards which blocks have a wrong checksum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hbserve.messages.tiers import FindBlocks, FoundBlocks, LoadBlocks, StoreBlocks, TierCommand, TierInfo, TierResult
from tests.fault_search.memory import NOTHING
from tests.fault_search.scenario import BLOCK_SIZE

if TYPE_CHECKING:
    from tests.fault_search.worker import Worker

_COPY_S = 0.0006
"""Time that the copy of a block is said to take: about as long as computing it."""


class HostMemory:
    """The slots of a tier, or values by name: as many, of which the one that was stored first makes room."""

    def __init__(self, name: str, num_slots: int, is_own: bool = False, by_name: bool = False) -> None:
        self.info = TierInfo(
            name="store" if by_name else "host", memory=name, num_slots=num_slots, is_own=is_own, by_name=by_name
        )
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


class Copies:
    """A worker's copies to and from a tier, one after the other."""

    def __init__(self, worker: Worker, memory: HostMemory | None) -> None:
        self._worker, self._memory = worker, memory
        self._num_epochs = 0
        self._is_busy = False
        self._queue: list[TierCommand] = []

    @property
    def infos(self) -> list[TierInfo]:
        return [] if self._memory is None else [self._memory.info]

    def forget_all(self) -> None:
        """Begin an epoch: no copy of the one before touches anything any more."""
        self._num_epochs += 1
        self._is_busy = False
        self._queue.clear()

    def handle(self, command: TierCommand) -> None:
        if command.epoch == self._worker.epoch:
            self._queue.append(command)
            self._start_next()

    def find(self, command: FindBlocks) -> None:
        """Answer a lookup after a while, wrongly or not at all while the tier is bad."""
        worker, rng, memory = self._worker, self._worker.world.tier_rng, self._memory
        assert memory is not None
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

    def _start_next(self) -> None:
        if self._queue and not self._is_busy:
            self._is_busy = True
            command = self._queue.pop(0)
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
        worker, rng, memory = self._worker, self._worker.world.tier_rng, self._memory
        assert memory is not None
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
            memory.checksums[key] = checksums[-1]
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
        self._is_busy = False
        self._start_next()
