"""Reads safetensors checkpoints: fills the weight arena (or with random weights)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hbserve.errors import ModelError
from hbserve.float8 import FP8
from hbserve.model_files import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorEntry,
    checkpoint_files,
    checkpoint_tensors,
)
from hbserve.model_spec import EMBEDDING, LM_HEAD, ModelSpec
from hbserve.models.checkpoint_part import CheckpointPart
from hbserve.models.expert_shares import expert_shares, skew_router
from hbserve.models.weight_reader import Read, read_all
from hbserve.models.weights import WeightTable, checkpoint_parts
from hbserve.weight_format import KV_SCALE_NAMES, OTHER_SCALE_NAMES, QUERY_SCALE_NAMES

_DUMMY_STD, _DUMMY_FP8_STD = 0.02, 32.0
_DUMMY_PERIOD_ELEMENTS = 1_048_583
"""Period of the repeated noise: a prime, so no two rows of a matrix are equal."""

_DUMMY_STRIDE_ELEMENTS = 648_061
"""Elements of the period between the begins of two parameters, so no two layers are equal."""

_INPUT_SCALES = (".input_scale", ".activation_scale")

logger = logging.getLogger(__name__)


def check_weights(folder: str | Path, spec: ModelSpec) -> None:
    """Compare the headers of a checkpoint with the model; reads no weights, and needs no memory for them.

    Raises:
        ModelError: a tensor is missing, unreadable, of a wrong shape or dtype, or has no place in the model. The text
            names file and tensor.
    """
    folder = Path(folder)
    renamed = _renamed(spec, checkpoint_tensors(folder))
    check_parts(folder, spec.architecture, checkpoint_parts(spec), renamed, lambda name: _is_harmless(name, spec))


def check_parts(
    folder: Path,
    architecture: str,
    parameters: Mapping[str, tuple[CheckpointPart, ...]],
    renamed: Mapping[str, str],
    is_harmless: Callable[[str], bool],
) -> None:
    """Compare the headers of a checkpoint with the parts of parameters. Errors as `check_weights`.

    Args:
        renamed: names of parts, by the name that the checkpoint has for them.
        is_harmless: whether a tensor that is no part may be there.
    """
    tensors = checkpoint_tensors(folder)
    parts = [part for stacked in parameters.values() for part in stacked]
    expected = {part.name: part for part in (*parts, *(part.companion for part in parts)) if part is not None}
    for name, entry in tensors.items():
        part = expected.get(renamed.get(name, name))
        if part is not None:
            _check_tensor(name, entry, part)
        elif not is_harmless(name):
            raise ModelError(f"{entry.path}: tensor {name} has no place in {architecture} as config.json has it")
    present = {renamed.get(name, name) for name in tensors}
    missing = [part for name, part in expected.items() if name not in present]
    if missing:
        paths = checkpoint_files(folder)
        place = paths[0] if len(paths) == 1 else f"{folder} ({len(paths)} files)"
        others = f", nor {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{place}: there is no tensor {missing[0].name} of shape {list(missing[0].stored_shape)}{others}"
        )


def load_weights(
    folder: str | Path,
    spec: ModelSpec,
    table: WeightTable,
    arena: Tensor,
    tp_rank: int = 0,
    tp_size: int = 1,
    has_whole_experts: bool = False,
) -> None:
    """Copy a checkpoint into the arena, converted to the table's dtypes. Several threads read, a tensor at a time.

    Each tensor is checked for values that are not finite after the copy.

    Args:
        folder: holds ``model.safetensors``, or the files that ``model.safetensors.index.json`` names.
        table: table of the same rank.

    Raises:
        ModelError: as `check_weights`, or a weight is not finite. The text names file and tensor.
    """
    folder = Path(folder)
    check_weights(folder, spec)
    if (folder / SINGLE_FILE).is_file() and (folder / INDEX_FILE).is_file():
        logger.warning("%s has %s and %s; the first is read", folder, SINGLE_FILE, INDEX_FILE)
    tensors = checkpoint_tensors(folder)
    if spec.kv_format is None and any(f"model.layers.0.{names[0]}" in tensors for names in KV_SCALE_NAMES):
        logger.info("%s has scales of KV in FP8, which kv_cache.dtype: fp8 would use", folder)
    renamed = _renamed(spec, tensors)
    load_parts(folder, checkpoint_parts(spec, tp_rank, tp_size, has_whole_experts), renamed, table, arena)


def load_parts(
    folder: Path,
    parameters: Mapping[str, tuple[CheckpointPart, ...]],
    renamed: Mapping[str, str],
    table: WeightTable,
    arena: Tensor,
) -> None:
    """Copy the parts of parameters into the arena. Errors as `load_weights`, arguments as `check_parts`."""
    tensors = checkpoint_tensors(folder)
    places = _places(table.views(arena), parameters)
    reads = [
        Read(entry.name, entry, part, target, None if part.companion is None else tensors[part.companion.name])
        for name, entry in tensors.items()
        for part, target in places.get(renamed.get(name, name), ())
    ]
    read_all(reads, arena.device, _check_finite)


def fill_dummy_weights(spec: ModelSpec, table: WeightTable, arena: Tensor, seed: int, expert_skew: float = 0.0) -> None:
    """Fill the arena with normal noise of standard deviation 0.02, and let norms have the factor 1; FP8 weights alike.

    The same seed gives the same weights on the same kind of device. All tensor-parallel ranks must use the same seed,
    because the weights that they have in common must be equal.

    Args:
        expert_skew: exponent of the loads of experts, see `hbserve.models.expert_shares`; 0: routers stay random.
    """
    views = table.views(arena)
    generator = torch.Generator(arena.device).manual_seed(seed)
    noise = torch.empty(_DUMMY_PERIOD_ELEMENTS, device=arena.device).normal_(0, _DUMMY_STD, generator=generator)
    dtype = views["lm_head"].dtype
    noise = noise.to(dtype)
    fp8_noise = noise.float().mul(_DUMMY_FP8_STD / _DUMMY_STD).to(FP8)
    _repeat(arena[: table.num_bytes].view(dtype), noise)
    shares = None if spec.experts is None or expert_skew == 0 else expert_shares(spec.experts, expert_skew)
    order = torch.Generator().manual_seed(seed)
    for number, (name, view) in enumerate(views.items()):
        start = number * _DUMMY_STRIDE_ELEMENTS % _DUMMY_PERIOD_ELEMENTS  # the same on all ranks
        if name.endswith("norm"):
            _fill_norm(view, spec)
        elif name.endswith("router_bias") or view.dtype == torch.int64:
            view.zero_()
        elif name.endswith("router"):
            _repeat(view.flatten(), noise.to(view.dtype), start)
            if shares is not None:
                skew_router(view, shares, order)
        elif name.endswith(("input_scale", "kv_scales")):
            view.fill_(1)
        elif name.endswith("scale"):
            view.fill_(_DUMMY_STD / _DUMMY_FP8_STD)
        elif view.dtype == FP8:
            _repeat(view.flatten(), fp8_noise, start)


def _fill_norm(parameters: Tensor, spec: ModelSpec) -> None:
    """Let a norm have the factor 1, and no bias."""
    parameters.fill_(0 if spec.family.norm in ("gemma_rms", "layer_1p") else 1)
    if spec.family.has_norm_bias:
        parameters.chunk(2)[1].zero_()


def _repeat(target: Tensor, period: Tensor, start: int = 0) -> None:
    """Fill a vector with repeats of another one, from its element ``start`` on."""
    num_first = min(target.numel(), period.numel() - start)
    target[:num_first].copy_(period[start : start + num_first])
    target = target[num_first:]
    num_whole = target.numel() // period.numel() * period.numel()
    whole = target[:num_whole].view(-1, period.numel())
    whole.copy_(period.expand_as(whole))
    target[num_whole:].copy_(period[: target.numel() - num_whole])


def _places(
    views: dict[str, Tensor], parameters: Mapping[str, tuple[CheckpointPart, ...]]
) -> dict[str, list[tuple[CheckpointPart, Tensor]]]:
    """Map each tensor of the checkpoint to its parts, and the rows of the arena that each of them fills."""
    places: dict[str, list[tuple[CheckpointPart, Tensor]]] = {}
    for entry, parts in parameters.items():
        row = 0
        for part in parts:
            num_rows = part.local_shape[0]
            places.setdefault(part.name, []).append((part, views[entry][row : row + num_rows]))
            row += num_rows
    return places


def _check_tensor(name: str, entry: TensorEntry, part: CheckpointPart) -> None:
    if not part.has_shape(entry.shape):
        raise ModelError(
            f"{entry.path}: tensor {name} has shape {list(entry.shape)}, config.json asks for {list(part.stored_shape)}"
        )
    if entry.dtype not in part.stored_dtypes:
        raise ModelError(f"{entry.path}: tensor {name} is {entry.dtype}; supported are {', '.join(part.stored_dtypes)}")


def _check_finite(read: Read) -> None:
    """Refuse NaN and infinity: a single one makes every output of the model meaningless."""
    path, name, target = read.entry.path, read.name, read.target
    if not target.numel():
        return
    if target.dtype == FP8:  # whose only other values are NaN
        if not bool((target.view(torch.uint8) & 0x7F == 0x7F).any()):
            return
    elif bool(torch.isfinite(torch.stack(torch.aminmax(target))).all()):  # both are NaN if any is
        return
    with safe_open(path, framework="pt", device="cpu") as file:
        is_stored_finite = bool(torch.isfinite(file.get_tensor(name).float()).all())
    if is_stored_finite:
        dtype = str(target.dtype).removeprefix("torch.")
        raise ModelError(f"{path}: tensor {name} has values too large for {dtype}; choose another model.dtype")
    raise ModelError(f"{path}: tensor {name} has values that are not finite (NaN or infinity)")


def _renamed(spec: ModelSpec, tensors: dict[str, TensorEntry]) -> dict[str, str]:
    """Name the tensor that another one stands for.

    A tied model may have been saved with its LM head only, and scales of whole matrices have two names.
    """
    renamed = {LM_HEAD: EMBEDDING} if spec.tied_embeddings and EMBEDDING not in tensors else {}
    if spec.weight_format is not None and spec.weight_format.granularity == "tensor":
        for other, own in OTHER_SCALE_NAMES:
            renamed |= {name: name.removesuffix(other) + own for name in tensors if name.endswith(other)}
    return renamed


def _is_harmless(name: str, spec: ModelSpec) -> bool:
    """Whether a tensor adds nothing.

    Harmless are: old rotary frequencies; a copy of a tied LM head; a layer that drafts tokens; scales of keys and
    values if KV is not in FP8; scales of queries; scales of inputs that are computed anyway, of experts and of the LM
    head.
    """
    if spec.experts is not None and ".experts." in name and name.endswith(_INPUT_SCALES):
        return spec.weight_format is not None and spec.weight_format.has_input_scales
    if spec.kv_format is None and any(name.endswith(pair) for pair in KV_SCALE_NAMES):
        return True
    if name.endswith(QUERY_SCALE_NAMES) or (name.startswith("lm_head.") and name.endswith(_INPUT_SCALES)):
        return True
    layer = name.removeprefix("model.layers.").partition(".")[0]
    if spec.family.has_draft_layers and (
        name.startswith(("mtp.", "model.mtp")) or (layer.isdecimal() and int(layer) >= spec.num_layers)
    ):
        return True
    return name.endswith("rotary_emb.inv_freq") or (spec.tied_embeddings and name == LM_HEAD)
