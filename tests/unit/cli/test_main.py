"""The command ``hbserve``: its subcommands, and what they import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hbserve import __version__
from hbserve.cli.main import COMMANDS, main
from hbserve.model_spec import supported_architectures
from tests.support.paths import ROOT

LIGHT = """
import contextlib, sys
from hbserve.cli.main import main
for words in ("--help", "version", "serve --help", "config --help", "chat --help", "top --help"):
    with contextlib.suppress(SystemExit):
        main(words.split())
heavy = ("torch", "transformers", "numpy", "fastapi", "uvicorn", "ray")
print("HEAVY", [name for name in heavy if name in sys.modules])
"""


def test_help_and_version_import_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("HEAVY []\n"), done.stdout + done.stderr
    assert f"\nhbserve {__version__}\n" in done.stdout
    assert "\ntorch " in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_under_its_own_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: hbserve {name} ")
    assert main(["--help"]) == 0
    assert f"\n  {name} " in capsys.readouterr().out


def test_an_unknown_command_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serv"]) == 2
    assert capsys.readouterr().err == "hbserve: error: unknown command 'serv'; did you mean 'serve'?\n"


def test_models_are_listed_by_both_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    whole, _, text_parts = capsys.readouterr().out.partition("\nof models with images, the text part:\n")
    assert dict(line.split() for line in whole.splitlines()[1:]) == supported_architectures()
    assert "Gemma3ForConditionalGeneration" in text_parts


def test_plan_names_the_cheapest_system(capsys: pytest.CaptureFixture[str]) -> None:
    systems = ["--system", "unified@512", "--system", "semi_pd@100-100"]
    assert main(["plan", "3", "--goodput", "ttft:2000,tpot:100", "--duration", "5", *systems]) == 0
    assert "unified@512" in capsys.readouterr().out


def test_config_checks_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "system.yaml"
    path.write_text(f"mode: disaggregated\nmodel: {{path: {tmp_path}, served_name: mine}}\n")
    assert main(["config", "check", str(path)]) == 0
    assert (
        capsys.readouterr().out == f"{path} is valid: mode disaggregated, model mine, instances prefill-0, decode-0\n"
    )
    path.write_text(f"model: {{path: {tmp_path}}}\nenforce_eager: true\n")
    assert main(["config", "check", str(path)]) == 1
    assert capsys.readouterr().err.startswith(
        f"error: {path}:2: enforce_eager: unknown key; that is vLLM's name for cuda"
    )
