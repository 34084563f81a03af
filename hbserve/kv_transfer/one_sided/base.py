"""Base class of one-sided backends: the sender writes straight into the receiver's arena.

A backend lives in a rank process. Its coroutines run in the event loop. `OneSidedKVTransfer.write`, ``connect``,
``disconnect`` and ``make_staging`` run in the thread of the link's `SendQueue`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hbserve.kv_transfer.base import KVTransferContext
from hbserve.messages.transfer import Peer
from hbserve.platform.remote_arena import ByteRun, RemoteArena


@dataclass(frozen=True)
class ArenaSharing:
    """Access to arenas of other processes of this host; see `hbserve.platform.Platform`.

    Attributes:
        handle: handle of this rank's KV arena; None: other processes cannot open it.
        open_arena: from the handle of another arena and its bytes to an object that writes there.
    """

    handle: str | None
    open_arena: Callable[[str, int], RemoteArena]


class OneSidedKVTransfer(ABC):
    """Backend that writes KV blocks into another instance's arena. One object per rank and epoch of an instance.

    The receiver opens a *receive window* for each link and link epoch, which gives the senders of the link the right to
    write. The end of a window makes this safe: `close_receive_window` returns when no write of those senders can arrive
    any more, also if they hang or have died.

    Args:
        context: as for `KVTransferBase`.
        kv_blocks: this rank's arena as ``[block, byte]``, uint8.
    """

    writes_end_soon: bool
    """Whether `write` always ends soon by itself. If so, the sender of a cancelled transfer confirms after its write
    has ended. Else the sender confirms at once, and the receiver alone stops the write."""

    def __init__(self, context: KVTransferContext, kv_blocks: torch.Tensor) -> None:
        self.context = context
        self.kv_blocks = kv_blocks

    @property
    def endpoint(self) -> str:
        """Address of this rank as a sender, for receivers."""
        return ""

    async def start(self) -> None:  # noqa: B027 - a backend without set-up need not override it
        """Get ready; called before all other methods."""

    @abstractmethod
    async def open_receive_window(self, sources: list[Peer]) -> str:
        """Let a link's senders write here; return the endpoint that they find in the ``target`` of their `write`.

        Args:
            sources: the ranks that write here, with the link's epoch.

        Raises:
            HBServeError: if the arena cannot be opened to others.
        """

    @abstractmethod
    async def close_receive_window(self, sources: list[Peer], senders_done: bool) -> None:
        """Return when no write of these senders on this link epoch can arrive any more.

        Args:
            senders_done: whether the senders have confirmed that all their writes have ended.
        """

    def make_staging(self, target: Peer, num_bytes: int) -> torch.Tensor:
        """Make memory beside the arena, uint8, as a source for `write` to a target; may raise KVTransferError."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.kv_blocks.device)

    @abstractmethod
    def write(self, target: Peer, source: torch.Tensor, runs: list[ByteRun]) -> None:
        """Write runs of bytes; return when the receiver has them all.

        Args:
            source: the arena, or memory from `make_staging`; the target offsets of the runs lie in the receiver's
                arena.

        Raises:
            KVTransferError: if the write fails.
        """

    def connect(self, target: Peer) -> None:  # noqa: B027 - likewise
        """Get ready for the first `write`. What fails here, with an HBServeError, will fail in `write`, too."""

    def disconnect(self, target: Peer) -> None:  # noqa: B027 - likewise
        """Free what is kept for writing to a rank, on a link that has ended, after the last `write`. Called in the
        event loop if the link never had a queue."""

    async def stop(self) -> None:  # noqa: B027 - likewise
        """Close every window and free everything, after this side's writes have ended.

        Raises:
            HBServeError: if others may still write here, so that the arena must not be used again.
        """
