"""The profile of a model on a GPU: the user's own from the cache folder, else a shipped one, else the built-in, scaled.

`hbserve profile` writes into the cache folder. A profile is found by what step times depend on: the model's shape, the
GPU's name, the dtype, the number of ranks, and the file format.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from hbserve.errors import ConfigError, ModelError
from hbserve.model_files import read_config
from hbserve.model_store.cache import cache_folder
from hbserve.policy.profile_file import BUILT_IN, load_profile
from hbserve.policy.step_profile import FORMAT, StepProfile

_HOST_MS = 0.7
"""What the host takes for a step, however small the model: measured for Qwen3-0.6B beside an H200."""


class ModelShape(NamedTuple):
    """Sizes of a dense decoder that step times depend on; names as in config.json."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @staticmethod
    def read(folder: Path) -> ModelShape | None:
        """Read the shape of a model's folder; None if its config.json is missing or names no such sizes."""
        try:
            sizes = read_config(folder)
            heads = sizes["num_attention_heads"]
            defaults = {"num_key_value_heads": heads, "head_dim": sizes["hidden_size"] // heads}
            return ModelShape(*(int(sizes.get(name) or defaults[name]) for name in ModelShape._fields))
        except (ModelError, KeyError, TypeError):
            return None

    @property
    def num_parameters(self) -> int:
        """Parameters that a step reads: all but the table of input embeddings."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_key_value_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * layer + self.vocab_size * self.hidden_size

    @property
    def name(self) -> str:
        """Name of the shape in a file name."""
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocab = self
        return f"{layers}x{hidden}x{intermediate}_{heads}q{kv_heads}kv{head_dim}_v{vocab}"


BUILT_IN_SHAPE = ModelShape(36, 4096, 12288, 32, 8, 128, 151936)
_SHIPPED_GPU = "NVIDIA H200"
_SHIPPED = {
    BUILT_IN_SHAPE: BUILT_IN,
    ModelShape(32, 4096, 14336, 32, 8, 128, 128256): Path(__file__).with_name("llama_3_1_8b_h200.json"),
}
"""Files of the shapes that were measured on an H200, in bfloat16, with one rank."""


@dataclass(frozen=True)
class FoundProfile:
    """A profile, and why it is this one.

    Attributes:
        source: for people.
        is_measured: it is of this shape on this kind of GPU.
        path: its file; None: it was computed from the built-in one.
    """

    profile: StepProfile
    source: str
    is_measured: bool
    path: Path | None = None


def profile_path(shape: ModelShape, gpu: str, dtype: str, num_ranks: int) -> Path:
    """Return where the user's cache folder keeps a profile, whether it is there or not."""
    folder = re.sub(r"[^A-Za-z0-9.-]+", "_", gpu).strip("_") or "unknown"
    return cache_folder() / "profiles" / folder / f"{shape.name}_{dtype}_tp{num_ranks}_format{FORMAT}.json"


def find_profile(folder: Path, gpu: str, dtype: str, num_ranks: int) -> FoundProfile:
    """Find the profile for a model on a GPU.

    Args:
        folder: of the model.
        gpu: name as the driver has it.
        dtype: of the weights; ``auto``: the checkpoint's.
    """
    shape = ModelShape.read(folder)
    if shape is None:
        return FoundProfile(load_profile(None), "the built-in profile: the model's shape is not known", False)
    dtype = checkpoint_dtype(folder) if dtype == "auto" else dtype
    path = profile_path(shape, gpu, dtype, num_ranks)
    if path.is_file():
        try:
            return FoundProfile(load_profile(path), f"measured on this kind of GPU ({path})", True, path)
        except ConfigError as error:
            return FoundProfile(_scaled(shape, num_ranks), f"the built-in profile, scaled: {error}", False)
    if gpu == _SHIPPED_GPU and dtype == "bfloat16" and num_ranks == 1 and shape in _SHIPPED:
        return FoundProfile(load_profile(_SHIPPED[shape]), f"shipped, of this shape on {gpu}", True, _SHIPPED[shape])
    source = f"the built-in profile ({_SHIPPED_GPU}, 8B) scaled by parameters; `hbserve profile` measures this one"
    return FoundProfile(_scaled(shape, num_ranks), source, False)


def checkpoint_dtype(folder: Path) -> str:
    """Return the dtype that a model's config.json names, else bfloat16."""
    try:
        config = read_config(folder)
    except ModelError:
        return "bfloat16"
    named = config.get("torch_dtype") or config.get("dtype")
    return named if isinstance(named, str) else "bfloat16"


def _scaled(shape: ModelShape, num_ranks: int) -> StepProfile:
    """Return the built-in profile with the device's part of all times in proportion to the parameters of a rank."""
    profile = load_profile(None)
    factor = shape.num_parameters / num_ranks / BUILT_IN_SHAPE.num_parameters
    replace = msgspec.structs.replace

    def scaled(ms: float) -> float:
        return factor * ms + max(0.0, 1 - factor) * _HOST_MS

    steps = tuple(replace(point, ms=scaled(point.ms)) for point in profile.steps)
    pairs = tuple(
        replace(pair, prefill_ms=scaled(pair.prefill_ms), decode_ms=scaled(pair.decode_ms)) for pair in profile.pairs
    )
    return replace(profile, model=f"{profile.model}, times {factor:.3g}", steps=steps, pairs=pairs)
