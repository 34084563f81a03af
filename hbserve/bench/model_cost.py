"""What a token costs: the FLOPs and bytes that no implementation of a model can do without.

Models by name: the shapes under ``configs/models`` have a config.json and no weights.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hbserve.errors import ConfigError
from hbserve.model_spec import ModelSpec

SHAPES = Path(__file__).resolve().parents[2] / "configs" / "models"
"""Folder of the shapes that come with the repository."""


def find_model(name: str) -> Path:
    """The folder of a model: ``name`` itself if it is one, else the shape of that name.

    Raises:
        ConfigError: naming the shapes there are.
    """
    for folder in (Path(name).expanduser(), SHAPES / name):
        if (folder / "config.json").is_file():
            return folder.resolve()
    shapes = ", ".join(sorted(path.parent.name for path in SHAPES.glob("*/config.json"))) or f"none in {SHAPES}"
    raise ConfigError(f"--model: {name!r} is neither a folder with a config.json nor a known shape ({shapes})", "model")


def default_load_format(folder: Path) -> str:
    """``safetensors`` where the folder has weights, else ``dummy``."""
    return "safetensors" if any(folder.glob("*.safetensors")) else "dummy"


class ModelCost:
    """Least work per token. Norms, biases, rotary embeddings and activations are left out: they are
    small, and leaving them out keeps a floor a floor.

    Args:
        itemsize: bytes per parameter and per KV element.

    Attributes:
        layer_params: parameters of all layers' matrices.
        head_params: parameters of the LM head.
        weight_bytes: what a step with any number of tokens reads: the layers and the LM head. The
            embedding is read by row, so it counts only where it is the LM head too.
        token_flops: of all layers' matrices for one token: 2 per parameter.
        head_flops: of the LM head for one sampled token.
    """

    def __init__(self, spec: ModelSpec, itemsize: int) -> None:
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        attention_params = spec.hidden_size * (2 * q_size + 2 * kv_size)
        mlp_params = 3 * spec.hidden_size * spec.intermediate_size
        self.layer_params = spec.num_layers * (attention_params + mlp_params)
        self.head_params = spec.vocab_size * spec.hidden_size
        self.weight_bytes = (self.layer_params + self.head_params) * itemsize
        self.token_flops = 2 * self.layer_params
        self.head_flops = 2 * self.head_params
        # scores and weighted values: one multiplication and one addition each per query element
        self._flops_per_key = 4 * q_size
        self._bytes_per_key = 2 * kv_size * itemsize
        self._windows = Counter(spec.sliding_windows)

    def attention_flops(self, context_tokens: int) -> int:
        """Of one token that attends to so many, itself included, in all layers."""
        return self._flops_per_key * self._visible_keys(context_tokens)

    def kv_bytes(self, context_tokens: int) -> int:
        """KV that one token with such a context, itself included, reads or writes in all layers."""
        return self._bytes_per_key * self._visible_keys(context_tokens)

    def prompt_flops(self, prompt_tokens: int) -> int:
        """Of a whole prompt, its causal attention and the logits of its last token included."""
        keys = sum(layers * _causal_pairs(prompt_tokens, window) for window, layers in self._windows.items())
        return prompt_tokens * self.token_flops + self._flops_per_key * keys + self.head_flops

    def _visible_keys(self, context_tokens: int) -> int:
        """Summed over the layers."""
        return sum(
            layers * (context_tokens if window is None else min(context_tokens, window))
            for window, layers in self._windows.items()
        )


def _causal_pairs(tokens: int, window: int | None) -> int:
    """Query-key pairs of one layer: each token sees itself and what is before it, within the window."""
    width = tokens if window is None else min(tokens, window)
    return width * (width + 1) // 2 + (tokens - width) * width
