"""Sections of the configuration about KV: its transfer between instances, its pools, and the tiers beside them.

docs/configuration.md explains every key; the docstrings here keep what a reader of the code needs.
"""

from __future__ import annotations

from typing import Literal

from hbserve.config.fields import HostPort, NonNegativeInt, Port, PositiveInt, Seconds, Section


class KVTransferConfig(Section, frozen=True):
    """Transfer of KV blocks between instances.

    Attributes:
        backend: ``nccl`` is torch.distributed: NCCL between GPUs, gloo where one end has no GPU; ``mooncake`` writes
            into the receiver's arena; ``shm`` maps that arena (shared memory, CUDA IPC), on one host;
            ``package.module:Class`` is a subclass of `hbserve.kv_transfer.base.KVTransferBase`.
        buffer_size: bytes of staging memory per instance, shared evenly by its ranks; transfers wait when it is full.
        ip: address that instances announce for transfers; default: the instance's host.
        port: base port; rank t of the instance with KV rank r listens on port + r * s + t, where s is the largest
            number of ranks of an instance. Mooncake's engines choose from port to port + 999. Default: any free ports.
        timeout_s: a transfer that takes longer has failed.
        max_attempts: a request fails after so many attempts without progress.
        local_prefill_tokens: a decode instance computes a prompt itself if at most so many tokens are not cached there.
        layer_group_bytes: the last chunk of a prompt leaves in up to four groups of layers, each as soon as it is
            computed and of at least so many bytes; 0: as a whole.
        verify: compare checksums of every block before it is used; blocks that differ are computed again.
        mooncake_protocol, mooncake_device: transport and RDMA adapters (comma-separated) of Mooncake; default: from the
            file that ``MOONCAKE_CONFIG_PATH`` names, or the engine's own choice.
    """

    backend: str = "nccl"
    buffer_size: PositiveInt = 1 << 30
    ip: str | None = None
    port: Port | None = None
    timeout_s: Seconds = 30.0
    max_attempts: PositiveInt = 3
    local_prefill_tokens: NonNegativeInt = 0
    layer_group_bytes: NonNegativeInt = 4 << 20
    verify: bool = False
    mooncake_protocol: Literal["tcp", "rdma", "nvlink"] | None = None
    mooncake_device: str | None = None


class DiskTierConfig(Section, frozen=True):
    """Folder on each host for files of KV blocks, and the bytes that they take there for good."""

    path: str
    bytes: PositiveInt


class StoreTierConfig(Section, frozen=True):
    """Store of KV blocks that instances of many hosts and systems share.

    Attributes:
        backend: ``mooncake``, or ``package.module:Class``, a subclass of `hbserve.kv_tiers.base.KVTier`.
        bytes: memory of its host that ``hbserve store`` gives. A scheduler remembers at most so many bytes of blocks.
        master: ``host:port`` of the Mooncake master; a class of your own may read it, too.
    """

    bytes: PositiveInt
    backend: str = "mooncake"
    master: HostPort | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the master."""
        assert self.master is not None, "the configuration checks it"
        host, _, port = self.master.rpartition(":")
        return host.strip("[]"), int(port)


class KVCacheConfig(Section, frozen=True):
    """KV in its pools, and in tiers: where blocks are kept beside the devices' memory.

    Attributes:
        dtype: ``fp8`` takes half the bytes of bfloat16 in pools, tiers and transfers; ``auto``: the model's dtype.
        host_bytes: memory of each host for them, shared by its instances; 0: none.
        disk: folder for files of blocks, which survive a restart; None: none.
        store: blocks that many hosts share; None: none.
        timeout_s: a copy to or from a tier that takes longer has failed; its blocks are computed.
    """

    dtype: Literal["auto", "fp8"] = "auto"
    host_bytes: NonNegativeInt = 0
    disk: DiskTierConfig | None = None
    store: StoreTierConfig | None = None
    timeout_s: Seconds = 5.0
