"""The two arenas of a rank: all weights in one allocation, all KV in another.

A rank makes its own arenas, or attaches to those of another process. For that it needs an `ArenaAttachment`: the
handles, and where each tensor lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch

from hbserve.attention import select_attention_backend
from hbserve.config import Config
from hbserve.engine.draft_model.arenas import DraftArenas, DraftPart
from hbserve.engine.step_board import StepBoard
from hbserve.errors import ConfigError, StartupError
from hbserve.float8 import FP8
from hbserve.kv_cache.layout import KVLayout
from hbserve.layers.parallel import TensorParallel
from hbserve.model_spec import DTYPES, ModelSpec
from hbserve.models.eagle3_spec import Eagle3Spec
from hbserve.models.loader import check_weights, fill_dummy_weights, load_weights
from hbserve.models.weights import WeightTable
from hbserve.platform import Platform

_MAX_CPU_BYTES = 4 << 30
"""Maximum of bytes of an instance's KV arenas on CPU, where other programs need memory too. One sequence of the largest
length may need more."""


@dataclass(frozen=True)
class KVSize:
    """The size of a KV pool; ``max_model_len`` is the maximum of tokens of one sequence."""

    num_blocks: int
    max_model_len: int


_FIRST_FP8_CAPABILITY = (8, 9)

_Allocate = Callable[[int, str], torch.Tensor]
Agree = Callable[[KVSize], KVSize]


class ArenaAttachment(msgspec.Struct, frozen=True):
    """The data that another process needs to work on a rank's arenas; plain.

    Attributes:
        epoch: of this incarnation of the arenas; never used again.
        device: that the arenas are on, ``cpu`` or ``cuda``.
        weights, kv: handles of the two arenas.
        table: name -> offset, shape, dtype of every parameter.
        kv_bytes: of the KV arena, which has one block more than ``num_blocks``: the last block is for warming up, and
            no sequence gets it.
        board: handle of a `StepBoard`'s memory.
        spec: of the model, as `ModelSpec.as_plain`.
        draft_spec, draft_table: of the draft model, which comes after the model in both arenas; None: there is none.
        draft_head: `Eagle3Spec.as_plain`, if it is a head.
    """

    epoch: int
    device: str
    weights: str
    table: WeightTable
    kv: str
    kv_bytes: int
    num_blocks: int
    block_size: int
    max_model_len: int
    board: str
    spec: dict[str, Any]
    draft_spec: dict[str, Any] | None = None
    draft_table: WeightTable | None = None
    draft_head: dict[str, Any] | None = None


@dataclass(frozen=True)
class Arenas:
    """The arenas of a rank in this process.

    Attributes:
        weights, kv: uint8.
        num_blocks: KV blocks that sequences may have.
        spare_block: a further block, which warming up writes to; None in arenas that this process made.
        kv_handle: with which other processes of the host attach to the KV arena; None: they cannot.
        max_model_len: most tokens of prompt and output together.
        board: uint8, memory of a `StepBoard`; None in arenas that this process made: no other worker uses them.
        draft: the draft model's part of both arenas; None: there is none.
    """

    weights: torch.Tensor
    table: WeightTable
    kv: torch.Tensor
    layout: KVLayout
    num_blocks: int
    spare_block: int | None
    max_model_len: int
    kv_handle: str | None = None
    board: torch.Tensor | None = None
    draft: DraftArenas | None = None


def check_fp8(spec: ModelSpec, platform: Platform) -> None:
    """Check that the device has FP8, if weights or KV are in it.

    Raises:
        ConfigError: it does not.
    """
    if platform.name == "cuda" and (spec.weights_name or spec.kv_format is not None):
        capability = torch.cuda.get_device_capability(platform.device)
        if capability < _FIRST_FP8_CAPABILITY:
            raise ConfigError(
                f"FP8 needs a GPU of compute capability 8.9 or later (Ada, Hopper); {platform.describe()} has "
                f"{capability[0]}.{capability[1]}"
            )


def make_arenas(config: Config, spec: ModelSpec, platform: Platform, parallel: TensorParallel) -> Arenas:
    """Allocate both arenas and load the weights. Other processes can attach to the KV arena if they write KV into it.

    Raises:
        ModelError, ConfigError: if model, configuration and memory do not fit together.
    """

    def allocate(num_bytes: int, what: str) -> torch.Tensor:
        with _explaining_out_of_memory(platform, num_bytes, what):
            return platform.allocate_arena(num_bytes)

    def agree(size: KVSize) -> KVSize:
        sizes = torch.tensor([size.num_blocks, size.max_model_len], device=platform.device)
        return KVSize(*parallel.minimum(sizes).tolist())

    if config.kv_transfer.backend != "shm":
        return _make(config, spec, platform, parallel, allocate, allocate, 0, agree)
    handles: list[str] = []
    arenas = _make(config, spec, platform, parallel, allocate, _sharing(platform, handles), 0, agree)
    return replace(arenas, kv_handle=handles[0])


def share_arenas(
    config: Config, spec: ModelSpec, platform: Platform, parallel: TensorParallel, epoch: int, agree: Agree
) -> tuple[Arenas, ArenaAttachment]:
    """Allocate both arenas so that other processes can attach, and load the weights. Errors as `make_arenas`.

    Args:
        parallel: names the rank; it computes nothing with the other ranks here.
        agree: turns the size that fits here into the size that fits on all ranks. It is called once, when the weights
            are loaded.
    """
    handles: list[str] = []
    allocate = _sharing(platform, handles)
    arenas = _make(config, spec, platform, parallel, allocate, allocate, 1, agree)
    head = None if arenas.draft is None else arenas.draft.part.head
    board = platform.allocate_shared_host(StepBoard.num_bytes(config.performance.max_num_seqs))
    platform.synchronize()
    return arenas, ArenaAttachment(
        epoch=epoch,
        device=platform.name,
        weights=handles[0],
        table=arenas.table,
        kv=handles[1],
        kv_bytes=arenas.kv.numel(),
        num_blocks=arenas.num_blocks,
        block_size=arenas.layout.block_size,
        max_model_len=arenas.max_model_len,
        board=board.handle,
        spec=spec.as_plain(),
        draft_spec=None if arenas.draft is None else arenas.draft.part.spec.as_plain(),
        draft_table=None if arenas.draft is None else arenas.draft.part.table,
        draft_head=None if head is None else head.as_plain(),
    )


def _sharing(platform: Platform, handles: list[str]) -> _Allocate:
    """Return an allocator of memory that other processes can attach to; it appends the handles to ``handles``."""

    def allocate(num_bytes: int, what: str) -> torch.Tensor:
        with _explaining_out_of_memory(platform, num_bytes, what):
            shared = platform.allocate_shared_arena(num_bytes)
        handles.append(shared.handle)
        return shared.tensor

    return allocate


def attach_arenas(
    config: Config, spec: ModelSpec, platform: Platform, parallel: TensorParallel, attachment: ArenaAttachment
) -> Arenas:
    """Attach to the arenas of another process.

    Raises:
        StartupError: if the arenas are gone.
    """
    try:
        num_draft_bytes = 0 if attachment.draft_table is None else attachment.draft_table.num_bytes
        weights = platform.attach_arena(attachment.weights, attachment.table.num_bytes + num_draft_bytes)
        kv = platform.attach_arena(attachment.kv, attachment.kv_bytes)
        board_bytes = StepBoard.num_bytes(config.performance.max_num_seqs)
        board = platform.attach_shared_host(attachment.board, board_bytes)
    except RuntimeError as error:
        raise StartupError(f"cannot attach to the resident arenas: {error}") from None
    part = None
    if attachment.draft_spec is not None and attachment.draft_table is not None:
        draft_spec = ModelSpec.from_plain(attachment.draft_spec)
        head = None if attachment.draft_head is None else Eagle3Spec.from_plain(attachment.draft_head)
        part = DraftPart.attached(config, draft_spec, attachment.draft_table, attachment.block_size, parallel, head)
    layout = _layout(config, spec, attachment.block_size, parallel, part)
    num_arena_blocks = attachment.num_blocks + 1
    return Arenas(
        weights,
        attachment.table,
        kv,
        layout,
        attachment.num_blocks,
        attachment.num_blocks,
        attachment.max_model_len,
        attachment.kv,
        board,
        _draft_arenas(part, attachment.table, weights, layout, kv, num_arena_blocks),
    )


def _make(
    config: Config,
    spec: ModelSpec,
    platform: Platform,
    parallel: TensorParallel,
    allocate_weights: _Allocate,
    allocate_kv: _Allocate,
    num_spare_blocks: int,
    agree: Agree,
) -> Arenas:
    dtype = dtype_of(config, spec)
    backend = select_attention_backend(config.model.attention_backend, spec, dtype, platform)
    share = (parallel.rank, parallel.size, parallel.has_whole_experts)
    table = WeightTable.build(spec, dtype, *share)
    is_dummy = config.model.load_format == "dummy"
    if not is_dummy:
        check_weights(config.model.path, spec)  # before memory of the size that config.json asks for is allocated
    block_size = config.performance.block_size or backend.preferred_block_size
    if block_size % backend.block_size_multiple:
        raise ConfigError(
            f"performance.block_size: {backend.name} attention needs a multiple of "
            f"{backend.block_size_multiple}, not {block_size}"
        )
    part = DraftPart.load(config, spec, block_size, platform, parallel)
    num_draft_bytes = 0 if part is None else part.table.num_bytes
    weights = allocate_weights(table.num_bytes + num_draft_bytes, "the model's weights")
    if is_dummy:
        fill_dummy_weights(spec, table, weights, config.model.seed, config.model.dummy_expert_skew)
    else:
        load_weights(config.model.path, spec, table, weights, *share)
    layout = _layout(config, spec, block_size, parallel, part)
    max_len, block_bytes = spec.max_position_embeddings, layout.block_bytes
    if part is not None:
        part.load_weights(config, weights[table.num_bytes :], parallel)
        max_len, block_bytes = min(max_len, part.spec.max_position_embeddings), block_bytes + part.layout.block_bytes
    size = agree(_size_kv(config, max_len, block_size, block_bytes, platform, parallel.size))
    num_arena_blocks = size.num_blocks + num_spare_blocks
    num_kv_bytes = num_arena_blocks * layout.block_bytes
    if part is not None:
        num_kv_bytes += part.num_padding_blocks * layout.block_bytes + num_arena_blocks * part.layout.block_bytes
    kv = allocate_kv(num_kv_bytes, f"a KV cache of {size.num_blocks} blocks")
    draft = _draft_arenas(part, table, weights, layout, kv, num_arena_blocks)
    return Arenas(weights, table, kv, layout, size.num_blocks, None, size.max_model_len, draft=draft)


def _draft_arenas(
    part: DraftPart | None, table: WeightTable, weights: torch.Tensor, layout: KVLayout, kv: torch.Tensor, blocks: int
) -> DraftArenas | None:
    if part is None:
        return None
    num_model_blocks, features = blocks + part.num_padding_blocks, None
    if part.head is not None:
        features = layout.vectors(kv, num_model_blocks, part.spec.hidden_size, part.layout.dtype)
    return DraftArenas(part, weights[table.num_bytes :], kv[num_model_blocks * layout.block_bytes :], features)


def _size_kv(
    config: Config, limit: int, block_size: int, block_bytes: int, platform: Platform, tp_size: int = 1
) -> KVSize:
    """Fit a rank's KV pool to configuration, model and memory; on CPU the ``tp_size`` ranks share the memory.

    ``performance.num_blocks`` counts if it is given. Else the pool takes ``memory_fraction`` of the free memory. On CPU
    it also takes at most 4 GiB, and at most what ``max_num_seqs`` sequences of the greatest length could fill.

    Args:
        limit: tokens of a sequence that the model can take, and the draft model if there is one.
        block_bytes: of a block, the draft model's included.

    Raises:
        ConfigError: if one sequence of the configured length does not fit.
    """
    asked = config.model.max_model_len
    if asked is not None and asked > limit:
        raise ConfigError(f"model.max_model_len: {asked} tokens are more than the model's own limit, {limit}")
    wanted_len = asked or limit
    performance = config.performance
    num_blocks = performance.num_blocks
    if num_blocks is None:
        free = platform.free_memory_bytes()
        if platform.name == "cpu":
            free //= tp_size
        num_blocks = int(free * performance.memory_fraction) // block_bytes
        if platform.name == "cpu":
            per_sequence = -(-wanted_len // block_size)
            max_blocks = min(per_sequence * performance.max_num_seqs, _MAX_CPU_BYTES // tp_size // block_bytes)
            num_blocks = min(num_blocks, max(max_blocks, per_sequence if asked is not None else 1))
        source = f"performance.memory_fraction: {performance.memory_fraction} of {free / (1 << 30):.1f} GiB free"
    else:
        source = f"performance.num_blocks: {num_blocks} blocks"
    capacity = num_blocks * block_size
    min_tokens = asked or 1
    if capacity < min_tokens:
        raise ConfigError(
            f"{source} gives a KV cache of {capacity} tokens, fewer than a sequence of {min_tokens} needs; "
            f"one block of {block_size} tokens takes {block_bytes} bytes"
        )
    return KVSize(num_blocks, min(wanted_len, capacity))


def dtype_of(config: Config, spec: ModelSpec) -> torch.dtype:
    """Return the dtype of what is not quantised."""
    return spec.dtype if config.model.dtype == "auto" else DTYPES[config.model.dtype]


def _layout(
    config: Config, spec: ModelSpec, block_size: int, parallel: TensorParallel, part: DraftPart | None
) -> KVLayout:
    layout = KVLayout(
        num_layers=spec.num_layers,
        block_size=block_size,
        num_kv_heads=max(1, spec.num_kv_heads // parallel.size),
        head_dim=spec.head_dim,
        dtype=dtype_of(config, spec) if spec.kv_format is None else FP8,
    )
    return layout if part is None else part.in_blocks(layout)


@contextmanager
def _explaining_out_of_memory(platform: Platform, num_bytes: int, what: str) -> Iterator[None]:
    """Say what the memory was for, which torch's own message does not.

    On the CPU the kernel grants memory that it does not have, and kills the process later. So the size is compared with
    the free memory first.
    """
    try:
        if platform.name == "cpu" and num_bytes > platform.free_memory_bytes():
            raise RuntimeError("more than is free")
        yield
    except RuntimeError:
        needed, free = (f"{x / (1 << 30):.1f} GiB" for x in (num_bytes, platform.free_memory_bytes()))
        raise ConfigError(f"{what} takes {needed}, and {platform.describe()} has {free} free") from None
