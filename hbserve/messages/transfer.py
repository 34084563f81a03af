"""KV transfers: links and blocks, as the scheduler tells both ends of them. The bytes go elsewhere."""

from __future__ import annotations

from hbserve.messages.base import Message, Value

LinkKey = tuple[int, int, int]
"""A link, as one of its two ranks identifies it: rank and epoch of the other, and the link's epoch."""


class Peer(Value, frozen=True):
    """Where one rank of an instance receives KV.

    Attributes:
        rank: its number among all ranks of all instances.
        epoch: the instance's incarnation.
        endpoint: its backend's own address.
        link_epoch: raised by the scheduler when the link between the two has broken; both ends
            then start it afresh.
    """

    rank: int
    epoch: int
    endpoint: str
    link_epoch: int = 0

    @property
    def link_key(self) -> LinkKey:
        """The link between this rank and the one that has been told of it."""
        return self.rank, self.epoch, self.link_epoch


class LayerGroup(Value, frozen=True):
    """One of ``count`` equal groups of neighbouring layers."""

    index: int
    count: int


ALL_LAYERS = LayerGroup(index=0, count=1)


# --- scheduler -> worker --------------------------------------------------------------------------


class OpenLink(Message, frozen=True):
    """Be ready to receive from another instance, under a link epoch; answered by `LinkOpened`.

    Attributes:
        sources: the other instance's ranks.
    """

    source_id: str
    link_epoch: int
    sources: list[Peer]


class CloseLink(Message, frozen=True):
    """A link has failed or its sender is lost: see to it that nothing of it is written any more, then say `LinkClosed`.

    Attributes:
        senders_done: every sender on it has answered, so that none of them writes any more of its
            own will; False where the sender's instance is lost and may still be at it.
    """

    source_id: str
    link_epoch: int
    sources: list[Peer]
    senders_done: bool


class ConnectLink(Message, frozen=True):
    """To the sender of a link: it is open; get ready, so that the first request does not wait for that. Not answered.

    Attributes:
        targets: the other instance's ranks, as in `SendBlocks`.
    """

    targets: list[Peer]


class DisconnectLink(Message, frozen=True):
    """To the sender of a link: nothing goes over it any more; let go of what is there for it. Not answered.

    Attributes:
        targets: the other instance's ranks, named as in `SendBlocks`.
    """

    targets: list[Peer]


class SendBlocks(Message, frozen=True):
    """Send KV blocks after the step they come with. ``transfer_id`` pairs it with `ReceiveBlocks`.

    Attributes:
        targets: the receiver's ranks; which rank sends what to which, see `kv_transfer.head_split`.
        generations: of the blocks, on the sender's side; a stale one is refused.
        target_block_ids: where they go, in the receiver's pool.
        layers: what is sent of each block; of fewer than all, as soon as the step has stored them.
        checksum: whether the answer shall hold the blocks' checksums.
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
    """Make blocks that have arrived usable; answered by the receiver's `TransferResult`.

    Where the sender has written by itself and has more ranks, their heads are put into their places.
    Then the blocks are compared with what was sent.

    Attributes:
        num_sources: ranks of the sender.
        checksums: by rank of the sender, as in `TransferResult`; None: they are not compared.
    """

    transfer_id: str
    num_sources: int
    block_ids: list[int]
    generations: list[int]
    checksums: list[list[int]] | None
    layers: LayerGroup = ALL_LAYERS


class CancelTransfer(Message, frozen=True):
    """Give up on a transfer. It is still answered by `TransferResult`; see `CloseLink` for when nothing is written."""

    transfer_id: str


# --- worker -> scheduler --------------------------------------------------------------------------


class LinkOpened(Message, frozen=True):
    """A link is ready for transfers.

    Attributes:
        peers: where the ranks receive what comes on it, in their order.
        error: why it is not; the instance then exits.
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
        seconds: from when the blocks were ready (sender) or asked for (receiver) to the end, less ``queued_s``.
        queued_s: time that went to other transfers on the link.
        error: None if every byte is there.
        error_kind: ``timeout``, ``stale``, ``checksum``, ``cancelled``, or ``backend``.
        checksums: if they were asked for, by rank of the sender: for each part that its blocks are cut
            into (one, unless the receiver has more ranks), one for each block.
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
