"""Names for the contents of full KV blocks."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b


def extend_block_hashes(hashes: list[bytes], token_ids: Sequence[int], block_size: int) -> None:
    """Append to ``hashes`` those of the full blocks of ``token_ids`` that it lacks.

    The hash of a block covers its tokens and, through its predecessor's hash, all tokens before
    it: KV depends on the whole prefix. 128 bits of BLAKE2b make a collision, which would serve
    another prompt's KV, a thing that does not happen even on purpose.
    """
    for index in range(len(hashes), len(token_ids) // block_size):
        block = array("i", token_ids[index * block_size : (index + 1) * block_size])
        parent = hashes[index - 1] if index else b""
        hashes.append(blake2b(parent + block.tobytes(), digest_size=16).digest())
