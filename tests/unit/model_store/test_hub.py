"""Models of the hub, by the hub's own client against a small server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hbserve.config import from_dict
from hbserve.model_store import name_of
from tests.support.hub_server import COMMIT, Hub, running_hub

NOBODY = "http://127.0.0.1:9"
FETCH = "import sys; from hbserve.model_store import fetch_model; print(fetch_model(sys.argv[1]))"
WEIGHTS = bytes(range(256)) * (48 << 10)  # the client writes parts of 10 MiB
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"a": 1}',
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"twice",
    "onnx/model.safetensors": b"thrice",
    "README.md": b"text",
}
USED = ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub(FILES) as hub:
        yield hub


def fetch(name: str, home: Path, url: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", FETCH, name]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120)


def test_what_serving_needs_is_downloaded_resumed_and_kept(hub: Hub, tmp_path: Path) -> None:
    hub.cut_after = 11 << 20
    done = fetch("org/tiny@main", tmp_path, hub.url, HF_TOKEN="hf_secret")
    folder = Path(done.stdout.strip())
    assert folder.name == COMMIT, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == USED
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert "0.01 GB" in done.stderr
    assert any(headers.get("Range", "").startswith("bytes=10485760-") for headers in hub.requests)
    assert any("hf_secret" in headers.get("Authorization", "") for headers in hub.requests)
    offline = fetch("org/tiny@main", tmp_path, NOBODY)
    assert offline.stdout == done.stdout, offline.stderr
    assert name_of(str(folder)) == f"org/tiny@{COMMIT}"
    assert name_of(str(tmp_path)) is None


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path) -> None:
    error = fetch("org/tiny@v1.0", tmp_path, NOBODY).stderr.splitlines()[-1]
    assert "cannot download org/tiny@v1.0 from the hub" in error
    assert "hf download org/tiny --revision v1.0 --local-dir FOLDER, copy FOLDER here, and serve FOLDER" in error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/gated", "org/gated is gated: ask for access"),
        ("org/tiny@lost", "org/tiny has no revision 'lost' on the hub; give a branch, tag or commit"),
        ("org/nothing", "there is neither a folder org/nothing here nor a repository of that name"),
    ],
)
def test_what_the_hub_refuses_is_said(name: str, message: str, hub: Hub, tmp_path: Path) -> None:
    assert message in fetch(name, tmp_path, hub.url).stderr.splitlines()[-1]


def test_a_name_is_that_of_a_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = from_dict({"model": {"path": "org/tiny@main"}})
    assert (config.model.path, config.served_name) == ("org/tiny@main", "org/tiny")
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    config = from_dict({"model": {"path": "org/tiny"}})
    assert (config.model.path, config.served_name) == (str(tmp_path / "org" / "tiny"), "tiny")
