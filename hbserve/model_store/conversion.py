"""Start of the process that converts a GGUF file into a folder: see `hbserve.model_store.gguf_process`.

The conversion needs torch, which the API server does without, and much memory, which is free again at its end.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

from hbserve.cache_folder import cache_folder
from hbserve.errors import ModelError
from hbserve.model_store.cache import kept_folder, tell

_VERSION = 1
_TIMEOUT_S = 3600
_MAX_REASON_CHARACTERS = 500


def check_gguf_is_installed() -> None:
    """Refuse before anything is downloaded.

    Raises:
        ModelError: the package ``gguf`` is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("the model is in a GGUF file, which needs the package gguf: pip install 'hbserve[gguf]'")


def converted(gguf: Path) -> Path:
    """Return the folder that a GGUF file was converted into; convert the file if it is new or has changed.

    Raises:
        ModelError: naming the file, and what HBServe cannot read in it.
    """
    status = gguf.stat()
    identity = f"{gguf.resolve()} {status.st_size} {status.st_mtime_ns} {_VERSION}"
    mark = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:16]

    def make(folder: Path) -> None:
        tell(f"converting {gguf} ({status.st_size / 1e9:.2f} GB), once; the result is kept in {cache_folder()}")
        convert_apart(gguf, folder)

    return kept_folder(f"gguf-{gguf.stem}-{mark}", make)


def convert_apart(gguf: Path, folder: Path, keep_float32: bool = False) -> None:
    """Write configuration, weights and tokenizer of a GGUF file into a folder, in a process of its own.

    Args:
        keep_float32: write the weights in float32, whatever they are in the file.


    Raises:
        ModelError: naming the file, and what HBServe cannot read in it.
    """
    check_gguf_is_installed()
    command = [sys.executable, "-m", "hbserve.model_store.gguf_process", str(gguf), str(folder)]
    command += ["float32"] if keep_float32 else []
    try:
        done = subprocess.run(command, timeout=_TIMEOUT_S, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    except subprocess.TimeoutExpired:
        raise ModelError(f"the conversion of {gguf} took more than {_TIMEOUT_S} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"its process ended with exit code {done.returncode}"]
        raise ModelError(f"cannot convert {gguf}: {lines[-1][:_MAX_REASON_CHARACTERS]}")
