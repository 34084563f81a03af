"""The scheduler's books of the KV transfers in flight."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import msgspec

from hbserve.messages import CancelTransfer, Peer, ReceiveBlocks, SendBlocks, TransferResult
from hbserve.pd_disagg.instance_handle import InstanceHandle
from hbserve.pd_disagg.sequence import Seat, Sequence


@dataclass(slots=True)
class Transfer:
    """Blocks of one chunk on their way. Each side's blocks stay pinned until that side has confirmed."""

    transfer_id: str
    sequence: Sequence
    attempt: int
    source: Seat
    target: Seat
    link_epoch: int
    sender_open: bool = True
    receiver_open: bool = True
    failed: bool = False


@dataclass(slots=True)
class LinkStats:
    """What has gone from one instance to another."""

    num_transfers: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    failures: dict[str, int] = field(default_factory=lambda: defaultdict(int))


class TransferLedger:
    """Opens transfers, matches both sides' results, and keeps what may still be touched pinned."""

    def __init__(self) -> None:
        self._open: dict[str, Transfer] = {}
        self._link_epochs: dict[tuple[str, str], int] = defaultdict(int)
        self._count = 0
        self.links: dict[tuple[str, str], LinkStats] = defaultdict(LinkStats)

    def __len__(self) -> int:
        return len(self._open)

    def open(self, sequence: Sequence, source: Seat, target: Seat, first_block: int, end_block: int) -> SendBlocks:
        """Plan the transfer of the blocks at ``first_block .. end_block - 1`` of both tables.

        The receiver is told at once; the returned command belongs into the sender's plan.
        """
        self._count += 1
        transfer_id = f"{sequence.request.request_id}/{sequence.arrival}.{sequence.attempt}/{self._count}"
        link_epoch = self._link_epochs[source.worker.id, target.worker.id]
        self._open[transfer_id] = Transfer(transfer_id, sequence, sequence.attempt, source, target, link_epoch)
        sequence.open_transfers.add(transfer_id)
        for seat in (source, target):
            seat.pool.pin(seat.owner)
        source_blocks = source.block_ids[first_block:end_block]
        target_blocks = target.block_ids[first_block:end_block]
        target.worker.send(
            ReceiveBlocks(
                transfer_id=transfer_id,
                request_id=sequence.request.request_id,
                sources=_peers(source.worker, link_epoch),
                block_ids=target_blocks,
                generations=target.pool.generations_of(target_blocks),
            )
        )
        return SendBlocks(
            transfer_id=transfer_id,
            request_id=sequence.request.request_id,
            targets=_peers(target.worker, link_epoch),
            block_ids=source_blocks,
            generations=source.pool.generations_of(source_blocks),
        )

    def close_side(self, result: TransferResult) -> Transfer | None:
        """Take one side's result; returns the transfer if this side was open, whatever the outcome."""
        transfer = self._open.get(result.transfer_id)
        if transfer is None or not (transfer.sender_open if result.sent else transfer.receiver_open):
            return None
        link = (transfer.source.worker.id, transfer.target.worker.id)
        if result.error is None and not result.sent:
            stats = self.links[link]
            stats.num_transfers += 1
            stats.num_bytes += result.num_bytes
            stats.seconds += result.seconds
        self._close(transfer, result.sent)
        if result.error is not None and not transfer.failed:
            transfer.failed = True
            self.links[link].failures["sender" if result.sent else "receiver"] += 1
            # Once for all that the broken link takes with it: their retries must not break the next one.
            self._link_epochs[link] = max(self._link_epochs[link], transfer.link_epoch + 1)
            self._cancel_other_side(transfer)
        return transfer

    def lose(self, instance: InstanceHandle) -> None:
        """An instance is gone: its sides are over, the other sides are told to give up."""
        for transfer in list(self._open.values()):
            source_lost, target_lost = transfer.source.worker is instance, transfer.target.worker is instance
            if not (source_lost or target_lost):
                continue
            transfer.failed = True
            if source_lost and transfer.sender_open:
                self._close(transfer, True)
            if target_lost and transfer.receiver_open:
                self._close(transfer, False)
            self._cancel_other_side(transfer)

    def _close(self, transfer: Transfer, sent: bool) -> None:
        seat = transfer.source if sent else transfer.target
        seat.pool.unpin(seat.owner)
        if sent:
            transfer.sender_open = False
        else:
            transfer.receiver_open = False
        if not (transfer.sender_open or transfer.receiver_open):
            del self._open[transfer.transfer_id]

    def _cancel_other_side(self, transfer: Transfer) -> None:
        cancel = CancelTransfer(transfer_id=transfer.transfer_id)
        if transfer.sender_open:
            transfer.source.worker.send(cancel)
        if transfer.receiver_open:
            transfer.target.worker.send(cancel)


def _peers(worker: InstanceHandle, link_epoch: int) -> list[Peer]:
    assert worker.hello is not None
    return [msgspec.structs.replace(peer, link_epoch=link_epoch) for peer in worker.hello.peers]
