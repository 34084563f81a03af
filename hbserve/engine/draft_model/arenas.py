"""The draft model's part of a rank's arenas: its weights after the model's, and its KV after the model's.

A KV block of the model and the block of the draft model with the same id hold the same tokens::

    weights arena   model | draft model
    KV arena        block 0, 1, ... of the model | block 0, 1, ... of the draft model

So one block table serves both. Transfers and KV tiers move the model's part alone: the draft model reads the tokens
again where its part is missing (`hbserve.engine.draft_model.drafter`). What an EAGLE-3 head reads, the features of the
tokens, lies in the model's blocks behind the layers, so it goes wherever they go.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from hbserve.attention import select_attention_backend
from hbserve.config import Config
from hbserve.errors import ConfigError, ModelError
from hbserve.kv_cache.layout import KVLayout
from hbserve.layers.parallel import TensorParallel
from hbserve.model_files import is_eagle3_head
from hbserve.model_spec import DTYPES, ModelSpec
from hbserve.models.eagle3_spec import Eagle3Spec
from hbserve.models.loader import check_weights, fill_dummy_weights, load_weights
from hbserve.models.weights import WeightTable
from hbserve.platform import Platform
from hbserve.tokenizer_files import has_tokenizer, read_vocabulary, token_numbers

_KEY = "speculation.model"


@dataclass(frozen=True)
class DraftPart:
    """Sizes of a draft model's part.

    Attributes:
        spec: of the draft model, or of the layer of a head.
        layout: of this rank's part of its KV block.
        head: the head; None: the draft model is a model.
    """

    spec: ModelSpec
    table: WeightTable
    layout: KVLayout
    head: Eagle3Spec | None = None

    def in_blocks(self, layout: KVLayout) -> KVLayout:
        """Return the layout of the model's blocks, with room for the features of a head."""
        return layout if self.head is None else layout.with_vectors(self.spec.hidden_size * self.layout.dtype.itemsize)

    @property
    def num_padding_blocks(self) -> int:
        """Blocks of the model that the arena has besides: one that takes the features of padding."""
        return int(self.head is not None)

    @staticmethod
    def load(
        config: Config, target: ModelSpec, block_size: int, platform: Platform, parallel: TensorParallel
    ) -> DraftPart | None:
        """Read the shape of the configured draft model; None: there is none.

        Args:
            target: the model that it drafts for.

        Raises:
            ConfigError: it does not fit to the model.
            ModelError: its folder cannot be used.
        """
        folder = config.speculation.model
        if folder is None:
            return None
        method, is_head = config.speculation.method, is_eagle3_head(Path(folder))
        if method == "eagle3" or (method == "auto" and is_head):
            return DraftPart._load_head(config, folder, target, block_size, platform, parallel)
        if is_head:
            raise ConfigError(f"{_KEY}: {folder} is an EAGLE-3 head; set speculation.method: eagle3", _KEY)
        spec = ModelSpec.load(folder, max_model_len=config.model.max_model_len)
        if spec.vocab_size > target.vocab_size:
            sizes = f"it has {spec.vocab_size} tokens, and the model has {target.vocab_size}"
            raise ConfigError(f"{_KEY}: {folder} has another vocabulary than the model: {sizes}", _KEY)
        asked, limit = config.model.max_model_len, spec.max_position_embeddings
        if asked is not None and asked > limit:
            raise ConfigError(f"{_KEY}: {folder} takes {limit} tokens, fewer than model.max_model_len: {asked}", _KEY)
        _check_vocabulary(folder, config.tokenizer_path)
        dtype = draft_dtype(config, spec)
        _check_block_size(config, spec, block_size, platform)
        table = WeightTable.build(spec, dtype, parallel.rank, parallel.size, parallel.has_whole_experts)
        return DraftPart(spec, table, _layout(spec, dtype, block_size, parallel))

    @staticmethod
    def _load_head(
        config: Config, folder: str, target: ModelSpec, block_size: int, platform: Platform, parallel: TensorParallel
    ) -> DraftPart:
        """Read the shape of an EAGLE-3 head; its tokens are the model's, so there is no tokenizer to compare."""
        try:
            head = Eagle3Spec.load(folder, target, has_weights=config.model.load_format != "dummy")
        except ModelError as error:
            raise ConfigError(f"{_KEY}: {error}", _KEY) from None
        if len(sizes := {instance.num_ranks for instance in config.gpu_instances}) > 1:
            what = f"an EAGLE-3 head needs instances of one size, and they have {sorted(sizes)} ranks"
            raise ConfigError(f"{_KEY}: {what}; give them the same tensor_parallel_size", _KEY)
        spec, dtype = head.layer, draft_dtype(config, head.layer)
        _check_block_size(config, spec, block_size, platform)
        table = head.table(dtype, parallel.rank, parallel.size)
        return DraftPart(spec, table, _layout(spec, dtype, block_size, parallel), head)

    @staticmethod
    def attached(
        config: Config,
        spec: ModelSpec,
        table: WeightTable,
        block_size: int,
        tp: TensorParallel,
        head: Eagle3Spec | None,
    ) -> DraftPart:
        """Return the part as the process that holds the arenas has laid it out."""
        return DraftPart(spec, table, _layout(spec, draft_dtype(config, spec), block_size, tp), head)

    def load_weights(self, config: Config, arena: torch.Tensor, parallel: TensorParallel) -> None:
        """Fill its part of the weights arena. Errors as `hbserve.models.loader.load_weights`."""
        assert config.speculation.model is not None, "there is a draft model"
        if config.model.load_format == "dummy":
            fill_dummy_weights(self.spec, self.table, arena, config.model.seed)
            return
        if self.head is not None:
            self.head.load_weights(config.speculation.model, self.table, arena, parallel.rank, parallel.size)
            return
        check_weights(config.speculation.model, self.spec)
        share = (parallel.rank, parallel.size, parallel.has_whole_experts)
        load_weights(config.speculation.model, self.spec, self.table, arena, *share)


@dataclass(frozen=True)
class DraftArenas:
    """A draft model's part of the arenas in this process.

    Attributes:
        weights: its weights, uint8. kv: its KV blocks, uint8, as many as the model has.
        features: ``[block, token, hidden]``, of a head, in the model's blocks, a block for padding included.
    """

    part: DraftPart
    weights: torch.Tensor
    kv: torch.Tensor
    features: torch.Tensor | None


def draft_dtype(config: Config, spec: ModelSpec) -> torch.dtype:
    """Return the dtype of what is not quantised."""
    return spec.dtype if config.model.dtype == "auto" else DTYPES[config.model.dtype]


def _check_block_size(config: Config, spec: ModelSpec, block_size: int, platform: Platform) -> None:
    """Check that the draft model's attention takes the model's blocks."""
    backend = select_attention_backend(config.model.attention_backend, spec, draft_dtype(config, spec), platform)
    if block_size % backend.block_size_multiple:
        multiple = backend.block_size_multiple
        what = f"{backend.name} attention of {config.speculation.model} needs a multiple of {multiple}"
        raise ConfigError(f"performance.block_size: {what}, not {block_size}")


def _layout(spec: ModelSpec, dtype: torch.dtype, block_size: int, parallel: TensorParallel) -> KVLayout:
    num_kv_heads = max(1, spec.num_kv_heads // parallel.size)
    return KVLayout(spec.num_layers, block_size, num_kv_heads, spec.head_dim, dtype)


def _check_vocabulary(folder: str, target: str) -> None:
    """Check that both folders' tokenizers, if both have one, give every token the same number."""
    if folder == target or not (has_tokenizer(Path(folder)) and has_tokenizer(Path(target))):
        return
    if read_vocabulary(Path(folder)) == read_vocabulary(Path(target)):
        return
    ours, theirs = token_numbers(Path(target)), token_numbers(Path(folder))
    if ours == theirs:
        return
    token = next(token for token in {**theirs, **ours} if ours.get(token) != theirs.get(token))
    numbers = " and ".join("missing" if found is None else str(found) for found in (ours.get(token), theirs.get(token)))
    what = f"token {token!r} is {numbers}" if len(token) < 100 else f"{len(ours)} and {len(theirs)} tokens"
    raise ConfigError(f"{_KEY}: {folder} has another vocabulary than {target}: {what}", _KEY)
