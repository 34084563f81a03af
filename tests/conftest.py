"""Fixtures that several modules use; a module that needs another one has its own of the same name."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in our child processes; before anything imports torch

from tests.support import fetched  # noqa: F401  sets the cache folder, for child processes too
from tests.support.fork_server import ForkServer
from tests.support.http_server import api, client, http, max_model_len, scheduler, tokenizer, url  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """A shell has what it runs in the background ignore Ctrl-C; the programs that tests end by it would, too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def fork_server(request: pytest.FixtureRequest) -> Iterator[None]:
    """Children of systems that tests start are forked, not started: see `tests.support.fork_server`."""
    if request.config.option.markexpr == "gpu":  # a GPU's workers start as users start them
        yield
        return
    server = ForkServer()
    yield
    server.close()


@pytest.fixture
def short_path() -> Iterator[Path]:
    """An empty folder for sockets: their paths have 107 bytes at most, which leaves few for `tmp_path`'s."""
    with tempfile.TemporaryDirectory(prefix="hbt-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
