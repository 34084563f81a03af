"""The contents of KV blocks by their hashes: of prefixes, and of blocks that steps are about to fill.

Pure. Runs in the scheduler's process.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b


class PlannedBlocks:
    """Blocks that steps on their way to workers fill, by their contents. At most one block has the same contents."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._contents_of: dict[int, bytes] = {}

    def __contains__(self, contents: bytes) -> bool:
        return contents in self._block_of

    def __getitem__(self, contents: bytes) -> int:
        return self._block_of[contents]

    def add(self, block: int, contents: bytes) -> None:
        """Note that a step fills a block with these contents, unless one fills another block with them."""
        if contents not in self._block_of:
            self._block_of[contents] = block
            self._contents_of[block] = contents

    def forget(self, block: int) -> None:
        """Forget a block, because it is sealed or free."""
        contents = self._contents_of.pop(block, None)
        if contents is not None:
            del self._block_of[contents]

    def clear(self) -> None:
        """Forget all blocks."""
        self._block_of.clear()
        self._contents_of.clear()

    def blocks(self) -> Iterable[int]:
        """Return the blocks, and assert that both indices agree."""
        assert self._contents_of == {block: contents for contents, block in self._block_of.items()}
        return self._contents_of.keys()


def extend_block_hashes(
    hashes: list[bytes], token_ids: Sequence[int], block_size: int, salt: str | None = None
) -> None:
    """Append to ``hashes`` the hashes of the full blocks of ``token_ids`` that it lacks.

    A block's hash covers its tokens and, through the hash of the block before it, all tokens before them, because KV
    depends on the whole prefix. A collision would serve the KV of another prompt. With 128 bits of BLAKE2b it does not
    happen, and cannot be made to happen on purpose. Two prompts with different ``salt`` have no hash in common.
    """
    num_known, num_blocks = len(hashes), len(token_ids) // block_size
    if num_known >= num_blocks:
        return
    tokens = array("i", token_ids[num_known * block_size : num_blocks * block_size])
    data, block_bytes = tokens.tobytes(), block_size * tokens.itemsize
    parent = hashes[-1] if hashes else _salt_hash(salt)
    for begin in range(0, len(data), block_bytes):
        parent = blake2b(parent + data[begin : begin + block_bytes], digest_size=16).digest()
        hashes.append(parent)


def _salt_hash(salt: str | None) -> bytes:
    """Return what precedes the first block: nothing, or a hash that no tokens can have, whatever the salt."""
    return b"" if salt is None else blake2b(salt.encode(), digest_size=16, person=b"cache_salt").digest()
