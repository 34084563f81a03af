"""KV transfers in flight, and the links that they go over, as the scheduler knows them."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from hbserve.config import InstanceRole
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
    ReceiveBlocks,
    SendBlocks,
    TransferResult,
)
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.sequence import KVAllocation, Sequence
from hbserve.scheduler.transfer import Link, LinkState, Receiver, Sender, Transfer

logger = logging.getLogger(__name__)


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
        """Open the links that the instances' roles, and what is under way, need and that are missing."""
        ready = [instance for instance in instances if instance.ready]
        for source in ready:
            for target in ready:
                if (source.id, target.id) not in self._links and _is_needed(source, target):
                    self._open_link(source, target)

    def prepare(self, roles: Mapping[InstanceHandle, InstanceRole]) -> bool:
        """Open the links that instances need in these roles; returns whether all of them are open.

        A link that no role needs any more stays open: it costs nothing, and to close it would stop steps.
        """
        ready = [instance for instance in roles if instance.ready]
        pairs = [(source, target) for source in ready for target in ready if source is not target]
        needed = [(source, target) for source, target in pairs if _roles_need(roles[source], roles[target])]
        for source, target in needed:
            if (source.id, target.id) not in self._links:
                self._open_link(source, target)
        return all(self.is_open(source.id, target.id) for source, target in needed)

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
        return link is not None and link.state is LinkState.OPEN

    @property
    def connecting(self) -> list[tuple[str, str]]:
        """Links that are not open yet, by source and target."""
        return [key for key, link in self._links.items() if link.state is LinkState.OPENING]

    def on_link_opened(self, target: InstanceHandle, opened: LinkOpened) -> None:
        """The receiver is ready: have the sender connect."""
        link = self._links.get((opened.source_id, target.id))
        if opened.error is not None:
            return  # the receiver exits
        if link is not None and link.epoch == opened.link_epoch and link.state is LinkState.OPENING:
            link.enter(LinkState.OPEN)
            link.targets = opened.peers
            link.source.send(ConnectLink(targets=link.targets))
            link.source.wake()

    def on_link_closed(self, target: InstanceHandle, closed: LinkClosed) -> None:
        """The receiver confirms that nothing is written over a broken link any more: unpin its blocks."""
        for link in list(self._ending):
            if (link.source.id, link.target, link.epoch) == (closed.source_id, target, closed.link_epoch):
                self._end_receivers(link)

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
        if transfer is None:
            return ResultEffect()
        if (transfer.sender is Sender.ENDED) if result.sent else (transfer.receiver is Receiver.ENDED):
            return ResultEffect()
        link = transfer.link
        if result.sent:
            self._end_sender(transfer)
        if link.is_broken:
            self._proceed(link)
            return ResultEffect()
        if result.error is not None:
            self._stats(link).failures[result.error_kind or "backend"] += 1
            return ResultEffect(failed=self._break(link))
        if result.sent:
            self._count_sent(link, result)
            transfer.checksums = result.checksums
        if not result.sent or _is_one_sided(link):
            if transfer.receiver is Receiver.FINISHING or not (self._verify or _needs_merging(link)):
                self._end_receiver(transfer)
                return ResultEffect(arrived=transfer)
            if transfer.receiver is Receiver.RECEIVING:
                transfer.enter(Receiver.DELIVERED)
        if transfer.receiver is Receiver.DELIVERED and (transfer.checksums is not None or not self._verify):
            self._ask_to_finish(transfer)
        return ResultEffect()

    def on_instance_lost(self, instance: InstanceHandle) -> list[Transfer]:
        """An instance is lost, and its links with it; returns the transfers that have failed."""
        failed: list[Transfer] = []
        for link in (*self._links.values(), *self._ending):
            if instance not in (link.source, link.target):
                continue
            if link.transfers and not link.is_broken:
                self._stats(link).failures["lost"] += 1
            if instance is link.target:
                link.target_lost = True
                failed += self._break(link)
                self._end_receivers(link)
            else:
                link.source_lost = True
                failed += self._break(link)
                for transfer in list(link.transfers.values()):
                    if transfer.sender is not Sender.ENDED:
                        self._end_sender(transfer)
                self._proceed(link)
        return failed

    def _break(self, link: Link) -> list[Transfer]:
        """Break a link; returns its transfers that have not arrived, which have failed."""
        if link.is_broken:
            return []
        link.enter(LinkState.BREAKING)
        del self._links[link.source.id, link.target.id]
        self._ending.append(link)
        failed = [transfer for transfer in link.transfers.values() if transfer.receiver is not Receiver.ENDED]
        if not link.source_lost:
            for transfer in link.transfers.values():
                if transfer.sender is not Sender.ENDED:
                    link.source.send(CancelTransfer(transfer_id=transfer.transfer_id))
            link.source.send(DisconnectLink(targets=link.targets or link.addressed))
        self._proceed(link)
        return failed

    def _proceed(self, link: Link) -> None:
        """Continue the end of a broken link.

        Once no sender is active any more, the target must make sure that nothing comes later.
        """
        transfers = link.transfers.values()
        if link.state is LinkState.BREAKING and all(transfer.sender is Sender.ENDED for transfer in transfers):
            link.enter(LinkState.CLOSING)
            if not link.target_lost:
                link.target.send(
                    CloseLink(
                        source_id=link.source.id,
                        link_epoch=link.epoch,
                        sources=link.sources,
                        senders_done=not link.source_lost,
                    )
                )
        if link.state is LinkState.CLOSING and not transfers:
            link.enter(LinkState.ENDED)
            self._ending.remove(link)

    def _ask_to_finish(self, transfer: Transfer) -> None:
        transfer.enter(Receiver.FINISHING)
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

    # --- ends ------------------------------------------------------------------------------------

    def _end_sender(self, transfer: Transfer) -> None:
        transfer.end_sender()
        transfer.link.source.wake()
        self._forget_if_over(transfer)

    def _end_receiver(self, transfer: Transfer) -> None:
        transfer.enter(Receiver.ENDED)
        transfer.link.target.wake()
        self._forget_if_over(transfer)

    def _end_receivers(self, link: Link) -> None:
        """Nothing is written over a broken link any more."""
        for transfer in list(link.transfers.values()):
            if transfer.receiver is not Receiver.ENDED:
                self._end_receiver(transfer)
        self._proceed(link)

    def _forget_if_over(self, transfer: Transfer) -> None:
        if transfer.is_over:
            del self._open[transfer.transfer_id], transfer.link.transfers[transfer.transfer_id]

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


def _roles_need(source: InstanceRole, target: InstanceRole) -> bool:
    return source.prefills and not source.decodes and not target.prefills


def _is_needed(source: InstanceHandle, target: InstanceHandle) -> bool:
    """Whether roles need a link, or a request that was admitted under earlier ones."""
    if source is target:
        return False
    own = source.allocations | source.reserved
    elsewhere = (s.decode_allocation for s, a in own.items() if s.decode_allocation not in (None, a))
    return _roles_need(source.role, target.role) or any(a is not None and a.instance_id == target.id for a in elsewhere)
