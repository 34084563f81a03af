"""The transfers of a simulated worker, over a wire that may fail.

A one-sided sender writes block after block into the receiver's memory, whatever the receiver does, while the receiver's
window for the link is open. A two-sided sender sends all blocks at once, and the receiver writes them when it was told
where.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hbserve.messages.transfer import (
    CancelTransfer,
    CloseLink,
    FinishBlocks,
    LinkClosed,
    LinkOpened,
    OpenLink,
    Peer,
    ReceiveBlocks,
    SendBlocks,
    TransferCommand,
    TransferResult,
)
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
        self._arrived: dict[str, _Blocks] = {}
        self.windows: dict[int, str] = {}  # instance that sends, by epoch of the link
        self._cancelled_early: set[str] = set()
        self._seen_generation: dict[int, int] = {}

    def handle(self, command: TransferCommand) -> None:
        worker = self._worker
        match command:
            case OpenLink(source_id=source_id, link_epoch=link_epoch):
                self.windows[link_epoch] = source_id
                peer = Peer(rank=worker.kv_rank, epoch=worker.epoch, endpoint="", link_epoch=link_epoch)
                worker.send(LinkOpened(epoch=worker.epoch, source_id=source_id, link_epoch=link_epoch, peers=[peer]))
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
            checksums = [[hash(tuple(self._worker.arena.blocks[block])) for block in command.block_ids]]
        self._report(command.transfer_id, True, error, checksums)

    def _write(self, sending: _Sending, index: int) -> None:
        """Write one block into the receiver's memory, and the others after it."""
        world, command = self._worker.world, sending.command
        if sending.is_over:
            return
        if index == len(command.block_ids):
            self._end_send(sending, None)
            return
        [target] = command.targets
        receiver = world.receiver_of(target)
        if world.is_wire_bad or receiver is None or target.link_epoch not in receiver.transfers.windows:
            delay_s = world.rng.choice((0.01, TRANSFER_TIMEOUT_S))
            self._worker.after(delay_s, lambda: self._end_send(sending, "the receiver takes nothing"))
            return
        contents = world.on_wire(self._worker.arena.blocks[command.block_ids[index]])
        for offset, each in enumerate(contents):
            receiver.arena.write(command.target_block_ids[index], offset, each)
        self._worker.after(world.rng.choice((0.0, 0.0, 0.001, 0.02)), lambda: self._write(sending, index + 1))

    def _send_all(self, sending: _Sending) -> None:
        world, command = self._worker.world, sending.command
        payload = [world.on_wire(self._worker.arena.blocks[block]) for block in command.block_ids]
        [target] = command.targets

        def deliver() -> None:
            receiver = world.receiver_of(target)
            if world.is_wire_bad or receiver is None or target.link_epoch not in receiver.transfers.windows:
                self._worker.do(lambda: self._end_send(sending, "the receiver takes nothing"))
                return
            receiver.do(lambda: receiver.transfers.on_arrived(command.transfer_id, target, payload))
            self._worker.do(lambda: self._end_send(sending, None))

        world.after(world.rng.choice((0.0005, 0.002, 0.05)), deliver)

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
            self._store(transfer_id, self._arrived.pop(transfer_id))
        else:
            self._worker.after(TRANSFER_TIMEOUT_S, lambda: self._end_receive(transfer_id, "not complete in time"))

    def on_arrived(self, transfer_id: str, as_peer: Peer, payload: _Blocks) -> None:
        """The blocks of a two-sided transfer are here."""
        if as_peer.epoch != self._worker.epoch or as_peer.link_epoch not in self.windows:
            return
        if transfer_id in self._receives:
            self._store(transfer_id, payload)
        else:
            self._arrived[transfer_id] = payload

    def _store(self, transfer_id: str, payload: _Blocks) -> None:
        for block, contents in zip(self._receives[transfer_id].block_ids, payload, strict=True):
            for offset, each in enumerate(contents):
                self._worker.arena.write(block, offset, each)
        self._end_receive(transfer_id, None)

    def _end_receive(self, transfer_id: str, error: str | None) -> None:
        if self._receives.pop(transfer_id, None) is not None:
            self._report(transfer_id, False, error)

    def _finish(self, command: FinishBlocks) -> None:
        error = None
        if command.checksums is not None:
            found = [hash(tuple(self._worker.arena.blocks[block])) for block in command.block_ids]
            if [found] != command.checksums:
                error = "blocks are not what was sent"
        self._report(command.transfer_id, False, error)
