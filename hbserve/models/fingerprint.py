"""Whether two folders hold the same model, without reading all of it."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from hbserve.errors import ModelError
from hbserve.model_spec import ModelSpec
from hbserve.models.loader import checkpoint_files

_SAMPLE_BYTES = 256
_NUM_CHARACTERS = 16


def model_fingerprint(folder: str | Path, spec: ModelSpec, dummy_seed: int | None = None) -> str:
    """A short name that is equal where architecture and weights are, however they are spread over files.

    Of every tensor it takes name, type, shape and 256 bytes in its middle: a fine-tuned model differs there.

    Args:
        dummy_seed: of random weights, which need no files; None: they are the folder's.

    Raises:
        ModelError: if the weights cannot be read.
    """
    digest = hashlib.sha256(repr(spec).encode())
    if dummy_seed is not None:
        digest.update(f"dummy {dummy_seed}".encode())
        return digest.hexdigest()[:_NUM_CHARACTERS]
    samples: dict[str, bytes] = {}
    for path in checkpoint_files(Path(folder)):
        try:
            samples |= _samples(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise ModelError(f"{path} cannot be read: {error}") from None
    for name in sorted(samples):
        digest.update(name.encode() + samples[name])
    return digest.hexdigest()[:_NUM_CHARACTERS]


def _samples(path: Path) -> dict[str, bytes]:
    """Of each tensor in a file of safetensors: eight bytes of length, a JSON header, the data."""
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
