"""The built-in backends' shorter way: the sender writes straight into the receiver's arena."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from hbserve.kv_transfer.base import KVTransferContext
from hbserve.messages.transfer import Peer
from hbserve.platform.remote_arena import ByteRun, RemoteArena


def coalesce(pieces: Iterable[tuple[int, int]], num_bytes: int) -> list[ByteRun]:
    """The fewest runs that move ``num_bytes`` from each offset here to that there: links are fast with large pieces.

    Args:
        pieces: offsets here and there.
    """
    runs: list[ByteRun] = []
    for here, there in sorted(pieces):
        if runs:
            first_here, first_there, length = runs[-1]
            if here == first_here + length and there == first_there + length:
                runs[-1] = (first_here, first_there, length + num_bytes)
                continue
        runs.append((here, there, num_bytes))
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

    The receiver opens an *inbox* for each link and each link epoch, which gives the senders the right
    to write. What makes it safe is the way an inbox ends: `close_receive_window` returns when no write of those
    senders can arrive any more, whatever state they are in.

    Args:
        context: as for `KVTransferBase`.
        kv_blocks: this rank's arena as ``[block, byte]``, uint8.
    """

    writes_end_soon: bool
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
    async def open_receive_window(self, sources: list[Peer]) -> str:
        """Let a link's senders write; what they need to know, which comes back as ``endpoint`` in their `write`.

        Args:
            sources: the ranks that write here, with the link's epoch.

        Raises:
            HBServeError: if the arena cannot be opened to others.
        """

    @abstractmethod
    async def close_receive_window(self, sources: list[Peer], senders_done: bool) -> None:
        """Return when no write of these senders on this link epoch can arrive any more.

        Args:
            senders_done: they have confirmed the end of all their writes.
        """

    def make_staging(self, target: Peer, num_bytes: int) -> torch.Tensor:
        """Memory beside the arena, uint8, that `write` to a target takes as a source. Called in its thread.

        Raises:
            KVTransferError
        """
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.kv_blocks.device)

    @abstractmethod
    def write(self, target: Peer, source: torch.Tensor, runs: list[ByteRun]) -> None:
        """Write runs of bytes; return when the receiver has them all. Called in a thread, one per target.

        Args:
            source: the arena, or from `make_staging`; the runs' offsets there are in the receiver's arena.

        Raises:
            KVTransferError
        """

    def connect(self, target: Peer) -> None:  # noqa: B027 - likewise
        """Get ready for the first `write`. Called in its thread; what fails here will fail there once more.

        Raises:
            HBServeError
        """

    def disconnect(self, target: Peer) -> None:  # noqa: B027 - likewise
        """Let go of what is there for writing to a rank on a link that has ended, after the last `write`. Called in the
        thread of `write`; where that was never called, in the event loop's."""

    async def stop(self) -> None:  # noqa: B027 - likewise
        """Close every inbox and let go of everything, when this side's writes have ended.

        Raises:
            HBServeError: if others may still write here, so that the arena must not be used again.
        """
