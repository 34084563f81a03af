"""Files of a model folder: JSON documents and headers of safetensors files, read with limits.

A folder may come from anywhere. Every function here ends in a `ModelError` that names the file, and reads no more than
a stated number of bytes before it has checked them. Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hbserve.errors import InvalidRequestError, ModelError
from hbserve.model_families.with_images import text_document, text_tensors
from hbserve.sampling_params import SamplingParams

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MODELOPT_FILE = "hf_quant_config.json"

MAX_JSON_BYTES = 128 << 20
"""The largest tokenizer.json known has 35 MB."""

SIZES = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "max_position_embeddings": (1 << 31) - 1,
}
"""Sizes in a config.json and their upper bounds; each is at least 1. The bounds are far above every published model:
they keep a wrong number from taking memory before the weights are compared with it."""

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Keys of generation_config.json that are defaults of requests; `SamplingParams` gives them the same meaning."""

_COMPARED_BYTES = 8 << 20
_MAX_REASON_CHARACTERS = 500


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a safetensors file.

    Attributes:
        name: as in the file.
        dtype: safetensors' name, such as ``BF16``.
        begin, end: its bytes in the file.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_bytes(path: Path) -> bytes:
    """Read a file that is no weights.

    Raises:
        ModelError: the file cannot be read, is too large, or is none: a pipe would have no end.
    """
    try:
        status = path.stat()
        problem = "" if stat.S_ISREG(status.st_mode) else "it is not a regular file"
        if status.st_size > MAX_JSON_BYTES:
            problem = f"it has {status.st_size} bytes, more than {MAX_JSON_BYTES}"
        if not problem:
            return path.read_bytes()
    except OSError as error:
        problem = error.strerror or repr(error)
    raise ModelError(f"cannot read {path}: {problem}")


def read_text(path: Path) -> str:
    """Read a text in UTF-8.

    Raises:
        ModelError: as `read_bytes`, or if it is no such text.
    """
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not text in UTF-8: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelError: as `read_bytes`, or if it holds something else.
    """
    data = read_bytes(path)
    try:
        document = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ModelError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise ModelError(f"{path} is not a JSON object, but {shown(document)}")
    return document


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json, and check the sizes in it. If the model has images, return that of its text part.

    NVIDIA's Model Optimizer may have written the format of the weights to a file of its own.

    Raises:
        ModelError: naming file and key.
    """
    path = folder / "config.json"
    document = text_document(read_json(path))
    check_sizes(document, path)
    if not document.get("quantization_config") and is_there(folder / MODELOPT_FILE):
        quantization = read_json(folder / MODELOPT_FILE).get("quantization")
        if isinstance(quantization, dict) and quantization.get("quant_algo") is not None:
            document["quantization_config"] = {"quant_method": "modelopt", **quantization}
    return document


def check_sizes(document: dict[str, Any], path: Path) -> None:
    """Check the sizes in a description of a model, and make them integers.

    Args:
        path: of the file that it is from.

    Raises:
        ModelError: naming file and key.
    """
    for key, bound in SIZES.items():
        value = document.get(key)
        if value is not None:
            number = whole_number(value)
            if number is None or not 1 <= number <= bound:
                raise ModelError(f"{path}: {key} must be an integer in 1..{bound}, got {shown(value)}")
            document[key] = number


def is_eagle3_head(folder: Path) -> bool:
    """Whether a folder's config.json describes an EAGLE-3 head; False if the file is not there or not readable."""
    try:
        document = read_json(folder / "config.json")
    except ModelError:
        return False
    names = document.get("architectures")
    is_named = isinstance(names, list) and any(isinstance(name, str) and "eagle3" in name.lower() for name in names)
    if is_named or document.get("speculators_model_type") == "eagle3":
        return True
    return document.get("draft_vocab_size") is not None


def read_sampling_defaults(folder: Path) -> dict[str, Any]:
    """Read the sampling parameters that the model's authors recommend, from generation_config.json.

    The result holds those of `SAMPLING_DEFAULTS` that the file has; it is empty without a file.

    Raises:
        ModelError: naming file and key.
    """
    path = folder / "generation_config.json"
    document = read_json(path) if is_there(path) else {}
    defaults: dict[str, Any] = {}
    for key in SAMPLING_DEFAULTS:
        value = document.get(key)
        if value is not None:
            number = whole_number(value)
            defaults[key] = value if number is None else number
            try:
                SamplingParams(**{key: defaults[key]})
            except InvalidRequestError as error:
                raise ModelError(f"{path}: {error}; correct it, or set model.generation_config: none") from None
    return defaults


def is_there(path: Path) -> bool:
    """Whether a folder has an entry of that name; a link to nowhere is one, and reading it an error."""
    return os.path.lexists(path)


def whole_number(value: object) -> int | None:
    """Return a JSON number without a fraction as an integer (5.0 is 5), and None for anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def shown(value: object) -> str:
    """Show a value from a file in an error, in a few dozen characters."""
    try:
        text = json.dumps(value)
    except (RecursionError, ValueError, TypeError):  # an integer may have more digits than Python writes
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def reason_of(error: BaseException) -> str:
    """Return the text of a library's error in one line of bounded length: it may quote what a file holds."""
    return " ".join(str(error)[: 2 * _MAX_REASON_CHARACTERS].split())[:_MAX_REASON_CHARACTERS] or type(error).__name__


def checkpoint_files(folder: Path) -> list[Path]:
    """List the safetensors files of a model folder.

    If there is a ``model.safetensors``, it is the whole model, as for transformers: an index beside it is left from
    an earlier save.

    Raises:
        ModelError: the folder has none, or its index names a file that is not there.
    """
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors files are read")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} is not a safetensors index: weight_map must name a file for each tensor")
    for name in weight_map.values():
        is_name = isinstance(name, str) and Path(name).name == name
        if not is_name or not _is_file(folder / name):
            raise ModelError(f"{index} names {shown(name)}, which is not a file of {folder}")
    return [folder / name for name in sorted(set(weight_map.values()))]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # such as a name that is too long, or holds half a surrogate pair
        return False


def checkpoint_tensors(folder: Path) -> dict[str, TensorEntry]:
    """List the tensors of a model folder, by name. If the model has images, list those of its text part.

    Raises:
        ModelError: naming the file that cannot be read.
    """
    entries = {entry.name: entry for path in checkpoint_files(folder) for entry in _header(path)}
    return {name: entries[stored] for stored, name in text_tensors([*entries]).items()}


def _header(path: Path) -> Iterator[TensorEntry]:
    """Read a safetensors file's header: 8 bytes of header length, a JSON header, and the data."""
    try:
        with safe_open(path, framework="np"):
            pass  # the library has checked the header, its offsets, and the size of the file
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
            yield TensorEntry(path, name, entry["dtype"], tuple(entry["shape"]), begin, end)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{path} cannot be read: {reason_of(error)}") from None
    except RecursionError:
        raise ModelError(f"{path} cannot be read: its header is nested too deeply") from None


def have_equal_bytes(first: TensorEntry, second: TensorEntry) -> bool:
    """Compare two tensors byte by byte, up to the first difference."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.path.open("rb") as first_file, second.path.open("rb") as second_file:
        first_file.seek(first.begin)
        second_file.seek(second.begin)
        remaining = first.end - first.begin
        while remaining > 0:
            num_bytes = min(remaining, _COMPARED_BYTES)
            if first_file.read(num_bytes) != second_file.read(num_bytes):
                return False
            remaining -= num_bytes
    return True
