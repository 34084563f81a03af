"""A lane: one direction of one tier, in a thread of its own and on a GPU on streams of its own."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from hbserve.kv_tiers.base import BlockName, KVTier
from hbserve.kv_transfer.block_parts import put_blocks, take_blocks
from hbserve.messages.tiers import LoadBlocks, StoreBlocks, TierCommand, TierResult

logger = logging.getLogger(__name__)

_BUFFER_BYTES = 16 << 20
"""Bytes of a lane's buffer on the device: blocks are gathered there, and leave or come in pieces of this size.

The copies of one direction share the GPU's copy engine, whatever their streams. So a step's inputs and tokens may wait
for pieces that were asked for before them. A lane therefore has one piece at a time in the engine's queue; at 50 GB/s a
piece takes a third of a millisecond. On a GPU, memory of the host has two buffers: blocks are gathered in the one, or
scattered from it, while the other one is copied. A third one gains nothing (H200).
"""


class CopyJob:
    """A job of a lane. It ends once: with its result, or because it is late, or with its epoch.

    Attributes:
        lock: held while the job touches the arena or memory that the scheduler gives to others after its end.
        is_over: nothing may be touched any more; with the lock held.
    """

    def __init__(self, command: TierCommand) -> None:
        self.command = command
        self.lock = threading.Lock()
        self.is_over = False

    def failed(self, kind: str, error: str) -> TierResult:
        """Return the result of a job of which nothing counts."""
        failures = dict.fromkeys(range(len(self.command.slots)), kind)
        epoch, job_id = self.command.epoch, self.command.job_id
        return TierResult(
            epoch=epoch, job_id=job_id, failures=failures, error=error, checksums=[], num_bytes=0, seconds=0.0
        )


class Over(Exception):
    """The job was ended from outside."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """A buffer on the device, and on a GPU the stream of what is done with it; ``copied``: the end of its last copy."""

    buffer: torch.Tensor
    stream: Any = None
    copied: Any = None

    @staticmethod
    def of(num_blocks: int, block_bytes: int, device: torch.device) -> _Turn:
        if device.type == "cpu":
            return _Turn(torch.empty(num_blocks, block_bytes, dtype=torch.uint8))
        # Before the steps: its kernels are short, and the next copy waits for them.
        stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):  # else it is memory that a step has freed and its kernels still use
            buffer = torch.empty(num_blocks, block_bytes, dtype=torch.uint8, device=device)
        return _Turn(buffer, stream, torch.cuda.Event())  # type: ignore[no-untyped-call]

    def on_stream(self) -> AbstractContextManager[Any]:
        """Make its stream the current one, on a GPU."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def wait(self) -> None:
        """Wait for what was asked of the device."""
        if self.stream is not None:
            self.stream.synchronize()

    @contextmanager
    def copying(self, others: list[_Turn]) -> Iterator[None]:
        """Run a copy to or from the tier after the last ones of the other turns."""
        if self.stream is None:
            yield
            return
        for other in others:
            if other is not self:
                self.stream.wait_event(other.copied)
        yield
        self.copied.record(self.stream)


class Lane:
    """Does jobs one after the other, for a tier with slots (`hbserve.kv_tiers.named_lane` has the one for others).

    Args:
        tier: which memory it copies to or from.
        prefix: the beginning of the blocks' names, see `BlockName`.
        kv_blocks: the rank's arena, uint8 ``[block, byte]``.
        rank: number of the rank in its instance.
        on_end: called in the lane's thread with each job that was not ended from outside, and its result.
    """

    def __init__(
        self,
        tier: KVTier,
        prefix: str,
        kv_blocks: torch.Tensor,
        rank: int,
        on_end: Callable[[CopyJob, TierResult], None],
    ) -> None:
        self._tier, self._prefix, self._rank, self._on_end = tier, prefix, rank, on_end
        self._arena = kv_blocks.view(torch.int64)
        self._device = kv_blocks.device
        self._block_bytes = kv_blocks.shape[1]
        self._num_buffered = max(1, _BUFFER_BYTES // self._block_bytes)
        self._turns: list[_Turn] = []
        self._jobs: queue.SimpleQueue[CopyJob | None] = queue.SimpleQueue()
        # A daemon: storage that hangs must not keep the process from ending.
        threading.Thread(target=self._run, name="kv-tier", daemon=True).start()

    def put(self, job: CopyJob) -> None:
        """Do a job after those before it."""
        self._jobs.put(job)

    def close(self) -> None:
        """End the thread after the jobs that are there."""
        self._jobs.put(None)

    # --- the lane's thread -----------------------------------------------------------------------

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        with torch.inference_mode():
            while (job := self._jobs.get()) is not None:
                try:
                    result = self._do(job)
                except Over:
                    continue
                except Exception as error:  # a user's tier may raise anything
                    logger.warning("a KV tier has failed: %r", error)
                    result = job.failed("backend", str(error) or repr(error))
                with job.lock:
                    if job.is_over:
                        continue
                    job.is_over = True
                self._on_end(job, result)

    def _do(self, job: CopyJob) -> TierResult:
        began = time.perf_counter()
        command, may_hang = job.command, self._tier.may_hang
        if not self._turns:
            self._make_buffers()
        failures: dict[int, str] = {}
        parts: list[torch.Tensor] = []
        with self._turns[0].on_stream(), nullcontext() if may_hang else self._touching(job):
            index = torch.tensor(command.block_ids, device=self._device)  # which waits for the device
            for number, first in enumerate(range(0, len(index), self._num_buffered)):
                turn = self._turns[number % len(self._turns)]
                turn.wait()
                blocks = index[first : first + self._num_buffered]
                buffer = turn.buffer[: len(blocks)]
                words = buffer.view(torch.int64)
                touching = self._touching(job) if may_hang else nullcontext()
                with turn.on_stream():
                    if isinstance(command, StoreBlocks):
                        with touching:
                            parts.append(take_blocks(self._arena, blocks, words))
                        with turn.copying(self._turns):
                            found = self._put(self._names(command, first, len(blocks)), buffer, parts[-1])
                    else:
                        with turn.copying(self._turns):
                            found = self._tier.get(self._names(command, first, len(blocks)), buffer)
                        with touching:  # what is not sound is computed over
                            parts.append(put_blocks(self._arena, blocks, words))
                failures |= {first + place: kind for place, kind in checked(found, len(blocks)).items()}
            self._wait()
            checksums: list[int] = torch.cat(parts).tolist()
        if isinstance(command, LoadBlocks):
            for number, (checksum, expected) in enumerate(zip(checksums, command.checksums, strict=True)):
                if number not in failures and checksum != expected[self._rank]:
                    failures[number] = "checksum"
        return self._result(command, checksums, failures, began)

    def _result(self, command: TierCommand, checksums: list[int], failures: dict[int, str], began: float) -> TierResult:
        return TierResult(
            epoch=command.epoch,
            job_id=command.job_id,
            failures=failures,
            error=_describe(failures, len(command.slots)),
            checksums=[] if isinstance(command, LoadBlocks) else [[number] for number in checksums],
            num_bytes=len(checksums) * self._block_bytes,
            seconds=time.perf_counter() - began,
        )

    def _make_buffers(self) -> None:
        num_turns = 2 if self._device.type == "cuda" and not self._tier.may_hang else 1
        self._turns = [_Turn.of(self._num_buffered, self._block_bytes, self._device) for _ in range(num_turns)]

    def _names(self, command: TierCommand, first: int, count: int) -> list[BlockName]:
        keys = command.keys[first : first + count]
        slots = command.slots[first : first + count]
        return [BlockName(self._prefix + key.hex(), key, slot) for key, slot in zip(keys, slots, strict=True)]

    def _put(self, names: list[BlockName], buffer: torch.Tensor, checksums: torch.Tensor) -> dict[int, str]:
        if self._tier.may_hang:  # the host needs the checksums
            names = [replace(name, checksum=number) for name, number in zip(names, checksums.tolist(), strict=True)]
        return self._tier.put(names, buffer)

    @contextmanager
    def _touching(self, job: CopyJob) -> Iterator[None]:
        """Run the block, and wait for it on the device, unless the job is over."""
        with job.lock:
            if job.is_over:
                raise Over
            try:
                yield
            finally:
                self._wait()

    def _wait(self) -> None:
        """Wait for what the lane has asked the device for."""
        for turn in self._turns:
            turn.wait()


def checked(failures: dict[int, str], num_blocks: int) -> dict[int, str]:
    """Check what a tier has returned, which a user may have written."""
    if not isinstance(failures, dict) or not all(place in range(num_blocks) for place in failures):
        raise TypeError(f"put and get return what went wrong by place in names, got {failures!r}")
    return {place: str(kind) for place, kind in failures.items()}


def _describe(failures: dict[int, str], num_blocks: int) -> str | None:
    if not failures:
        return None
    kinds = sorted(set(failures.values()))
    return f"{len(failures)} of {num_blocks} blocks: {', '.join(kinds)}"
