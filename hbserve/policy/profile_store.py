"""The profile of a model on a GPU: the user's own from the cache folder, else a shipped one, else a computed one.

`hbserve profile` writes into the cache folder, and so does a system in mode ``auto`` that has learnt one. A profile is
found by what step times depend on (`ProfileKey`). Where none was measured, one is computed from the profile of the same
shape in bfloat16, or from the built-in one.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from hbserve.cache_folder import cache_folder
from hbserve.config import KVCacheConfig, ModelConfig
from hbserve.errors import ConfigError, ModelError
from hbserve.model_files import read_config
from hbserve.policy.derived_profile import HOST_MS, ModelAmounts, derive, quantized_shares
from hbserve.policy.learnt_points import SOURCE
from hbserve.policy.profile_file import BUILT_IN, LearntProfile, load_profile
from hbserve.policy.step_profile import FORMAT, StepProfile
from hbserve.weight_format import read_weight_format

logger = logging.getLogger(__name__)


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


class ProfileKey(NamedTuple):
    """What step times depend on.

    Attributes:
        gpu: name as the driver has it; ``cpu`` without one.
        dtype: of what is not quantised.
        weights: format of the matrices; empty: in ``dtype``.
        kv_dtype: of KV; empty: in ``dtype``.
    """

    shape: ModelShape
    gpu: str
    dtype: str
    num_ranks: int = 1
    weights: str = ""
    kv_dtype: str = ""

    @staticmethod
    def of(model: ModelConfig, kv: KVCacheConfig, gpu: str) -> ProfileKey | None:
        """Return the key of a configured model on a GPU; None if its shape is not known."""
        folder = Path(model.path)
        shape = ModelShape.read(folder)
        if shape is None:
            return None
        dtype = checkpoint_dtype(folder) if model.dtype == "auto" else model.dtype
        weights = _weight_format(folder) or ("" if model.quantization is None else f"{model.quantization}-channel")
        kv_dtype = "" if kv.dtype == "auto" else kv.dtype
        return ProfileKey(shape, gpu, dtype, model.tensor_parallel_size, weights, kv_dtype)

    @property
    def is_plain(self) -> bool:
        """Whether weights and KV are in ``dtype``."""
        return not self.weights and not self.kv_dtype

    @property
    def plain(self) -> ProfileKey:
        """The same with weights and KV in ``dtype``."""
        return self._replace(weights="", kv_dtype="")

    @property
    def subject(self) -> str:
        """The key in words, as profiles in the cache folder have it."""
        return f"{self._name} on {self.gpu}"

    @property
    def path(self) -> Path:
        """Where the user's cache folder keeps the profile, whether it is there or not."""
        folder = re.sub(r"[^A-Za-z0-9.-]+", "_", self.gpu).strip("_") or "unknown"
        return cache_folder() / "profiles" / folder / f"{self._name}_format{FORMAT}.json"

    @property
    def _name(self) -> str:
        kinds = [self.dtype, self.weights, self.kv_dtype and f"kv-{self.kv_dtype}", f"tp{self.num_ranks}"]
        return "_".join([self.shape.name, *filter(None, kinds)])


def _weight_format(folder: Path) -> str | None:
    """Return the format of a quantised checkpoint's matrices; None: they are not quantised."""
    try:
        found = read_weight_format(read_config(folder))
    except ModelError:
        return None  # whoever loads it says what is wrong
    return None if found is None or not found.computes else f"fp8-{found.name}"


ProfileOrigin = Literal["cache", "learnt", "shipped", "derived", "built-in"]
_BUILT_IN: ProfileOrigin = "built-in"
_DERIVED: ProfileOrigin = "derived"


@dataclass(frozen=True)
class FoundProfile:
    """A profile, and why it is this one.

    Attributes:
        source: for people.
        is_measured: it is of this shape, these formats and this kind of GPU.
        path: its file; None: it was computed from another one.
        learnt: where a better one is to be kept once it is learnt; None: it is good, or the shape is not known.
    """

    profile: StepProfile
    source: str
    is_measured: bool
    path: Path | None = None
    origin: ProfileOrigin = "built-in"
    learnt: LearntProfile | None = None


def find_profile(key: ProfileKey | None) -> FoundProfile:
    """Find the profile for a model on a GPU.

    Args:
        key: None: the model's shape is not known.
    """
    if key is None:
        return FoundProfile(load_profile(None), "the built-in profile: the model's shape is not known", False)
    found = _measured(key)
    if found is not None:
        return found
    learnt = LearntProfile(str(key.path), key.subject)
    base = None if key.is_plain else _measured(key.plain)
    if base is None:
        source = f"the built-in profile ({_SHIPPED_GPU}, 8B) scaled by parameters"
        profile, origin = _scaled(key.shape, key.num_ranks), _BUILT_IN
    else:
        source, profile, origin = f"derived from the one in {key.dtype} ({base.source})", base.profile, _DERIVED
    if not key.is_plain:
        shares = quantized_shares(bool(key.weights), bool(key.kv_dtype))
        profile = derive(profile, _amounts(key.shape, key.num_ranks), shares)
        source += f" by bytes and FLOP: {shares.text}"
    source += "; a better one is learnt while the system serves, and `hbserve profile` measures one"
    return FoundProfile(profile, source, False, origin=origin, learnt=learnt)


def _measured(key: ProfileKey) -> FoundProfile | None:
    """Return the profile that was measured or learnt for a key, else a shipped one."""
    path = key.path
    if path.is_file():
        try:
            profile = load_profile(path)
            if profile.subject not in ("", key.subject):
                raise ConfigError(f"latency profile {path}: it is of {profile.subject}, not of {key.subject}")
            source = f"{profile.source or 'measured'}, on this kind of GPU ({path})"
            return FoundProfile(profile, source, True, path, "learnt" if profile.source == SOURCE else "cache")
        except ConfigError as error:
            logger.warning("a damaged profile is ignored, and made again: %s", error)
    if key.gpu == _SHIPPED_GPU and key.dtype == "bfloat16" and key.num_ranks == 1 and key.is_plain:
        shipped = _SHIPPED.get(key.shape)
        if shipped is not None:
            source = f"shipped, of this shape on {key.gpu}"
            return FoundProfile(load_profile(shipped), source, True, shipped, "shipped")
    return None


def _amounts(shape: ModelShape, num_ranks: int) -> ModelAmounts:
    """Return what a rank's step reads and computes."""
    head = shape.vocab_size * shape.hidden_size
    return ModelAmounts(
        matrices=(shape.num_parameters - head) / num_ranks,
        head=head / num_ranks,
        kv_bytes=4 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim / num_ranks,
        pair_flop=4 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim / num_ranks,
    )


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
        return factor * ms + max(0.0, 1 - factor) * HOST_MS

    steps = tuple(replace(point, ms=scaled(point.ms)) for point in profile.steps)
    pairs = tuple(
        replace(pair, prefill_ms=scaled(pair.prefill_ms), decode_ms=scaled(pair.decode_ms)) for pair in profile.pairs
    )
    return replace(profile, model=f"{profile.model}, times {factor:.3g}", steps=steps, pairs=pairs)
