"""Messages about KV transfers between the scheduler and both ends: links and blocks.

The bytes go from sender to receiver by another channel; `hbserve.kv_transfer` numbers the steps of a transfer.
"""

from __future__ import annotations

from hbserve.messages.base import Message, Value

LinkKey = tuple[int, int, int]
"""A link, as one of its two ranks identifies it: rank and epoch of the other end, and the link's epoch."""


class Peer(Value, frozen=True):
    """Address of one rank of an instance for KV transfers.

    Attributes:
        rank: number of the rank among all ranks of all instances.
        epoch: the instance's incarnation.
        endpoint: address in the form of the transfer backend.
        link_epoch: raised by the scheduler when the link between the two ends has broken; both ends then start it anew.
    """

    rank: int
    epoch: int
    endpoint: str
    link_epoch: int = 0

    @property
    def link_key(self) -> LinkKey:
        """The link between this peer and the rank that got this message."""
        return self.rank, self.epoch, self.link_epoch


class LayerGroup(Value, frozen=True):
    """One of ``count`` equal groups of neighbouring layers."""

    index: int
    count: int


ALL_LAYERS = LayerGroup(index=0, count=1)


# --- scheduler -> worker --------------------------------------------------------------------------


class OpenLink(Message, frozen=True):
    """Get ready to receive from another instance's ranks, under a link epoch. To the receiver; answered by
    `LinkOpened`."""

    source_id: str
    link_epoch: int
    sources: list[Peer]


class CloseLink(Message, frozen=True):
    """Stop all writes of a link that has failed or lost its sender. To the receiver; answered by `LinkClosed`.

    Attributes:
        senders_done: whether every sender has answered, so that none of them starts a write any more. False if the
            sender's instance is lost and may still write.
    """

    source_id: str
    link_epoch: int
    sources: list[Peer]
    senders_done: bool


class ConnectLink(Message, frozen=True):
    """Get ready to send to these ranks on a link that is open, so that the first request need not wait. To the sender;
    not answered."""

    targets: list[Peer]


class DisconnectLink(Message, frozen=True):
    """Free what is kept for a link to these ranks, because it has ended. To the sender; not answered."""

    targets: list[Peer]


class SendBlocks(Message, frozen=True):
    """Send KV blocks after the step of this plan. ``transfer_id`` pairs the message with `ReceiveBlocks`.

    Attributes:
        targets: the receiver's ranks; `hbserve.kv_transfer.head_split` says which rank sends what to which.
        generations: generations of the blocks in the sender's pool; a stale one is refused.
        target_block_ids: where the blocks go in the receiver's pool.
        layers: the layers to send of each block; if not all, they leave as soon as the step has stored them.
        checksum: whether the answer must hold the blocks' checksums.
    """

    transfer_id: str
    request_id: str
    targets: list[Peer]
    block_ids: list[int]
    generations: list[int]
    target_block_ids: list[int]
    layers: LayerGroup = ALL_LAYERS
    checksum: bool = False


class ReceiveBlocks(Message, frozen=True):
    """Receive KV blocks into these blocks of the receiver's pool, in the sender's order."""

    transfer_id: str
    request_id: str
    sources: list[Peer]
    block_ids: list[int]
    generations: list[int]
    layers: LayerGroup = ALL_LAYERS


class FinishBlocks(Message, frozen=True):
    """Make blocks usable that have arrived; answered by the receiver's `TransferResult`.

    If a one-sided sender has more ranks, the receiver puts their heads into their places. Then it compares the blocks
    with what was sent.

    Attributes:
        num_sources: ranks of the sender.
        checksums: by rank of the sender, as in `TransferResult`; None: do not compare.
    """

    transfer_id: str
    num_sources: int
    block_ids: list[int]
    generations: list[int]
    checksums: list[list[int]] | None
    layers: LayerGroup = ALL_LAYERS


class CancelTransfer(Message, frozen=True):
    """Give up on a transfer. It is still answered by `TransferResult`; only `CloseLink` stops all writes."""

    transfer_id: str


# --- worker -> scheduler --------------------------------------------------------------------------


class LinkOpened(Message, frozen=True):
    """A link is ready for transfers.

    Attributes:
        peers: the receiver's ranks with their endpoints for this link, in their order.
        error: why the link is not ready; the instance then exits.
    """

    epoch: int
    source_id: str
    link_epoch: int
    peers: list[Peer]
    error: str | None = None


class LinkClosed(Message, frozen=True):
    """Nothing that was sent on the link is written after this."""

    epoch: int
    source_id: str
    link_epoch: int


class TransferResult(Message, frozen=True):
    """The end of one side of a transfer.

    Attributes:
        sent: True from the sender, False from the receiver.
        seconds: time to the end since the blocks were ready (sender) or asked for (receiver), without ``queued_s``.
        queued_s: time spent waiting for other transfers on the link.
        error: None if every byte has arrived.
        error_kind: ``timeout``, ``stale``, ``checksum``, ``cancelled``, or ``backend``.
        checksums: if they were asked for, by rank of the sender: one for each block, for each part that its blocks are
            cut into (one part, unless the receiver has more ranks).
    """

    epoch: int
    transfer_id: str
    sent: bool
    num_bytes: int
    seconds: float
    queued_s: float = 0.0
    error: str | None = None
    error_kind: str | None = None
    checksums: list[list[int]] | None = None


TransferCommand = OpenLink | CloseLink | ConnectLink | DisconnectLink | ReceiveBlocks | FinishBlocks | CancelTransfer
TransferReply = LinkOpened | LinkClosed | TransferResult
