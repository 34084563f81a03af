"""The built-in backends' shorter way: the sender writes straight into the receiver's arena."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hbserve.messages.transfer import Peer
from hbserve.pd_disagg.kv_transfer.base import KVTransferContext
from hbserve.platform.remote_arena import RemoteArena


class BlockRun(NamedTuple):
    """``length`` neighbouring blocks of the sender that become neighbouring blocks of the receiver."""

    source: int
    target: int
    length: int


def coalesce(source_ids: Sequence[int], target_ids: Sequence[int]) -> list[BlockRun]:
    """The fewest runs that move blocks ``source_ids[i]`` to ``target_ids[i]``: links are fast with large pieces."""
    runs: list[BlockRun] = []
    for source, target in sorted(zip(source_ids, target_ids, strict=True)):
        if runs:
            last = runs[-1]
            if source == last.source + last.length and target == last.target + last.length:
                runs[-1] = BlockRun(last.source, last.target, last.length + 1)
                continue
        runs.append(BlockRun(source, target, 1))
    return runs


@dataclass(frozen=True)
class ArenaSharing:
    """How arenas are opened to other processes of this host; see `hbserve.platform.Platform`.

    Attributes:
        handle: of this rank's KV arena; None: it cannot be opened.
        open_arena: from another's handle and its bytes to the right to write there.
    """

    handle: str | None
    open_arena: Callable[[str, int], RemoteArena]


class OneSidedKVTransfer(ABC):
    """Writes KV blocks into another instance's arena. One object per rank and epoch of an instance.

    The receiver opens an *inbox* for each link and each link epoch, which gives the sender the right
    to write. What makes it safe is the way an inbox ends: `close_inbox` returns when no write of that
    sender can arrive any more, whatever state the sender is in.

    Args:
        context: as for `KVTransferBase`.
        kv_blocks: this rank's arena as ``[block, byte]``, uint8.
    """

    writes_end: bool
    """Whether `write` always ends soon by itself. A sender then confirms a cancelled transfer only after
    its write has ended; else it does at once, and it is the receiver alone that stops the write."""

    def __init__(self, context: KVTransferContext, kv_blocks: torch.Tensor) -> None:
        self.context = context
        self.kv_blocks = kv_blocks

    @property
    def endpoint(self) -> str:
        """What receivers need to know of this rank as a sender."""
        return ""

    async def start(self) -> None:  # noqa: B027 - a backend without set-up need not override it
        """Get ready; called before anything else."""

    @abstractmethod
    async def open_inbox(self, source: Peer) -> str:
        """Let a sender write; what it needs to know, which comes back as ``endpoint`` in its `write`.

        Args:
            source: the sender, with the link's epoch.

        Raises:
            HBServeError: if the arena cannot be opened to others.
        """

    @abstractmethod
    async def close_inbox(self, source: Peer, sender_done: bool) -> None:
        """Return when no write of this sender on this link epoch can arrive any more.

        Args:
            sender_done: it has confirmed the end of all its writes.
        """

    @abstractmethod
    def write(self, target: Peer, runs: list[BlockRun]) -> None:
        """Write runs of blocks; return when the receiver has them all. Called in a thread, one per target.

        Raises:
            KVTransferError
        """

    async def stop(self) -> None:  # noqa: B027 - likewise
        """Close every inbox and let go of everything."""
