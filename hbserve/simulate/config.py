"""The configuration of a simulated system, as its scheduler gets it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from hbserve.config import (
    ChunkedPrefillConfig,
    Config,
    InstanceConfig,
    InstanceRole,
    ModelConfig,
    PerformanceConfig,
    RpcConfig,
    SchedulerConfig,
    SemiPDConfig,
)

BLOCK_SIZE = 64
"""Tokens per KV block."""
_DEFAULT_ORDER = SchedulerConfig()
_NO_LIMIT = 1 << 30
_HEARTBEAT_S = 10.0  # no worker is lost; each heartbeat costs a message of every worker


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Limits of one instance. The defaults are the engine's, and the KV that an 8B model leaves room for on an H200.

    Attributes:
        kv_tokens: tokens that its KV pool holds.
        host_tokens: tokens that a tier in the host's memory holds for all instances; 0: there is none.
        acceptance: how often a token that is guessed is right; None: nothing guesses.
        scheduler: order of its queue.
        placement: choice of the instance for a request, see `PerformanceConfig`.
    """

    chunk_size: int | None = None
    max_chunk_prefill_tokens: int | None = None
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    kv_tokens: int = 800_000
    host_tokens: int = 0
    acceptance: float | None = None
    scheduler: SchedulerConfig = _DEFAULT_ORDER
    placement: Literal["least_loaded", "fcfs", "prefix_aware"] = "least_loaded"

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV pool."""
        return -(-self.kv_tokens // BLOCK_SIZE)

    @property
    def num_host_blocks(self) -> int:
        """Blocks of the tier in the host's memory."""
        return -(-self.host_tokens // BLOCK_SIZE)


def make_config(
    roles: Iterable[InstanceRole],
    sizes: Sizes,
    semi_pd: SemiPDConfig | None = None,
    shares_prefixes: bool = True,
) -> Config:
    """Make the configuration of a system with an instance of each of these roles.

    Args:
        shares_prefixes: keep a prefix cache; without equal prefixes the same is simulated faster without one.
    """
    return Config(
        model=ModelConfig(path="simulated"),
        gpu_instances=tuple(
            InstanceConfig(
                instance_id=f"{role}-{number}",
                instance_type=role,
                gpu_id=number,
                kv_rank=number,
                tensor_parallel_size=1,
            )
            for number, role in enumerate(roles)
        ),
        chunked_prefill=ChunkedPrefillConfig(
            chunk_size=sizes.chunk_size, max_chunk_prefill_tokens=sizes.max_chunk_prefill_tokens
        ),
        performance=PerformanceConfig(
            max_num_seqs=sizes.max_num_seqs,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            block_size=BLOCK_SIZE,
            enable_prefix_caching=shares_prefixes,
            placement=sizes.placement,
            max_waiting_requests=_NO_LIMIT,
        ),
        semi_pd=semi_pd or SemiPDConfig(),
        scheduler=sizes.scheduler,
        rpc=RpcConfig(heartbeat_interval_s=_HEARTBEAT_S, heartbeat_timeout_s=1e9, step_timeout_s=1e9),
    )
