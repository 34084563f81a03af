"""HBServe from a wheel in an environment of its own: the command serves a model, far from any clone.

The environment is new; only the libraries that HBServe needs are those of the tests' own environment, seen through a
path file, because a download of torch would take minutes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hbserve import __version__
from hbserve.tokenizer import Tokenizer
from tests.support import tiny_tokenizers
from tests.support.engines import greedy_reference
from tests.support.model_zoo import save_model
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

DEADLINE_S = 120.0
NUM_TOKENS = 12
IN_PYTHON = """
import json, sys
import hbserve
from hbserve import LLM, SamplingParams
from hbserve.model_source import SHAPES

if __name__ == "__main__":
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(sys.argv[1], mode="unified", device="cpu", dtype="float32", num_blocks=64, log_level="WARNING") as llm:
        [answer] = llm.generate(["the cat sat on"], sampling, use_tqdm=False)
    shapes = sorted(path.name for path in SHAPES.iterdir())
    print(json.dumps([hbserve.__file__, shapes, answer["text"]]))
"""


@dataclass(frozen=True)
class Site:
    """An installed wheel, and an empty folder to work in."""

    prefix: Path
    folder: Path

    def run(self, program: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [str(self.prefix / "bin" / program), *arguments]
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            **options,
        )

    def environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("HOME", "OMP_NUM_THREADS") if name in os.environ}
        return kept | {"PATH": os.defpath, "TMPDIR": str(self.folder)}

    @contextmanager
    def serving(self, *arguments: str) -> Iterator[str]:
        """Run ``hbserve serve`` and yield its address; SIGTERM must end it without an error."""
        command = [str(self.prefix / "bin" / "hbserve"), "serve", *arguments]
        with (self.folder / "errors").open("w+") as errors:
            server = subprocess.Popen(
                command, cwd=self.folder, env=self.environment(), stdout=subprocess.PIPE, stderr=errors, text=True
            )
            try:
                assert server.stdout is not None
                line = server.stdout.readline()  # the server itself has a deadline for its start
                found = re.match(r"HBServe is ready: (\S+) \(model tiny\)", line)
                assert found, Path(errors.name).read_text()
                yield found[1]
                server.send_signal(signal.SIGTERM)
                assert server.wait(DEADLINE_S) == 0, Path(errors.name).read_text()
            finally:
                server.kill()
                server.wait()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with HBServe from a wheel, which was built from a source archive."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("hbserve", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build("build_sdist", source, folder)
    [archive] = folder.glob("hbserve-*.tar.gz")
    shutil.unpack_archive(archive, folder, filter="data")
    build("build_wheel", folder / archive.name.removesuffix(".tar.gz"), folder)
    [wheel] = folder.glob("*.whl")
    prefix = folder / "environment"
    venv.create(prefix, symlinks=True)
    python = prefix / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=DEADLINE_S)
    [packages] = prefix.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return prefix


def build(what: str, source: Path, target: Path) -> None:
    program = f"from setuptools import build_meta; build_meta.{what}({str(target)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=source, check=True, capture_output=True, timeout=DEADLINE_S)


@pytest.fixture
def site(installed: Path, short_path: Path) -> Site:
    return Site(installed, short_path)


def test_the_command_knows_itself_and_what_it_ships(site: Site) -> None:
    assert site.run("hbserve", "version").stdout.startswith(f"hbserve {__version__}\n")
    assert "usage: hbserve COMMAND" in site.run("python", "-m", "hbserve").stdout
    assert site.run("hbserve", "serve", "nowhere").stderr.startswith("error: MODEL: there is no folder 'nowhere'")
    simulated = site.run("hbserve", "simulate", "--goodput", "ttft:400,tpot:25", "--rate", "2", "--duration", "5")
    assert "unified@512" in simulated.stdout, simulated.stderr


def test_a_model_is_served_and_answers_in_chat_and_in_python(site: Site) -> None:
    """The server runs from the printed configuration of a command, with a shipped file and flags."""
    model = site.folder / "tiny"
    model.mkdir()
    tokenizer = Tokenizer(tiny_tokenizers.byte_level(model))
    reference = save_model(model, "qwen3", vocab_size=352)

    flags = ["--port", "0", "--model.dtype", "float32", "--performance.num_blocks", "64", "--log-level", "WARNING"]
    printed = site.run("hbserve", "config", "tiny", "--config", "pd_disagg_cpu", *flags)
    assert printed.returncode == 0, printed.stderr
    (site.folder / "system.yaml").write_text(printed.stdout)
    assert "mode disaggregated, model tiny" in site.run("hbserve", "config", "check", "system.yaml").stdout

    with site.serving("--config", "system.yaml") as url:
        chat = ["--url", url, "--temperature", "0", "--max-tokens", str(NUM_TOKENS)]
        answer = site.run("hbserve", "chat", *chat, input="hi\n")
        top = site.run("hbserve", "top", "--url", url, "--once")
    expected = tokenizer.decode(
        greedy_reference(reference, tokenizer.encode_chat([{"role": "user", "content": "hi"}]), NUM_TOKENS)
    )
    assert answer.stdout.startswith("tiny. /help shows the commands.\n"), answer.stderr
    assert expected in answer.stdout
    assert "prefill-0 (prefill, ready)" in top.stdout, top.stderr

    (site.folder / "program.py").write_text(IN_PYTHON)
    done = site.run("python", "program.py", "tiny")
    assert done.returncode == 0, done.stderr
    path, shapes, text = json.loads(done.stdout)
    assert Path(path).is_relative_to(site.prefix)
    assert shapes == sorted(path.name for path in (ROOT / "configs" / "models").iterdir())
    assert text == tokenizer.decode(greedy_reference(reference, tokenizer.encode("the cat sat on"), NUM_TOKENS))
