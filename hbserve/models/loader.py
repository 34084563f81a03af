"""Reads safetensors checkpoints: fills the weight arena (or with random weights), and fingerprints a model."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hbserve.errors import ModelError
from hbserve.model_spec import ModelSpec
from hbserve.models.weights import CheckpointPart, WeightTable, checkpoint_parts

_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_FLOAT_DTYPES = ("F64", "F32", "BF16", "F16")
_DUMMY_STD = 0.02
_DUMMY_PERIOD_ELEMENTS = 1_048_583
"""Period of the repeated noise: a prime, so no two rows of a matrix are equal."""

_SAMPLE_BYTES = 256
_FINGERPRINT_CHARACTERS = 16


def load_weights(
    folder: str | Path, spec: ModelSpec, table: WeightTable, arena: Tensor, tp_rank: int = 0, tp_size: int = 1
) -> None:
    """Copy a checkpoint into the arena, converted to the table's dtypes.

    Args:
        folder: holds ``model.safetensors``, or the files that ``model.safetensors.index.json`` names.
        table: table of the same rank.

    Raises:
        ModelError: a tensor is missing, unreadable, of a wrong shape or dtype, or has no place in the model. The text
            names file and tensor.
    """
    folder = Path(folder)
    places = _places(spec, table.views(arena), tp_rank, tp_size)
    filled: set[str] = set()
    paths = checkpoint_files(folder)
    for path in paths:
        for name, source in _tensors(path):
            if name in places:
                part, target = places[name]
                _check_tensor(path, name, source, part)
                index = (slice(None),) * part.dim + (slice(part.start, part.stop),)
                target.copy_(source[index])
                filled.add(name)
            elif not _is_harmless(name, spec):
                raise ModelError(f"{path}: tensor {name} has no place in {spec.architecture} as config.json has it")
    missing = [name for name in places if name not in filled]
    if missing:
        place = paths[0] if len(paths) == 1 else f"{folder} ({len(paths)} files)"
        expected = list(places[missing[0]][0].shape)
        others = f", nor {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{place}: there is no tensor {missing[0]} of shape {expected}{others}")


def fill_dummy_weights(table: WeightTable, arena: Tensor, seed: int) -> None:
    """Fill the arena with normal noise of standard deviation 0.02, and norms with ones.

    The same seed gives the same weights on the same kind of device. All tensor-parallel ranks must use the same seed,
    because the weights that they have in common must be equal.
    """
    views = table.views(arena)
    generator = torch.Generator(arena.device).manual_seed(seed)
    noise = torch.empty(_DUMMY_PERIOD_ELEMENTS, device=arena.device).normal_(0, _DUMMY_STD, generator=generator)
    dtype = views["embedding"].dtype
    noise = noise.to(dtype)
    flat = arena[: table.num_bytes].view(dtype)
    whole = flat[: flat.numel() // _DUMMY_PERIOD_ELEMENTS * _DUMMY_PERIOD_ELEMENTS].view(-1, _DUMMY_PERIOD_ELEMENTS)
    whole.copy_(noise.expand_as(whole))
    flat[whole.numel() :].copy_(noise[: flat.numel() - whole.numel()])
    for name, view in views.items():
        if name.endswith("norm"):
            view.fill_(1)


def _places(
    spec: ModelSpec, views: dict[str, Tensor], tp_rank: int, tp_size: int
) -> dict[str, tuple[CheckpointPart, Tensor]]:
    """Map each tensor of the checkpoint to the rows of the arena that it fills."""
    places = {}
    for entry, parts in checkpoint_parts(spec, tp_rank, tp_size).items():
        row = 0
        for part in parts:
            num_rows = part.local_shape[0]
            places[part.name] = part, views[entry][row : row + num_rows]
            row += num_rows
    return places


def checkpoint_files(folder: Path) -> list[Path]:
    """List the safetensors files of a model folder.

    Raises:
        ModelError: the folder has none, or its index names a file that is not there.
    """
    index, single = folder / _INDEX_FILE, folder / _SINGLE_FILE
    if not index.is_file():
        if not single.is_file():
            raise ModelError(f"{folder} has neither {_SINGLE_FILE} nor {_INDEX_FILE}; only safetensors files are read")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is not a safetensors index: {error}") from None
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"{index} names {name}, which is not a file of {folder}")
    return [folder / name for name in names]


def _tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Iterate over names and lazy slices of a file's tensors."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118, the file is no mapping
                yield name, file.get_slice(name)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None


def _check_tensor(path: Path, name: str, source: Any, part: CheckpointPart) -> None:
    shape = tuple(source.get_shape())
    if shape != part.shape:
        raise ModelError(f"{path}: tensor {name} has shape {list(shape)}, config.json asks for {list(part.shape)}")
    if source.get_dtype() not in _FLOAT_DTYPES:
        raise ModelError(f"{path}: tensor {name} is {source.get_dtype()}; supported are {', '.join(_FLOAT_DTYPES)}")


def _is_harmless(name: str, spec: ModelSpec) -> bool:
    """Whether a tensor adds nothing: rotary frequencies of older checkpoints, or a copy of a tied LM head."""
    return name.endswith("rotary_emb.inv_freq") or (spec.tied_embeddings and name == "lm_head.weight")


def model_fingerprint(folder: str | Path, spec: ModelSpec, dummy_seed: int | None = None) -> str:
    """Compute a short name that is equal for equal architecture and weights, however files divide the weights.

    It covers each tensor's name, dtype, shape and 256 bytes in its middle: a fine-tuned model differs there.

    Args:
        dummy_seed: seed of random weights, which need no files; None: the weights are the folder's.

    Raises:
        ModelError: the weights cannot be read.
    """
    digest = hashlib.sha256(repr(spec).encode())
    if dummy_seed is not None:
        digest.update(f"dummy {dummy_seed}".encode())
        return digest.hexdigest()[:_FINGERPRINT_CHARACTERS]
    samples: dict[str, bytes] = {}
    for path in checkpoint_files(Path(folder)):
        try:
            samples |= _samples(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise ModelError(f"{path} cannot be read: {error}") from None
    for name in sorted(samples):
        digest.update(name.encode() + samples[name])
    return digest.hexdigest()[:_FINGERPRINT_CHARACTERS]


def _samples(path: Path) -> dict[str, bytes]:
    """Sample each tensor of a safetensors file, which is 8 bytes of header length, a JSON header, and the data."""
    samples = {}
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            file.seek(8 + header_bytes + max(begin, (begin + end - _SAMPLE_BYTES) // 2))
            data = file.read(min(_SAMPLE_BYTES, end - begin))
            samples[name] = json.dumps([entry["dtype"], entry["shape"]]).encode() + data
    return samples
