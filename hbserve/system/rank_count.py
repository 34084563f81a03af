"""How many GPUs an instance needs for a model's weights, where the configuration does not say."""

from __future__ import annotations

from pathlib import Path

from hbserve.config import ModelConfig
from hbserve.errors import ConfigError, ModelError
from hbserve.model_files import checkpoint_files, read_config
from hbserve.policy.profile_store import ModelShape

LARGEST_WEIGHT_SHARE = 0.75
"""Share of a GPU's memory that weights may take; the rest is for KV blocks, activations and captured graphs."""
_BYTES_PER_PARAMETER = {"float32": 4}
_SHORT_BYTES = 2
_NUMBERS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def num_ranks_needed(model: ModelConfig, num_gpus: int, gpu_bytes: int | None) -> int:
    """Return the smallest power of two of GPUs, at least ``tensor_parallel_size``, that hold the model's weights.

    Args:
        num_gpus: that there are.
        gpu_bytes: memory of the smallest; None: unknown, so what is configured must do.

    Raises:
        ConfigError: all GPUs together hold too little, or their number does not divide the model's KV heads.
    """
    size = model.tensor_parallel_size
    num_bytes = _weight_bytes(model)
    if gpu_bytes is None or num_bytes is None:
        return size
    while num_bytes > size * LARGEST_WEIGHT_SHARE * gpu_bytes:
        size *= 2
    shape = ModelShape.read(Path(model.path))
    num_kv_heads = size if shape is None else shape.num_key_value_heads
    if size > model.tensor_parallel_size and (size > num_gpus or num_kv_heads % size):
        short = size > num_gpus
        limit = f"there are {num_gpus}" if short else f"the model's {num_kv_heads} KV heads cannot be split so"
        raise ConfigError(
            f"the weights of {model.path} take {num_bytes / 1e9:.1f} GB, and a GPU here has {gpu_bytes / 1e9:.1f} GB, "
            f"of which weights may take {100 * LARGEST_WEIGHT_SHARE:.0f} %: they need {size} GPUs, and {limit}; serve "
            "a smaller model, or choose the mode yourself (mode: unified) to try it all the same",
            key="model.tensor_parallel_size",
        )
    return size


def _weight_bytes(model: ModelConfig) -> int | None:
    """Return the bytes of a model's weights: those of its files, else those of its shape; None if neither is known."""
    folder = Path(model.path)
    # What is quantised while it is loaded has half of the bytes, but for embeddings, norms and scales.
    factor = 1.0 if model.quantization is None else 0.5
    try:
        if model.load_format != "dummy":
            return int(factor * sum(file.stat().st_size for file in checkpoint_files(folder)))
        has_experts = any(name in read_config(folder) for name in _NUMBERS_OF_EXPERTS)
    except (ModelError, OSError):
        return None  # whoever loads it says what is wrong
    shape = ModelShape.read(folder)
    if shape is None or has_experts:
        return None
    embeddings = shape.vocab_size * shape.hidden_size
    return int((factor * shape.num_parameters + embeddings) * _BYTES_PER_PARAMETER.get(model.dtype, _SHORT_BYTES))
