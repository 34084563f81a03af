"""A folder of the cache is whole or not there, whatever happens to the process that makes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hbserve.cache_folder import CACHE_VARIABLE
from hbserve.errors import ModelError
from hbserve.model_store.cache import kept_folder

MAKER = """
import os, sys, time
from pathlib import Path
from hbserve.model_store.cache import kept_folder

def make(folder):
    assert not any(folder.iterdir())
    (folder / "half").write_text("")
    with open(sys.argv[1], "a") as log:
        log.write("made ")
    time.sleep(0.5)
    if sys.argv[2] == "dies":
        os._exit(3)
    (folder / "whole").write_text("")

print(sorted(path.name for path in kept_folder("model", make).iterdir()))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def start(log: Path, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", MAKER, str(log), how], stdout=subprocess.PIPE, text=True)


def test_one_process_makes_it_and_another_that_dies_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    dead = start(log, "dies")
    assert dead.wait(60) == 3
    assert not (cache / "model").exists()
    makers = [start(log, "lives"), start(log, "lives")]
    for maker in makers:
        output, _ = maker.communicate(timeout=60)
        assert output.strip() == "['half', 'whole']"
    assert log.read_text() == "made made "
    assert sorted(path.name for path in cache.iterdir()) == ["model", "model.lock"]


def test_a_fault_keeps_nothing_and_says_where(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise ModelError("no")

    with pytest.raises(ModelError, match="no"):
        kept_folder("model", fail)
    assert not (cache / "model").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=r"cannot write .*HBSERVE_CACHE names another folder"):
        kept_folder("model", fail)
