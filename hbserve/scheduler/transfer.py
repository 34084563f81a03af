"""The records of a KV transfer and of the link that it goes over, with their states.

The states of a link, of the sender's side of a transfer, and of the receiver's side::

    link      opening ──► open ──► breaking ──► closing ──► ended
                 └───────────────────►┘
    sender    sending ──► ended
    receiver  receiving ──► delivered ──► finishing ──► ended
                  └────────────┴──────────────────────────►┘

- *breaking*: senders may still be active. *closing*: none is; the receiver makes sure that nothing comes later.
- *delivered*: all bytes are there. *finishing*: the receiver merges heads, or compares checksums with the sender's.

`TRANSITIONS` holds the same as a table. A side's blocks are pinned until it has ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from hbserve.messages.transfer import LayerGroup, Peer
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.sequence import KVAllocation, Sequence


class LinkState(Enum):
    """State of a link; transfers start only while it is open."""

    OPENING = "opening"
    OPEN = "open"
    BREAKING = "breaking"
    CLOSING = "closing"
    ENDED = "ended"


class Sender(Enum):
    """State of a transfer at its sender."""

    SENDING = "sending"
    ENDED = "ended"


class Receiver(Enum):
    """State of a transfer at its receiver."""

    RECEIVING = "receiving"
    DELIVERED = "delivered"
    FINISHING = "finishing"
    ENDED = "ended"


State = LinkState | Sender | Receiver
TRANSITIONS: dict[State, frozenset[State]] = {
    LinkState.OPENING: frozenset({LinkState.OPEN, LinkState.BREAKING}),
    LinkState.OPEN: frozenset({LinkState.BREAKING}),
    LinkState.BREAKING: frozenset({LinkState.CLOSING}),
    LinkState.CLOSING: frozenset({LinkState.ENDED}),
    LinkState.ENDED: frozenset(),
    Sender.SENDING: frozenset({Sender.ENDED}),
    Sender.ENDED: frozenset(),
    Receiver.RECEIVING: frozenset({Receiver.DELIVERED, Receiver.ENDED}),
    Receiver.DELIVERED: frozenset({Receiver.FINISHING, Receiver.ENDED}),
    Receiver.FINISHING: frozenset({Receiver.ENDED}),
    Receiver.ENDED: frozenset(),
}
"""Every legal transition."""


@dataclass(slots=True, eq=False)
class Link:
    """The link from one instance to another, from its opening to its end. It fails as a whole and is never repaired.

    Attributes:
        epoch: tells it from earlier and later links between the same two instances.
        addressed: the target's ranks, as they name the link while they open it.
        targets: the same with their endpoints; empty until the link is open.
        transfers: transfers of which at least one side has not ended.
        source_lost, target_lost: there is no sender, or no receiver, to tell anything.
    """

    source: InstanceHandle
    target: InstanceHandle
    epoch: int
    sources: list[Peer]
    addressed: list[Peer]
    targets: list[Peer] = field(default_factory=list)
    transfers: dict[str, Transfer] = field(default_factory=dict)
    state: LinkState = LinkState.OPENING
    source_lost: bool = False
    target_lost: bool = False

    def enter(self, state: LinkState) -> None:
        """Change the state; an illegal transition is a bug."""
        assert state in TRANSITIONS[self.state], f"link {self.source.id} to {self.target.id}: {self.state} -> {state}"
        self.state = state

    @property
    def is_broken(self) -> bool:
        """Whether no transfer can arrive over it any more."""
        return self.state is not LinkState.OPENING and self.state is not LinkState.OPEN


@dataclass(slots=True, eq=False)
class Transfer:
    """The transfer of one chunk's blocks, with all their layers or a group of them; it pins the blocks of both sides.

    Attributes:
        checksums: of the sender, if they are compared and have come.
    """

    transfer_id: str
    sequence: Sequence
    attempt: int
    source: KVAllocation
    target: KVAllocation
    target_blocks: list[int]
    layers: LayerGroup
    link: Link
    sender: Sender = Sender.SENDING
    receiver: Receiver = Receiver.RECEIVING
    checksums: list[list[int]] | None = None

    def __post_init__(self) -> None:
        self.source.begin_transfer()
        self.target.begin_transfer()

    def end_sender(self) -> None:
        """The sender can touch the blocks no more."""
        assert Sender.ENDED in TRANSITIONS[self.sender], f"the sender of {self.transfer_id} ends twice"
        self.sender = Sender.ENDED
        self.source.end_transfer()

    def enter(self, receiver: Receiver) -> None:
        """Change the receiver's state; once it has ended it can touch the blocks no more."""
        assert receiver in TRANSITIONS[self.receiver], f"{self.transfer_id}: {self.receiver} -> {receiver}"
        self.receiver = receiver
        if receiver is Receiver.ENDED:
            self.target.end_transfer()

    @property
    def is_over(self) -> bool:
        """Whether both sides have ended."""
        return self.sender is Sender.ENDED and self.receiver is Receiver.ENDED
