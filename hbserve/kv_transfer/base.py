"""Base class of transfer backends: the extension point for moving KV between instances.

A backend lives in a rank process of an instance. All its methods are called in the event loop of that process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from hbserve.messages.transfer import Peer


@dataclass(frozen=True)
class KVTransferContext:
    """Facts about the rank that a backend works for.

    Attributes:
        rank: number of the rank among all ranks of all instances.
        epoch: number of this incarnation of the instance.
        host: address to listen on and to announce.
        port: port to listen on, or None for any free one.
        device: where the buffers to send are, and where received buffers are wanted.
        timeout_s: time after which a transfer has failed.
        buffer_size: bytes that arrivals may take before they are asked for.
        host_is_given: whether ``host`` was configured for transfers (``kv_transfer.ip``).
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
    """Backend that moves KV blocks between instances. One object per rank and epoch of an instance.

    A backend need not know of tensor parallelism. ``rank`` below is one number for instance and rank, and HBServe has
    decided which part of which blocks goes from which rank to which.

    To write your own, implement the two abstract methods, and name the class in the configuration as
    ``kv_transfer.backend: package.module:Class``. Transfers run concurrently, so buffers may arrive in another order
    than they are asked for. A transfer fails if its method raises `KVTransferError` or is cancelled at its timeout; the
    scheduler then repeats the prefill.
    """

    def __init__(self, context: KVTransferContext) -> None:
        self.context = context
        self.peers: dict[int, Peer] = {}

    @property
    def endpoint(self) -> str:
        """Address of this rank for its peers; the scheduler passes it on to them."""
        return ""

    async def start(self) -> None:  # noqa: B027 - a backend without set-up need not override it
        """Get ready; called before all other methods."""

    def add_peer(self, peer: Peer) -> None:
        """Learn the current address and incarnation of the other side; called before each transfer."""
        self.peers[peer.rank] = peer

    @abstractmethod
    async def send_kv_cache(self, request_id: str, kv_buffer: torch.Tensor, target_rank: int) -> None:
        """Send a buffer; return when it may be overwritten.

        Args:
            request_id: name of the transfer: the request, its attempt, and its chunk or a group of its layers. Never
                used twice between the same two ranks.
            kv_buffer: uint8 ``[block, byte]``, contiguous, on ``context.device``.
            target_rank: the receiver's `Peer.rank`.

        Raises:
            KVTransferError: if the transfer fails.
        """

    @abstractmethod
    async def receive_kv_cache(self, request_id: str, source_rank: int) -> torch.Tensor:
        """Wait for the buffer that ``source_rank`` sends under ``request_id``.

        Returns:
            The same bytes, any shape, on ``context.device`` or the CPU.

        Raises:
            KVTransferError: if the transfer fails.
        """

    async def stop(self) -> None:  # noqa: B027 - likewise
        """Free everything; transfers in flight fail."""
