"""The seam of KV tiers: `KVTier`, the base class of every memory that keeps KV blocks beside the devices'.

A tier lives in a rank process of an instance. ``put`` and ``get`` are called in the threads of two lanes
(`hbserve.kv_tiers.lane`), ``contains`` in a third thread; so they may wait, and up to three of them run at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch

from hbserve.config import StoreTierConfig

_FORMAT = 4
"""Raised when blocks of the same facts get other bytes: a tier may keep those of an earlier version."""


def namespace(*facts: object) -> str:
    """Return a name that is equal only for workers whose blocks have the same bytes: model, dtypes, shapes, ranks."""
    return blake2b(repr((_FORMAT, *facts)).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class BlockName:
    """One rank's part of a block, as tiers know it.

    Attributes:
        text: unique among the blocks of all systems: model, quantization, dtype, shapes, ranks, prefix and cache salt.
        key: the prefix hash, which is all but the first part of ``text``.
        slot: the place that the scheduler has chosen; only for tiers with ``has_slots``.
        checksum: of its bytes, for ``put``.
    """

    text: str
    key: bytes = b""
    slot: int = -1
    checksum: int = 0


@dataclass(frozen=True)
class KVTierContext:
    """Facts about the rank that a tier works for.

    Attributes:
        config: ``kv_cache.store``.
        value_bytes: bytes of one value: a rank's part of a block, and what `hbserve.kv_tiers.sealed` adds.
        timeout_s: time after which a call has failed.
    """

    config: StoreTierConfig
    value_bytes: int
    timeout_s: float


class KVTier(ABC):
    """Memory for KV blocks, by name. One object for each rank.

    To write your own, implement the four abstract methods, and name the class in the configuration as
    ``kv_cache.store: {backend: package.module:Class, bytes: ...}``. It is made with a `KVTierContext` in each rank.

    HBServe trusts no tier: it compares name and checksum of every block that ``get`` returns, and computes what does
    not fit. A method that raises has failed, and so has a call that takes longer than ``kv_cache.timeout_s``; the tier
    then rests. A tier may forget blocks at any time.

    Attributes:
        has_slots: the scheduler chooses where a block lies, and knows all that the tier holds. The tier gets blocks as
            they are on the device, and ``contains`` and ``remove`` are not called. Else it gets values in the host's
            memory.
        gathers: it can put blocks from where they lie in the host's memory, see `put_gathered`.
        may_hang: ``put`` and ``get`` may take any time. Then a job that is late is given up between two calls, and what
            such a call returns later is not used.
    """

    has_slots = False
    gathers = False
    may_hang = True

    def register(self, values: torch.Tensor) -> None:  # noqa: B027 - only tiers that register memory need it
        """Prepare for a buffer of which later calls get rows; called once by each lane, in its thread."""

    @abstractmethod
    def put(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        """Keep values; return when they may be overwritten.

        Args:
            values: uint8 ``[block, byte]``, contiguous.

        Returns:
            What went wrong, by place in ``names``: ``full`` (there is no room now) or ``backend`` (an error; the tier
            then rests). A value that is there already is a success.
        """

    def put_gathered(
        self, names: Sequence[BlockName], blocks: Sequence[torch.Tensor], seals: torch.Tensor
    ) -> dict[int, str]:
        """Keep values that lie in two places each, as `put`; called instead of it if the tier ``gathers``.

        A job that is given up meanwhile leaves its blocks to others. The value then has a wrong checksum.

        Args:
            blocks: the beginnings of the values, uint8 ``[byte]``: parts of a buffer that was registered.
            seals: their ends, uint8 ``[block, byte]``, contiguous, registered too.
        """
        raise NotImplementedError

    @abstractmethod
    def get(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        """Read values into the rows of a tensor.

        Returns:
            What went wrong, by place in ``names``: ``missing`` or ``backend``.
        """

    @abstractmethod
    def contains(self, names: Sequence[BlockName]) -> list[bool]:
        """Say which blocks are there, also those of other systems and of earlier ones."""

    @abstractmethod
    def remove(self, names: Sequence[BlockName]) -> None:
        """Forget blocks, because their values are wrong."""


class SlotTier(KVTier):
    """A tier of which the scheduler knows all that it holds: it finds a block by its slot."""

    has_slots = True

    def contains(self, names: Sequence[BlockName]) -> list[bool]:
        """Nothing that the scheduler does not know of."""
        return [False] * len(names)

    def remove(self, names: Sequence[BlockName]) -> None:
        """Nothing to do: the scheduler gives the slot to another block."""
