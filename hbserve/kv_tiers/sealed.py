"""Values of tiers that keep blocks by name: the block's bytes, then a seal of its name and its checksum.

::

    block (block_bytes) | digest of the name (24) | checksum (8)

The tier may be wrong in any way, and other systems write to it. The seal shows that a value is the one that was stored
under this name; the checksum in it is compared with that of the bytes on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch

from hbserve.kv_tiers.base import BlockName

_DIGEST_BYTES = 24
SEAL_BYTES = _DIGEST_BYTES + 8


def seal(values: torch.Tensor, names: Sequence[BlockName]) -> None:
    """Write the seals into values, uint8 ``[block, block_bytes + SEAL_BYTES]``; names have their checksums."""
    for row, name in zip(values[:, -SEAL_BYTES:], names, strict=True):
        data = _digest(name) + name.checksum.to_bytes(8, "little", signed=True)
        row.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def checksums(values: torch.Tensor, names: Sequence[BlockName]) -> list[int | None]:
    """Read the checksums that the blocks must have; None: the value is another block's, or none."""
    found: list[int | None] = []
    for row, name in zip(values[:, -SEAL_BYTES:], names, strict=True):
        data = row.numpy().tobytes()
        is_right = data[:_DIGEST_BYTES] == _digest(name)
        found.append(int.from_bytes(data[_DIGEST_BYTES:], "little", signed=True) if is_right else None)
    return found


def _digest(name: BlockName) -> bytes:
    return blake2b(name.text.encode(), digest_size=_DIGEST_BYTES).digest()
