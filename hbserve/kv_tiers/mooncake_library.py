"""Mooncake's library and binaries, and the address by which its master is reached; imports no torch."""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
from pathlib import Path
from typing import Any

from hbserve.config import StoreTierConfig
from hbserve.errors import HBServeError, StartupError

_INSTALL = (
    "install mooncake-transfer-engine-cuda13 (with a GPU), or mooncake-transfer-engine-non-cuda; "
    "and Debian's libibverbs1"
)


_CONNECT_TIMEOUT_S = 1.0
_ENVIRONMENT = {"MC_RPC_TIMEOUT_MS": "1000", "MC_RPC_CONNECT_TIMEOUT_MS": "1000", "MC_STORE_CLIENT_SETUP_RETRIES": "1"}
"""Limits of what the library asks the master; by default it waits for 30 s, and 20 times. No Python runs in the process
while it connects."""


class MooncakeTierError(HBServeError):
    """The Mooncake Store does not do what it should."""


def load_library() -> Any:
    """Import the library, with few lines in the log: failures are events of this system.

    Raises:
        StartupError: if it is missing.
    """
    os.environ.pop("MC_LOG_DIR", None)  # with it the library ends the process
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        library = importlib.import_module("mooncake.store")
    except ImportError as error:
        raise StartupError(f"kv_cache.store.backend mooncake: {error}; {_INSTALL}") from None
    from hbserve.kv_transfer.one_sided.mooncake import quiet_log

    quiet_log(library)
    return library


def local_address(config: StoreTierConfig) -> str:
    """Return the address of this host from which the master is reached.

    Raises:
        MooncakeTierError: if its name is unknown here, or there is no way to it.
    """
    host, port = config.address
    try:
        [(family, *_, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # which sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise MooncakeTierError(f"kv_cache.store.master: {host}: {error.strerror}") from None


def no_answer(config: StoreTierConfig, reason: str) -> MooncakeTierError:
    """Return the error of a master that does not answer, with what to do."""
    text = f"kv_cache.store: the master at {config.master} does not answer: {reason}"
    return MooncakeTierError(f"{text}; `hbserve store` with this configuration starts one on that host")


def check_answers(config: StoreTierConfig) -> None:
    """Connect to the master.

    Raises:
        MooncakeTierError: if it does not answer.
    """
    try:
        socket.create_connection(config.address, _CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise no_answer(config, str(error.strerror or error)) from None


def binary(name: str) -> str:
    """Return the path of one of the wheel's programs.

    Raises:
        StartupError: if it is not installed.
    """
    spec = importlib.util.find_spec("mooncake")
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in folders:
        path = Path(folder) / name
        if os.access(path, os.X_OK):
            return str(path)
    raise StartupError(f"kv_cache.store.backend mooncake: there is no {name}; {_INSTALL}")
