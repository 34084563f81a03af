"""The transfers of a simulated worker, over a wire that may fail.

A one-sided sender writes block after block into the receiver's memory, whatever the receiver does, while the receiver's
window for the link is open. A two-sided sender sends all blocks at once, and the receiver writes them when it was told
where.

An instance of several ranks sends each block in parts, one for each pair of ranks that share heads. Where several ranks
send to one without its help, their parts lie unmerged in the block until the scheduler has it merge them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hbserve.messages.transfer import (
    CancelTransfer,
    CloseLink,
    FinishBlocks,
    LayerGroup,
    LinkClosed,
    LinkOpened,
    OpenLink,
    Peer,
    ReceiveBlocks,
    SendBlocks,
    TransferCommand,
    TransferResult,
)
from tests.fault_search.memory import UNMERGED, part_of
from tests.fault_search.scenario import TRANSFER_TIMEOUT_S

if TYPE_CHECKING:
    from tests.fault_search.worker import Worker

_Blocks = list[list[int]]


@dataclass(eq=False)
class _Sending:
    """A transfer that is being sent; ``is_over``: its result has been reported."""

    command: SendBlocks
    is_over: bool = False


class Transfers:
    """Both sides of one worker's transfers."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.forget_all()

    def forget_all(self) -> None:
        """Begin an epoch: nothing of the one before is written any more, here or at the receivers."""
        for sending in getattr(self, "_sendings", {}).values():
            sending.is_over = True
        self._sendings: dict[str, _Sending] = {}
        self._receives: dict[str, ReceiveBlocks] = {}
        self._arrived: dict[str, list[tuple[int, _Blocks]]] = {}  # parts, each with the bits that it holds
        self._num_stored: dict[str, int] = {}
        self.windows: dict[int, str] = {}  # instance that sends, by epoch of the link
        self._cancelled_early: set[str] = set()
        self._seen_generation: dict[int, int] = {}

    def handle(self, command: TransferCommand) -> None:
        worker = self._worker
        match command:
            case OpenLink(source_id=source_id, link_epoch=link_epoch):
                self.windows[link_epoch] = source_id
                peers = worker.peers(link_epoch)
                worker.send(LinkOpened(epoch=worker.epoch, source_id=source_id, link_epoch=link_epoch, peers=peers))
            case CloseLink(source_id=source_id, link_epoch=link_epoch):
                self.windows.pop(link_epoch, None)
                for receive in list(self._receives.values()):
                    if receive.sources[0].link_epoch == link_epoch:
                        self._end_receive(receive.transfer_id, "the link was closed")
                worker.send(LinkClosed(epoch=worker.epoch, source_id=source_id, link_epoch=link_epoch))
            case ReceiveBlocks():
                self._receive(command)
            case FinishBlocks():
                self._finish(command)
            case CancelTransfer(transfer_id=transfer_id):
                self._cancel(transfer_id)

    def _report(
        self, transfer_id: str, sent: bool, error: str | None, checksums: list[list[int]] | None = None
    ) -> None:
        kind = None if error is None else "backend"
        worker = self._worker
        worker.send(
            TransferResult(
                epoch=worker.epoch,
                transfer_id=transfer_id,
                sent=sent,
                num_bytes=0,
                seconds=0.001,
                error=error,
                error_kind=kind,
                checksums=checksums,
            )
        )

    def _is_stale(self, block_ids: list[int], generations: list[int]) -> bool:
        pairs = list(zip(block_ids, generations, strict=True))
        if any(generation < self._seen_generation.get(block, -1) for block, generation in pairs):
            return True
        self._seen_generation.update(pairs)
        return False

    def _cancel(self, transfer_id: str) -> None:
        sending = self._sendings.get(transfer_id)
        if sending is not None:
            self._end_send(sending, "cancelled")
        elif transfer_id in self._receives:
            self._end_receive(transfer_id, "cancelled")
        else:
            self._cancelled_early.add(transfer_id)

    # --- the sender ------------------------------------------------------------------------------

    def send(self, command: SendBlocks) -> None:
        sending = self._sendings[command.transfer_id] = _Sending(command)
        if command.transfer_id in self._cancelled_early:
            self._cancelled_early.discard(command.transfer_id)
            self._end_send(sending, "cancelled")
        elif not command.targets or self._is_stale(command.block_ids, command.generations):
            self._end_send(sending, "stale, or the receiver has not opened the link")
        elif self._worker.world.scenario.one_sided:
            self._write(sending, 0)
        else:
            self._send_all(sending)

    def _end_send(self, sending: _Sending, error: str | None) -> None:
        if sending.is_over:
            return
        sending.is_over = True
        command = sending.command
        del self._sendings[command.transfer_id]
        checksums = None
        if error is None and command.checksum:
            checksums = self._checksums(command.block_ids, command.layers, self._worker.num_ranks)
        self._report(command.transfer_id, True, error, checksums)

    def _checksums(self, block_ids: list[int], layers: LayerGroup, num_ranks: int) -> list[list[int]]:
        """Return checksums of blocks for each rank of the sender."""
        parts = [part_of(layers.index, layers.count, rank, num_ranks) for rank in range(num_ranks)]
        blocks = self._worker.arena.blocks
        return [[hash(tuple([each & part for each in blocks[block]])) for block in block_ids] for part in parts]

    def _parts(self, command: SendBlocks) -> list[int]:
        """Return the bits of each part in which blocks leave, one for each pair of ranks that share heads."""
        count, layers = max(self._worker.num_ranks, len(command.targets)), command.layers
        return [part_of(layers.index, layers.count, rank, count) for rank in range(count)]

    def _write(self, sending: _Sending, index: int) -> None:
        """Write one part of a block into the receiver's memory, and the others after it."""
        world, command = self._worker.world, sending.command
        if sending.is_over:
            return
        parts = self._parts(command)
        if index == len(command.block_ids) * len(parts):
            self._end_send(sending, None)
            return
        target = command.targets[0]
        receiver = world.receiver_of(target)
        if world.is_wire_bad or receiver is None or target.link_epoch not in receiver.transfers.windows:
            delay_s = world.rng.choice((0.01, TRANSFER_TIMEOUT_S))
            self._worker.after(delay_s, lambda: self._end_send(sending, "the receiver takes nothing"))
            return
        number, part = index // len(parts), parts[index % len(parts)]
        needs_merging = self._worker.num_ranks > len(command.targets)
        contents = world.on_wire(self._worker.arena.blocks[command.block_ids[number]], part)
        for offset, each in enumerate(contents):
            unmerged = each ^ UNMERGED if needs_merging else each
            receiver.arena.write(command.target_block_ids[number], offset, unmerged, part)
        is_repeated = world.scenario.repeats and world.rng.random() < 0.2  # a transport that tries again
        following = index if is_repeated else index + 1
        self._worker.after(world.rng.choice((0.0, 0.0, 0.001, 0.02)), lambda: self._write(sending, following))

    def _send_all(self, sending: _Sending) -> None:
        world, command = self._worker.world, sending.command
        target, parts = command.targets[0], self._parts(command)
        num_left = len(parts)

        def deliver(part: int, payload: _Blocks) -> None:
            nonlocal num_left
            receiver = world.receiver_of(target)
            if world.is_wire_bad or receiver is None or target.link_epoch not in receiver.transfers.windows:
                self._worker.do(lambda: self._end_send(sending, "the receiver takes nothing"))
                return
            receiver.do(lambda: receiver.transfers.on_arrived(command.transfer_id, target, part, payload))
            num_left -= 1
            if not num_left:
                self._worker.do(lambda: self._end_send(sending, None))

        for part in parts:
            payload = [world.on_wire(self._worker.arena.blocks[block], part) for block in command.block_ids]
            delay_s = world.rng.choice((0.0005, 0.002, 0.05))
            world.after(delay_s, lambda part=part, payload=payload: deliver(part, payload))  # type: ignore[misc]

    # --- the receiver ----------------------------------------------------------------------------

    def _receive(self, command: ReceiveBlocks) -> None:
        transfer_id = command.transfer_id
        self._receives[transfer_id] = command
        if transfer_id in self._cancelled_early:
            self._cancelled_early.discard(transfer_id)
            self._end_receive(transfer_id, "cancelled")
        elif self._is_stale(command.block_ids, command.generations):
            self._end_receive(transfer_id, "stale")
        elif transfer_id in self._arrived:
            for part, payload in self._arrived.pop(transfer_id):
                self._store(transfer_id, part, payload)
        if transfer_id in self._receives:
            self._worker.after(TRANSFER_TIMEOUT_S, lambda: self._end_receive(transfer_id, "not complete in time"))

    def on_arrived(self, transfer_id: str, as_peer: Peer, part: int, payload: _Blocks) -> None:
        """A part of the blocks of a two-sided transfer is here."""
        if as_peer.epoch != self._worker.epoch or as_peer.link_epoch not in self.windows:
            return
        if transfer_id in self._receives:
            self._store(transfer_id, part, payload)
        else:
            self._arrived.setdefault(transfer_id, []).append((part, payload))

    def _store(self, transfer_id: str, part: int, payload: _Blocks) -> None:
        command = self._receives[transfer_id]
        for block, contents in zip(command.block_ids, payload, strict=True):
            for offset, each in enumerate(contents):
                self._worker.arena.write(block, offset, each, part)
        self._num_stored[transfer_id] = self._num_stored.get(transfer_id, 0) + 1
        if self._num_stored[transfer_id] == max(len(command.sources), self._worker.num_ranks):
            self._end_receive(transfer_id, None)

    def _end_receive(self, transfer_id: str, error: str | None) -> None:
        self._num_stored.pop(transfer_id, None)
        if self._receives.pop(transfer_id, None) is not None:
            self._report(transfer_id, False, error)

    def _finish(self, command: FinishBlocks) -> None:
        error, layers, worker = None, command.layers, self._worker
        if worker.world.scenario.one_sided and command.num_sources > worker.num_ranks:
            part = part_of(layers.index, layers.count, 0, 1)
            for block in command.block_ids:
                for offset, each in enumerate(worker.arena.blocks[block]):
                    worker.arena.write(block, offset, each ^ UNMERGED, part)
        found = self._checksums(command.block_ids, layers, command.num_sources)
        if command.checksums not in (None, found):
            error = "blocks are not what was sent"
        self._report(command.transfer_id, False, error)
