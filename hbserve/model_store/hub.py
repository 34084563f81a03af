"""Models of the Hugging Face hub, with its own client: cache, resumed downloads, progress bars and tokens are its.

The token (``HF_TOKEN``, or that of ``hf auth login``) is used in this process only. Other processes get the folder.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from hbserve.errors import ModelError
from hbserve.model_store.cache import tell

_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model*")
_SNAPSHOT = re.compile(r"/models--(?P<org>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>\w+)$")
_DUPLICATES = ("*/*", "consolidated*")
"""Other formats of the same weights: folders such as onnx/, and Mistral's own names."""


def name_in_hub_cache(folder: str) -> str | None:
    """Return ``org/name@commit`` of a folder in a cache of the hub's client; None for any other folder."""
    found = _SNAPSHOT.search(folder)
    return None if found is None else f"{found['org']}/{found['name']}@{found['commit']}"


def fetch_from_hub(name: str) -> Path:
    """Return the folder of ``org/name`` or ``org/name@revision`` in the hub's cache; download what is missing there.

    Raises:
        ModelError: the hub refuses, or cannot be reached and the cache does not have the model.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    repository, _, revision = name.partition("@")
    wanted: dict[str, Any] = {
        "repo_id": repository,
        "revision": revision or None,
        "allow_patterns": [*_FILES],
        "ignore_patterns": [*_DUPLICATES],
    }
    try:
        with suppress(DryRunError):  # without a network; the cache may have the model
            _announce(name, snapshot_download(**wanted, dry_run=True))
        return Path(snapshot_download(**wanted))
    except ModelError:
        raise
    except GatedRepoError:
        raise ModelError(
            f"{repository} is gated: ask for access on its page of the hub, then set HF_TOKEN or run hf auth login"
        ) from None
    except RevisionNotFoundError:
        what = f"{repository} has no revision {revision!r} on the hub"
        raise ModelError(f"{what}; give a branch, tag or commit of its page, or leave out @{revision}") from None
    except RepositoryNotFoundError:
        what = f"there is neither a folder {repository} here nor a repository of that name on the hub"
        raise ModelError(f"{what}; a private one needs HF_TOKEN or hf auth login") from None
    except Exception as error:  # of the client, its HTTP library, or the system
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        command = f"hf download {repository}{f' --revision {revision}' if revision else ''} --local-dir FOLDER"
        raise ModelError(
            f"cannot download {name} from the hub: {reason}; complete files are kept, so try again; or run on a "
            f"machine with a network: {command}, copy FOLDER here, and serve FOLDER"
        ) from None


def _announce(name: str, files: Any) -> None:
    """Tell how large the download is.

    Args:
        files: the client's list of what it would download.
    """
    if not any(file.filename.endswith(".safetensors") for file in files):
        raise ModelError(f"{name} has no safetensors files; HBServe reads weights from nothing else on the hub")
    num_bytes = sum(file.file_size for file in files if file.will_download)
    if num_bytes:
        tell(f"downloading {name} from the hub: {num_bytes / 1e9:.2f} GB")
