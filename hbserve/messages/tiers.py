"""Messages about KV tiers between the scheduler and workers: blocks of KV outside the device's memory.

The scheduler knows what each tier holds (`hbserve.kv_cache.tier_directory`) and decides what is stored and loaded. The
worker copies (`hbserve.kv_tiers`). The blocks that a message names stay pinned in the pool until its `TierResult`, so
nothing else writes them meanwhile. A message of another epoch is dropped: the epoch's end has ended its jobs.
"""

from __future__ import annotations

import msgspec

from hbserve.messages.base import Message, Value


class HostMemory(Value, frozen=True):
    """Shared memory of a host that holds KV blocks.

    Attributes:
        name: identifies the memory among all memories of all hosts.
        handle: path at which processes of this host map it.
    """

    name: str
    handle: str
    num_bytes: int


class StoredBlock(Value, frozen=True):
    """A block that a tier holds since before the worker started. ``checksums``: by rank."""

    key: bytes
    slot: int
    checksums: list[int]


class TierInfo(Value, frozen=True):
    """A tier that a worker can use.

    Attributes:
        name: ``host``, ``disk`` or ``store``.
        memory: identifies what the tier's slots are in; workers that name the same one share its blocks.
        num_slots: blocks that fit.
        is_own: the memory is the worker's own and ends with it.
        by_name: the tier may hold blocks that no scheduler has told it to store, and `FindBlocks` finds them.
        kept: blocks that it held when the worker started, the least recently used first.
    """

    name: str
    memory: str
    num_slots: int
    is_own: bool = False
    by_name: bool = False
    kept: list[StoredBlock] = msgspec.field(default_factory=list)


# --- scheduler -> worker --------------------------------------------------------------------------


class StoreBlocks(Message, frozen=True):
    """Copy blocks of the pool, whose contents are final, into slots of a tier; answered by `TierResult`.

    Attributes:
        keys: prefix hashes of the contents, by block.
    """

    epoch: int
    job_id: int
    tier: str
    keys: list[bytes]
    slots: list[int]
    block_ids: list[int]


class LoadBlocks(Message, frozen=True):
    """Copy slots of a tier into blocks of the pool, and compare checksums; answered by `TierResult`.

    Attributes:
        checksums: by block, then by rank, as `TierResult` named them when the blocks were stored; empty for a block
            that the tier was found to have: it has them itself.
    """

    epoch: int
    job_id: int
    tier: str
    keys: list[bytes]
    slots: list[int]
    block_ids: list[int]
    checksums: list[list[int]]


class FindBlocks(Message, frozen=True):
    """Say how many of these blocks, from the first on, a tier has of all ranks; answered by `FoundBlocks`."""

    epoch: int
    lookup_id: int
    tier: str
    keys: list[bytes]


# --- worker -> scheduler --------------------------------------------------------------------------


class TierResult(Message, frozen=True):
    """The end of a job: the worker touches neither its blocks nor its slots any more.

    Attributes:
        failures: what is wrong with a block, by its place in the job: ``checksum``, ``timeout``, ``missing``,
            ``full`` or ``backend``.
        error: the first failure in words.
        checksums: of stored blocks: by block, then by rank.
        seconds: the job took, without waiting for other jobs.
    """

    epoch: int
    job_id: int
    failures: dict[int, str]
    error: str | None
    checksums: list[list[int]]
    num_bytes: int
    seconds: float


class FoundBlocks(Message, frozen=True):
    """Answer to `FindBlocks`. ``error``: what went wrong, in words."""

    epoch: int
    lookup_id: int
    num_found: int
    error: str | None = None


TierCommand = StoreBlocks | LoadBlocks
