"""The lane of a tier that keeps blocks by name: blocks pass through values in the host's memory, in two halves.

While the tier puts or gets the values of one half, in a second thread, the lane gathers, seals, checks or scatters
those of the other. Nothing is put during the first of these, and nothing is got during the last, so these are short::

    put   gather, seal 0 │ gather, seal 1 │ gather, seal 0 │
                         │     put 0      │     put 1      │ put 0
    get        get 0     │     get 1      │     get 0      │
                         │ check, scatter │ check, scatter │ check, scatter

On the CPU a tier that can gather puts blocks from where they lie in the arena, and only the seals lie in the halves. So
nothing is copied.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from hbserve.kv_tiers import sealed
from hbserve.kv_tiers.base import BlockName
from hbserve.kv_tiers.lane import CopyJob, Lane, Over, checked
from hbserve.kv_transfer.block_parts import checksum_of, put_blocks, take_blocks
from hbserve.messages.tiers import LoadBlocks, StoreBlocks, TierCommand, TierResult

_HALF_BYTES = 64 << 20
"""Bytes of one call of the tier: a store has much to do for each call."""
_MIN_SPLIT_BYTES = 16 << 20
"""Bytes of a job that takes more than one call."""
_SHORT = 4
"""How many times longer the other calls of a job may be than the one that nothing else is done beside."""

_Method = Callable[[list[BlockName], torch.Tensor], dict[int, str]]
"""A method of a tier, as `KVTier.put`."""


class _Caller:
    """A thread that makes one call of the tier at a time."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], dict[int, str]]] = queue.SimpleQueue()
        self._ends: queue.SimpleQueue[dict[int, str] | Exception] = queue.SimpleQueue()
        self._is_busy = False
        # A daemon: a tier that hangs must not keep the process from ending.
        threading.Thread(target=self._run, name="kv-tier-call", daemon=True).start()

    def start(self, call: Callable[[], dict[int, str]]) -> None:
        """Begin a call; the one before has been finished."""
        assert not self._is_busy, "one call at a time"
        self._is_busy = True
        self._calls.put(call)

    def finish(self) -> dict[int, str]:
        """Wait for the call under way, if there is one; raises what it raises."""
        if not self._is_busy:
            return {}
        end = self._ends.get()
        self._is_busy = False
        if isinstance(end, Exception):
            raise end
        return end

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                call = self._calls.get()
                try:
                    self._ends.put(call())
                except Exception as error:  # a user's tier may raise anything
                    self._ends.put(error)


class NamedLane(Lane):
    """Does jobs one after the other, for a tier that keeps blocks by name. Never writes to the arena during a call.

    A call that gathers reads the arena. If its job is given up and the blocks are given to others, it may put what they
    write, with a checksum that does not fit, which every load notices.
    """

    def __init__(self, *arguments: Any) -> None:
        self._caller = _Caller()
        self._values: list[torch.Tensor] = []
        self._gathers = False
        super().__init__(*arguments)

    def _prepare(self, command: TierCommand) -> None:
        """Make the buffers, at the first job: all of a lane's jobs have the same direction."""
        self._make_buffers()
        value_bytes = self._block_bytes + sealed.SEAL_BYTES
        num_values = max(1, _HALF_BYTES // value_bytes)
        is_on_gpu = self._device.type == "cuda"
        self._gathers = self._tier.gathers and isinstance(command, StoreBlocks) and not is_on_gpu
        if self._gathers:
            self._tier.register(self._arena.view(torch.uint8))
        row_bytes = sealed.SEAL_BYTES if self._gathers else value_bytes
        values = torch.empty(2, num_values, row_bytes, dtype=torch.uint8, pin_memory=is_on_gpu)
        self._tier.register(values.view(-1, row_bytes))
        self._values = list(values)

    def _do(self, job: CopyJob) -> TierResult:
        began = time.perf_counter()
        with suppress(Exception):
            self._caller.finish()  # of a job that has failed or was given up
        if job.is_over:
            raise Over
        if not self._values:
            self._prepare(job.command)
        with self._turns[0].on_stream():
            index = torch.tensor(job.command.block_ids, device=self._device)  # which waits for the device
            failures: dict[int, str] = {}
            steps = self._store if isinstance(job.command, StoreBlocks) else self._load
            checksums = steps(job, index, failures)
        return self._result(job.command, checksums, failures, began)

    def _parts(self, num_blocks: int) -> list[int]:
        """Divide a job into calls: blocks of each, the short one first."""
        half = len(self._values[0])
        if num_blocks <= half and num_blocks * self._block_bytes < _MIN_SPLIT_BYTES:
            return [num_blocks]
        short = max(1, min(num_blocks, half) // _SHORT)
        rest = num_blocks - short
        number = -(-rest // half)
        return [short, *(rest * (place + 1) // number - rest * place // number for place in range(number))]

    def _store(self, job: CopyJob, index: torch.Tensor, failures: dict[int, str]) -> list[int]:
        checksums: list[int] = []
        for number, size in enumerate(self._parts(len(index))):
            first = len(checksums)
            values = self._values[number % 2][:size]
            blocks = index[first : first + size]
            found = self._sums(job, blocks) if self._gathers else self._move(job, blocks, values)
            names = self._names(job.command, first, size)
            names = [replace(name, checksum=checksum) for name, checksum in zip(names, found, strict=True)]
            sealed.seal(values, names)
            checksums += found
            failures |= self._caller.finish()
            self._call(self._put_gathered(blocks) if self._gathers else self._tier.put, first, names, values)
        failures |= self._caller.finish()
        return checksums

    def _put_gathered(self, blocks: torch.Tensor) -> _Method:
        rows = [self._arena[block].view(torch.uint8) for block in blocks.tolist()]
        return lambda names, seals: self._tier.put_gathered(names, rows, seals)

    def _sums(self, job: CopyJob, blocks: torch.Tensor) -> list[int]:
        """Return the checksums of blocks, where they lie."""
        with self._touching(job):
            return [checksum_of(self._arena[block]) for block in blocks.tolist()]

    def _load(self, job: CopyJob, index: torch.Tensor, failures: dict[int, str]) -> list[int]:
        command, checksums = job.command, list[int]()
        assert isinstance(command, LoadBlocks)
        wrong: list[BlockName] = []
        parts = self._parts(len(index))[::-1]
        self._get(job, 0, self._values[0][: parts[0]])
        for number, size in enumerate(parts):
            first, end = len(checksums), len(checksums) + size
            absent = self._caller.finish()
            failures |= absent
            if end < len(index) and not absent:
                self._get(job, end, self._values[(number + 1) % 2][: parts[number + 1]])
            values, names = self._values[number % 2][:size], self._names(command, first, size)
            own = sealed.checksums(values, names)
            found = self._move(job, index[first:end], values, to_arena=True)
            checksums += found
            for place, name in enumerate(names):
                known = command.checksums[first + place]
                is_right = found[place] == own[place] and (not known or found[place] == known[self._rank])
                if first + place not in failures and not is_right:
                    failures[first + place] = "checksum"
                    wrong.append(name)
            if absent:  # the blocks behind it are of no use: do not wait for them
                failures |= dict.fromkeys(range(end, len(index)), absent[min(absent)])
                break
        if wrong:
            self._tier.remove(wrong)
        return checksums

    def _get(self, job: CopyJob, first: int, values: torch.Tensor) -> None:
        """Begin to get the values from ``first`` on."""
        values[:, self._block_bytes :].zero_()  # so that what is not read has no seal
        self._call(self._tier.get, first, self._names(job.command, first, len(values)), values)

    def _call(
        self,
        method: _Method,
        first: int,
        names: list[BlockName],
        values: torch.Tensor,
    ) -> None:
        def call() -> dict[int, str]:
            found = checked(method(names, values), len(names))
            return {first + place: kind for place, kind in found.items()}

        self._caller.start(call)

    def _move(self, job: CopyJob, index: torch.Tensor, values: torch.Tensor, to_arena: bool = False) -> list[int]:
        """Copy blocks between the arena and values; returns their checksums. What is not sound is computed over."""
        rows = values[:, : self._block_bytes].view(torch.int64)
        if self._device.type == "cpu":
            with self._touching(job):
                return [self._move_row(row, block, to_arena) for row, block in zip(rows, index.tolist(), strict=True)]
        size = self._num_buffered
        parts = zip(torch.split(index, size), torch.split(rows, size), strict=True)
        found: list[int] = torch.cat([self._move_part(job, blocks, part, to_arena) for blocks, part in parts]).tolist()
        return found

    def _move_row(self, row: torch.Tensor, block: int, to_arena: bool) -> int:
        """Copy one block on the CPU; returns its checksum, which brings the block into the cache for the copy."""
        source, target = (row, self._arena[block]) if to_arena else (self._arena[block], row)
        checksum = checksum_of(source)
        target.copy_(source)
        return checksum

    def _move_part(self, job: CopyJob, index: torch.Tensor, rows: torch.Tensor, to_arena: bool) -> torch.Tensor:
        """Copy as many blocks as the buffer on the device holds, by way of it."""
        buffer = self._turns[0].buffer[: len(index)].view(torch.int64)
        if to_arena:
            for row, block in zip(rows, buffer, strict=True):  # each is contiguous, which all together are not
                block.copy_(row)
            with self._touching(job):
                return put_blocks(self._arena, index, buffer)
        with self._touching(job):
            sums = take_blocks(self._arena, index, buffer)
        for row, block in zip(rows, buffer, strict=True):
            row.copy_(block)
        return sums
