"""How many KV blocks a worker has, and how long a sequence may be."""

from __future__ import annotations

from dataclasses import dataclass

from hbserve.config import Config
from hbserve.errors import ConfigError
from hbserve.kv_cache.layout import KVLayout
from hbserve.model_spec import ModelSpec
from hbserve.platform import Platform

CPU_DEFAULT_BYTES = 4 << 30
"""Of an instance's KV arenas on CPU, unless one sequence needs more: the memory there is not the engine's alone."""


@dataclass(frozen=True)
class KVSize:
    """Attributes: max_model_len: most tokens of one sequence."""

    num_blocks: int
    max_model_len: int


def size_kv(config: Config, spec: ModelSpec, layout: KVLayout, platform: Platform, tp_size: int = 1) -> KVSize:
    """Fit a rank's KV pool to configuration, model and memory; on CPU the ``tp_size`` ranks share that.

    ``performance.num_blocks`` stands if given. Else the pool takes ``memory_fraction`` of the free
    memory; on CPU no more than the most sequences of the greatest length could fill, and 4 GiB.

    Raises:
        ConfigError: if not even one sequence of the asked length fits.
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
