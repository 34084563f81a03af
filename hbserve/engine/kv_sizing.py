"""The size of a rank's KV pool: the number of its blocks, and the tokens that a sequence may have."""

from __future__ import annotations

from dataclasses import dataclass

from hbserve.config import Config
from hbserve.errors import ConfigError
from hbserve.kv_cache.layout import KVLayout
from hbserve.model_spec import ModelSpec
from hbserve.platform import Platform

CPU_DEFAULT_BYTES = 4 << 30
"""Most bytes of an instance's KV arenas on CPU, where other programs need memory too; one sequence may need more."""


@dataclass(frozen=True)
class KVSize:
    """Attributes: max_model_len: most tokens of one sequence."""

    num_blocks: int
    max_model_len: int


def size_kv(config: Config, spec: ModelSpec, layout: KVLayout, platform: Platform, tp_size: int = 1) -> KVSize:
    """Fit a rank's KV pool to configuration, model and memory; on CPU the ``tp_size`` ranks share the memory.

    ``performance.num_blocks`` counts if it is given. Else the pool takes ``memory_fraction`` of the free memory. On CPU
    it also takes at most 4 GiB, and at most what ``max_num_seqs`` sequences of the greatest length could fill.

    Raises:
        ConfigError: if one sequence of the configured length does not fit.
    """
    asked, limit = config.model.max_model_len, spec.max_position_embeddings
    if asked is not None and asked > limit:
        raise ConfigError(f"model.max_model_len: {asked} tokens are more than the model's own limit, {limit}")
    wanted_len = asked or limit
    performance = config.performance
    num_blocks = performance.num_blocks
    if num_blocks is None:
        free = platform.free_memory_bytes()
        if platform.name == "cpu":
            free //= tp_size
        num_blocks = layout.num_blocks_in(int(free * performance.memory_fraction))
        if platform.name == "cpu":
            per_sequence = -(-wanted_len // layout.block_size)
            max_blocks = min(
                per_sequence * performance.max_num_seqs, layout.num_blocks_in(CPU_DEFAULT_BYTES // tp_size)
            )
            num_blocks = min(num_blocks, max(max_blocks, per_sequence if asked is not None else 1))
        source = f"performance.memory_fraction: {performance.memory_fraction} of {free / (1 << 30):.1f} GiB free"
    else:
        source = f"performance.num_blocks: {num_blocks} blocks"
    capacity = num_blocks * layout.block_size
    min_tokens = asked or 1
    if capacity < min_tokens:
        raise ConfigError(
            f"{source} gives a KV cache of {capacity} tokens, fewer than a sequence of {min_tokens} needs; "
            f"one block of {layout.block_size} tokens takes {layout.block_bytes} bytes"
        )
    return KVSize(num_blocks, min(wanted_len, capacity))
