"""KV transfers in flight, and the links that they go over, as the scheduler knows them."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from hbserve.messages.transfer import (
    ALL_LAYERS,
    CancelTransfer,
    CloseLink,
    ConnectLink,
    DisconnectLink,
    FinishBlocks,
    LayerGroup,
    LinkClosed,
    LinkOpened,
    OpenLink,
    Peer,
    ReceiveBlocks,
    SendBlocks,
    TransferResult,
)
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.sequence import KVAllocation, Sequence

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Link:
    """The link from one instance to another, from its opening to its end. It fails as a whole and is never repaired.

    Attributes:
        epoch: tells it from earlier and later links between the same two instances.
        addressed: the target's ranks, as they name the link while they open it.
        targets: the same with their endpoints; empty until the link is open.
        transfers: transfers that at least one side has not confirmed.
        broken: no transfer starts over it. The target's blocks stay pinned until the target confirms that nothing is
            written to them any more.
        sender_lost: a sender was lost and never confirmed.
    """

    source: InstanceHandle
    target: InstanceHandle
    epoch: int
    sources: list[Peer]
    addressed: list[Peer]
    targets: list[Peer] = field(default_factory=list)
    transfers: dict[str, Transfer] = field(default_factory=dict)
    broken: bool = False
    sender_lost: bool = False
    close_sent: bool = False


@dataclass(slots=True, eq=False)
class Transfer:
    """The transfer of one chunk's blocks, with all their layers or a group of them.

    Each side's blocks stay pinned until that side can no longer touch them.
    """

    transfer_id: str
    sequence: Sequence
    attempt: int
    source: KVAllocation
    target: KVAllocation
    target_blocks: list[int]
    layers: LayerGroup
    link: Link
    sender_open: bool = True
    receiver_open: bool = True
    delivered: bool = False
    finishing: bool = False
    checksums: list[list[int]] | None = None


@dataclass(slots=True)
class LinkStats:
    """Totals of the transfers from one instance to another.

    Attributes:
        seconds: time spent moving bytes, without the wait for the prefill or for other transfers.
        queued_s: time spent waiting for other transfers.
        exposed_s: from a prompt's first token to the arrival of its last block: the part that nothing hid.
        failures: of the link, by `TransferResult.error_kind`; ``lost``: an instance was lost.
    """

    num_transfers: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    queued_s: float = 0.0
    exposed_s: float = 0.0
    failures: dict[str, int] = field(default_factory=lambda: defaultdict(int))


@dataclass(slots=True)
class ResultEffect:
    """The effect of a result: a transfer that has arrived, or all transfers that failed with their link."""

    arrived: Transfer | None = None
    failed: list[Transfer] = field(default_factory=list)


class TransferTracker:
    """Opens links and transfers, which it owns, and matches both sides' results.

    Args:
        verify: compare checksums before a transfer counts as arrived.
    """

    def __init__(self, verify: bool = False) -> None:
        self._verify = verify
        self._open: dict[str, Transfer] = {}
        self._links: dict[tuple[str, str], Link] = {}  # those that are not broken
        self._ending: list[Link] = []  # broken ones, until their last transfer has ended
        self._num_links = 0
        self._count = 0
        self.links: dict[tuple[str, str], LinkStats] = defaultdict(LinkStats)
        """Statistics by source and target."""

    def __len__(self) -> int:
        return len(self._open)

    def num_open(self, source_id: str, target_id: str) -> int:
        """Return how many transfers between two instances have not ended."""
        return sum(
            len(link.transfers)
            for link in (*self._links.values(), *self._ending)
            if (link.source.id, link.target.id) == (source_id, target_id)
        )

    # --- links -----------------------------------------------------------------------------------

    def connect(self, instances: Iterable[InstanceHandle]) -> None:
        """Open the links that the instances' roles need and that are missing."""
        ready = [instance for instance in instances if instance.ready]
        for source in ready:
            for target in ready:
                needed = source.role.prefills and not source.role.decodes and not target.role.prefills
                if needed and (source.id, target.id) not in self._links:
                    self._open_link(source, target)

    def disconnect(self, instance: InstanceHandle) -> None:
        """Close an instance's links, which must have no transfers."""
        for link in list(self._links.values()):
            if instance in (link.source, link.target):
                assert not link.transfers, f"transfers from {link.source.id} to {link.target.id} are under way"
                self._break(link)

    def forget(self, instance: InstanceHandle) -> None:
        """Forget a lost instance that will not come back: its links and their totals."""
        self.on_instance_lost(instance)
        for key in [key for key in self.links if instance.id in key]:
            del self.links[key]

    def touches(self, instance: InstanceHandle) -> bool:
        """Whether a transfer from or to an instance has not ended on both sides."""
        return any(instance in (transfer.link.source, transfer.link.target) for transfer in self._open.values())

    def _open_link(self, source: InstanceHandle, target: InstanceHandle) -> None:
        assert source.hello is not None
        assert target.hello is not None
        key = (source.id, target.id)
        self._num_links += 1
        epoch = self._num_links
        sources, addressed = (
            [msgspec.structs.replace(peer, link_epoch=epoch) for peer in hello.peers]
            for hello in (source.hello, target.hello)
        )
        self._links[key] = Link(source, target, epoch, sources, addressed)
        self.links.setdefault(key, LinkStats())
        target.send(OpenLink(source_id=source.id, link_epoch=epoch, sources=sources))

    def is_open(self, source_id: str, target_id: str) -> bool:
        """Whether blocks can go from one instance to the other."""
        link = self._links.get((source_id, target_id))
        return link is not None and bool(link.targets)

    @property
    def connecting(self) -> list[tuple[str, str]]:
        """Links that are not open yet, by source and target."""
        return [key for key, link in self._links.items() if not link.targets]

    def on_link_opened(self, target: InstanceHandle, opened: LinkOpened) -> None:
        """The receiver is ready: have the sender connect."""
        link = self._links.get((opened.source_id, target.id))
        if link is not None and link.epoch == opened.link_epoch:
            link.targets = opened.peers
            link.source.send(ConnectLink(targets=link.targets))

    def on_link_closed(self, target: InstanceHandle, closed: LinkClosed) -> None:
        """The receiver confirms that nothing is written over a broken link any more: unpin its blocks."""
        for link in list(self._ending):
            if (link.source.id, link.target, link.epoch) == (closed.source_id, target, closed.link_epoch):
                self._close_all_receivers(link)

    # --- transfers -------------------------------------------------------------------------------

    def open(
        self,
        sequence: Sequence,
        source: KVAllocation,
        target: KVAllocation,
        first_block: int,
        end_block: int,
        layers: LayerGroup = ALL_LAYERS,
    ) -> SendBlocks:
        """Start the transfer of these layers of the blocks at ``first_block .. end_block - 1`` of both tables.

        A receiver that takes part is told at once. The returned command belongs into the sender's plan.
        """
        self._count += 1
        transfer_id = f"{sequence.id}/{sequence.arrival}.{sequence.attempt}/{self._count}"
        ends = source.instance_id, target.instance_id
        link = self._links[ends]
        source_blocks = source.block_ids[first_block:end_block]
        target_blocks = target.block_ids[first_block:end_block]
        transfer = Transfer(transfer_id, sequence, sequence.attempt, source, target, target_blocks, layers, link)
        self._open[transfer_id] = link.transfers[transfer_id] = transfer
        sequence.open_transfers.add(transfer_id)
        for allocation in (source, target):
            allocation.begin_transfer()
        num_blocks = len(target_blocks)
        logger.debug(
            "request %s: transfer %s started, %d blocks from %s to %s", sequence.id, transfer_id, num_blocks, *ends
        )
        if not _is_one_sided(link):
            link.target.send(
                ReceiveBlocks(
                    transfer_id=transfer_id,
                    request_id=sequence.id,
                    sources=link.sources,
                    block_ids=target_blocks,
                    generations=target.pool.generations_of(target_blocks),
                    layers=layers,
                )
            )
        return SendBlocks(
            transfer_id=transfer_id,
            request_id=sequence.id,
            targets=link.targets,
            block_ids=source_blocks,
            generations=source.pool.generations_of(source_blocks),
            target_block_ids=target_blocks,
            layers=layers,
            checksum=self._verify,
        )

    def on_result(self, result: TransferResult) -> ResultEffect:
        """Take one side's result."""
        transfer = self._open.get(result.transfer_id)
        if transfer is None or not (transfer.sender_open if result.sent else transfer.receiver_open):
            return ResultEffect()
        link = transfer.link
        if result.sent:
            self._close_sender(transfer)
        if link.broken:
            self._end_if_senders_are_done(link)
            return ResultEffect()
        if result.error is not None:
            self._stats(link).failures[result.error_kind or "backend"] += 1
            return ResultEffect(failed=self._break(link))
        if result.sent:
            self._count_sent(link, result)
            transfer.checksums = result.checksums
        if not result.sent or _is_one_sided(link):
            if transfer.finishing or not (self._verify or _needs_merging(link)):
                self._close_receiver(transfer)
                return ResultEffect(arrived=transfer)
            transfer.delivered = True
        if transfer.delivered and (transfer.checksums is not None or not self._verify):
            self._ask_to_finish(transfer)
        return ResultEffect()

    def on_instance_lost(self, instance: InstanceHandle) -> list[Transfer]:
        """An instance is lost, and its links with it; returns the transfers that have failed."""
        failed: list[Transfer] = []
        for link in (*self._links.values(), *self._ending):
            if instance not in (link.source, link.target):
                continue
            if link.transfers and not link.broken:
                self._stats(link).failures["lost"] += 1
            if instance is link.target:
                link.close_sent = True  # there is no receiver to tell
                failed += self._break(link)
                self._close_all_receivers(link)
            else:
                link.sender_lost = True
                failed += self._break(link)
                for transfer in list(link.transfers.values()):
                    if transfer.sender_open:
                        self._close_sender(transfer)
                self._end_if_senders_are_done(link)
        return failed

    def _break(self, link: Link) -> list[Transfer]:
        """Mark a link as broken; returns its transfers that have not arrived, which have failed."""
        if link.broken:
            return []
        link.broken = True
        del self._links[link.source.id, link.target.id]
        self._ending.append(link)
        for transfer in list(link.transfers.values()):
            if transfer.sender_open and not link.sender_lost:
                link.source.send(CancelTransfer(transfer_id=transfer.transfer_id))
        if not link.sender_lost:
            link.source.send(DisconnectLink(targets=link.targets or link.addressed))
        self._end_if_senders_are_done(link)
        return [transfer for transfer in link.transfers.values() if transfer.receiver_open]

    def _end_if_senders_are_done(self, link: Link) -> None:
        """Once no sender is active any more, have the target make sure that nothing comes later."""
        if link.close_sent or any(transfer.sender_open for transfer in link.transfers.values()):
            return
        link.close_sent = True
        link.target.send(
            CloseLink(
                source_id=link.source.id, link_epoch=link.epoch, sources=link.sources, senders_done=not link.sender_lost
            )
        )

    def _ask_to_finish(self, transfer: Transfer) -> None:
        transfer.finishing = True
        pool = transfer.target.pool
        transfer.link.target.send(
            FinishBlocks(
                transfer_id=transfer.transfer_id,
                num_sources=len(transfer.link.sources),
                block_ids=transfer.target_blocks,
                generations=pool.generations_of(transfer.target_blocks),
                checksums=transfer.checksums,
                layers=transfer.layers,
            )
        )

    # --- pins ------------------------------------------------------------------------------------

    def _close_sender(self, transfer: Transfer) -> None:
        transfer.sender_open = False
        transfer.source.end_transfer()
        self._forget_if_over(transfer)

    def _close_receiver(self, transfer: Transfer) -> None:
        transfer.receiver_open = False
        transfer.target.end_transfer()
        self._forget_if_over(transfer)

    def _close_all_receivers(self, link: Link) -> None:
        for transfer in list(link.transfers.values()):
            if transfer.receiver_open:
                self._close_receiver(transfer)
        if not link.transfers and link in self._ending:
            self._ending.remove(link)

    def _forget_if_over(self, transfer: Transfer) -> None:
        link = transfer.link
        if not (transfer.sender_open or transfer.receiver_open):
            del self._open[transfer.transfer_id], link.transfers[transfer.transfer_id]
            if link.broken and link.close_sent and not link.transfers and link in self._ending:
                self._ending.remove(link)

    # --- statistics ------------------------------------------------------------------------------

    def _stats(self, link: Link) -> LinkStats:
        return self.links[link.source.id, link.target.id]

    def _count_sent(self, link: Link, result: TransferResult) -> None:
        stats = self._stats(link)
        stats.num_transfers += 1
        stats.num_bytes += result.num_bytes
        stats.seconds += result.seconds
        stats.queued_s += result.queued_s

    def count_exposed(self, transfer: Transfer, seconds: float) -> None:
        """Count the time that a computed prompt waited for its last blocks to arrive."""
        self._stats(transfer.link).exposed_s += seconds


def _is_one_sided(link: Link) -> bool:
    assert link.target.hello is not None
    return link.target.hello.one_sided


def _needs_merging(link: Link) -> bool:
    """Whether several senders write their heads into the same blocks."""
    return _is_one_sided(link) and len(link.sources) > len(link.targets)
