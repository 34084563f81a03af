"""The extension point for moving KV between instances."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from hbserve.messages.transfer import Peer


@dataclass(frozen=True)
class KVTransferContext:
    """What a backend knows about the rank it works for.

    Attributes:
        rank: its number among all ranks of all instances.
        epoch: number of this incarnation of the instance.
        host: address to listen on and to announce.
        port: port to listen on, or None for any free one.
        device: where the buffers to send are and the received ones shall be.
        timeout_s: a transfer that takes longer has failed.
        buffer_size: bytes that arrivals nobody has asked for yet may take.
        host_is_given: ``host`` was named for transfers (``kv_transfer.ip``).
        mooncake_protocol, mooncake_device: as in the configuration.
    """

    rank: int
    epoch: int
    host: str
    port: int | None
    device: torch.device
    timeout_s: float
    buffer_size: int
    host_is_given: bool = False
    mooncake_protocol: str | None = None
    mooncake_device: str | None = None


class KVTransferBase(ABC):
    """Moves KV blocks between instances. One object per rank of an instance, used from one event loop.

    A backend need not know of tensor parallelism: ``rank`` below is one number for instance and rank,
    and which part of which blocks goes from which rank to which has been decided before.

    A backend of your own needs the two abstract methods; name it in the configuration as
    ``kv_transfer.backend: package.module:Class``. Transfers run concurrently, so arrivals may come
    in another order than they are asked for. A method that raises `KVTransferError`, or is
    cancelled at its timeout, has failed: the scheduler then has the prefill done again.
    """

    def __init__(self, context: KVTransferContext) -> None:
        self.context = context
        self.peers: dict[int, Peer] = {}

    @property
    def endpoint(self) -> str:
        """What peers need to know to reach this instance; passed on to them by the scheduler."""
        return ""

    async def start(self) -> None:  # noqa: B027 - a backend without set-up need not override it
        """Get ready; called before anything else."""

    def add_peer(self, peer: Peer) -> None:
        """Called before each transfer with the other side's current address and incarnation."""
        self.peers[peer.rank] = peer

    @abstractmethod
    async def send_kv_cache(self, request_id: str, kv_buffer: torch.Tensor, target_rank: int) -> None:
        """Send a buffer; return when it may be overwritten.

        Args:
            request_id: names the transfer: the request, its attempt, and its chunk or a group of its layers.
                Never used twice between the same two ranks.
            kv_buffer: uint8 ``[block, byte]``, contiguous, on ``context.device``.
            target_rank: the receiver's `Peer.rank`.

        Raises:
            KVTransferError
        """

    @abstractmethod
    async def receive_kv_cache(self, request_id: str, source_rank: int) -> torch.Tensor:
        """Wait for the buffer that ``source_rank`` sends under ``request_id``.

        Returns:
            The same bytes, any shape, on ``context.device`` or the CPU.

        Raises:
            KVTransferError
        """

    async def stop(self) -> None:  # noqa: B027 - likewise
        """Let go of everything; transfers in flight fail."""
