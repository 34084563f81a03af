"""Classes given as they are, where the configuration takes an import path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hbserve import PdDisaggConfig
from hbserve.errors import ConfigError
from hbserve.import_path import load_class
from hbserve.kv_transfer.base import KVTransferBase
from hbserve.pd_disagg.cpu_scheduler import CpuScheduler

DEADLINE_S = 60.0


class OwnScheduler(CpuScheduler):
    """A scheduler at the top of a module."""

    class Inner(CpuScheduler):
        """One that no import path names."""


def test_a_class_becomes_its_import_path(tmp_path: Path) -> None:
    config = PdDisaggConfig(tmp_path, scheduler=OwnScheduler, kv_transfer_backend=KVTransferBase).freeze()
    assert config.performance.scheduler == f"{__name__}:OwnScheduler"
    assert config.kv_transfer.backend == "hbserve.kv_transfer.base:KVTransferBase"
    assert load_class(f"{__name__}:OwnScheduler", CpuScheduler, "key") is OwnScheduler
    text = PdDisaggConfig(str(tmp_path), scheduler=f"{__name__}:OwnScheduler").freeze()
    assert text.performance.scheduler == f"{__name__}:OwnScheduler"


def test_values_of_python_that_mean_plain_ones_are_taken(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    given: dict[str, Any] = {"tokenizer_path": tmp_path, "dtype": torch.bfloat16, "device": torch.device("cpu")}
    config = PdDisaggConfig(tmp_path, **given)
    assert config.freeze().model.dtype == "bfloat16"
    assert config.freeze().model.path == str(tmp_path)


class _Local:
    pass


@pytest.mark.parametrize(
    "value",
    [OwnScheduler.Inner, type("Made", (CpuScheduler,), {}), CpuScheduler.__init__, object(), _Local(), 1, b"x", {1: 2}],
)
def test_what_other_processes_cannot_import_is_refused_by_the_name_of_the_field(tmp_path: Path, value: Any) -> None:
    for field in ("scheduler", "kv_transfer_backend"):
        with pytest.raises(ConfigError, match=f"^{field}: "):
            PdDisaggConfig(str(tmp_path), **{field: value}).freeze()
    with pytest.raises(ConfigError, match=r"^chunk_size: "):
        PdDisaggConfig(str(tmp_path), chunk_size=OwnScheduler).freeze()  # type: ignore[arg-type]


PROGRAM = """
import sys
from hbserve import PdDisaggConfig
from hbserve.pd_disagg.cpu_scheduler import CpuScheduler

class Mine(CpuScheduler):
    pass

print(PdDisaggConfig(sys.argv[1], scheduler=Mine).freeze().performance.scheduler)
"""


def test_a_class_of_the_program_itself_has_the_name_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "own_program.py").write_text(PROGRAM)

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        command = (sys.executable, *command, str(tmp_path))
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S)

    assert run("own_program.py").stdout.strip() == "own_program:Mine"
    assert run("-m", "own_program").stdout.strip() == "own_program:Mine"
    (tmp_path / "own-program.py").write_text(PROGRAM)
    for arguments in (("own-program.py",), ("-c", PROGRAM)):
        errors = run(*arguments).stderr
        assert "scheduler: other processes cannot import __main__.Mine; define the class at the top" in errors


def test_a_module_that_fails_or_starts_a_system_when_it_is_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    start = f"from hbserve import LLM\nLLM({str(tmp_path)!r})\n"
    for name, text, why in (
        ("raises_error", "1 / 0", "division by zero"),
        ("leaves_early", "raise SystemExit('no arguments')", "no arguments"),
        ("starts_system", start, "the import of 'starts_system:Mine' starts a system"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
        with pytest.raises(ConfigError, match=f"^key: cannot import '{name}:Mine': {why}; a program that other"):
            load_class(f"{name}:Mine", CpuScheduler, "key")


def test_an_unknown_argument_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unknown argument 'chunk_sise'; did you mean 'chunk_size'"):
        PdDisaggConfig(str(tmp_path), chunk_sise=1)  # type: ignore[call-arg]
