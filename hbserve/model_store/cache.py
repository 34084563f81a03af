"""Folders that are made once and kept in the cache folder, each whole or not there."""

from __future__ import annotations

import fcntl
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hbserve.cache_folder import CACHE_VARIABLE, cache_folder
from hbserve.errors import ModelError

_MAX_WAIT_S = 3600.0
_POLL_INTERVAL_S = 0.2


def kept_folder(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder of this name in the cache; make it first if it is not there.

    One process makes it, and others wait for that. The folder gets its name when it is complete, so a process that
    is killed leaves only a ``.part`` folder, which the next one removes.

    Args:
        make: fills a folder, which exists and is empty. If it fails, no folder is kept.

    Raises:
        ModelError: the cache cannot be written, or another process takes more than an hour.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{name}.lock")):
            if not folder.is_dir():
                part = folder.with_name(f"{name}.part")
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                try:
                    make(part)
                    part.rename(folder)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        where = error.filename or folder
        raise ModelError(f"cannot write {where}: {error.strerror}; {CACHE_VARIABLE} names another folder") from None
    return folder


def tell(text: str) -> None:
    """Tell the user what takes so long. Standard output is for the results of programs."""
    print(f"hbserve: {text}", file=sys.stderr, flush=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    deadline = time.monotonic() + _MAX_WAIT_S
    has_told = False
    with path.open("w") as lock:  # the system unlocks the file when its process ends
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not has_told:
                    tell(f"another process makes {path.with_suffix('')}; waiting for it")
                    has_told = True
            if time.monotonic() > deadline:
                raise ModelError(f"another process has held {path} for an hour; end it, and try again")
            time.sleep(_POLL_INTERVAL_S)
        yield
