"""A fingerprint of a model, to compare the models of two instances without reading all weights."""

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
