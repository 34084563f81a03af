"""The example programs, run as a reader would run them; what they print is right.

Most have their children forked, which saves their imports.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import fork_server
from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples"
DEADLINE_S = 180.0
# The programs take what device there is; here that is the CPU.
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": ""}

sys.path.insert(0, str(EXAMPLES))

import demo_language  # noqa: E402


def run(name: str, folder: Path, *arguments: str, forks: bool = True) -> str:
    """What an example prints, started from another folder."""
    command = [str(EXAMPLES / name), *arguments]
    done = subprocess.run(
        fork_server.program(*command) if forks else [sys.executable, *command],
        cwd=folder,
        env=ENVIRONMENT | fork_server.environment() if forks else ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def answer_to(question: str) -> str:
    """The one right answer to a question about a fact."""
    return next(q.answer for q in demo_language.fact_questions() if q.messages[-1]["content"] == question)


def test_program_in_the_readme(tmp_path: Path) -> None:
    [program] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "program.py").write_text(program)
    assert run(str(tmp_path / "program.py"), ROOT, forks=False) == "47 + 38 = 85.\n"


def test_quick_start_async(tmp_path: Path) -> None:
    output = run("quick_start_async.py", tmp_path, str(EXAMPLES / "models" / "hbserve-demo"))
    responses = [part.split("\nPrompt: ")[0].strip() for part in output.split("Response: ")[1:]]
    assert responses == [answer_to("What is prefill?"), answer_to("What is decode?")]


def test_quick_start_sync(tmp_path: Path) -> None:
    lines = run("quick_start_sync.py", tmp_path, forks=False).splitlines()
    assert lines == [answer_to("Hello!"), answer_to("What is HBServe?")]


def test_system_stats(tmp_path: Path) -> None:
    lines = [line.strip() for line in run("system_stats.py", tmp_path).splitlines()]
    for expected in ("total requests: 10", "completed requests: 10", "success rate: 100.00%"):
        assert expected in lines
    assert lines.count("status: ready") == 2
    assert lines.count("active requests: 0") == 2
    # A sender may report transfers, which leave as one batch, after the requests have ended; test_serving_metrics.py
    # waits until all are counted.
    [moved] = [
        found for line in lines if (found := re.fullmatch(r"prefill-0->decode-0: \d+ bytes in (\d+) transfers", line))
    ]
    assert int(moved[1]) <= 10


def test_custom_kv_transfer(tmp_path: Path) -> None:
    answer, link = run("custom_kv_transfer.py", tmp_path).splitlines()
    assert answer == "You said eagle maple."
    assert re.fullmatch(r"prefill-0->decode-0: [1-9]\d+ bytes in 1 file\(s\)", link)


def test_custom_scheduler(tmp_path: Path) -> None:
    lines = [line.split(" tokens: ") for line in run("custom_scheduler.py", tmp_path).splitlines()]
    assert [answer for _, answer in lines] == ["You said dog parrot."] * 4
    lengths = [int(length) for length, _ in lines]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 4


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server of the demo model, started as the README says."""
    command = [sys.executable, "scripts/start_pd_disagg.py", "--config", "configs/unified.yaml", "--port", "0"]
    tmp_path = tmp_path_factory.mktemp("server")
    with (tmp_path / "output").open("wb") as output:
        server = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=output)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not (line := (tmp_path / "output").read_text()).endswith("\n"):
            assert server.poll() is None, "the server did not start"
            assert time.monotonic() < deadline, "the server is not ready"
            time.sleep(0.05)
        yield line.removeprefix("HBServe is ready: ").split()[0]
    finally:
        server.terminate()
        assert server.wait(DEADLINE_S) == 0


def test_openai_client(tmp_path: Path, url: str) -> None:
    told = "Remember: dog parrot, eagle maple."
    output = run("openai_client.py", tmp_path, "--url", url, told, "What is eagle?", "What is 47 + 38?")
    assert output.splitlines() == [
        f"> {told}",
        "OK.",
        "> What is eagle?",
        "You said eagle maple.",
        "> What is 47 + 38?",
        "47 + 38 = 85.",
    ]


@pytest.mark.parametrize("local", [False, True], ids=["url", "model"])
def test_shell(url: str, local: bool) -> None:
    where = [str(EXAMPLES / "models" / "hbserve-demo")] if local else ["--url", url]
    lines = [
        "Remember: dog parrot, eagle maple.",
        "What is eagle?",
        "/stats",
        "/history",
        "/reset",
        "/history",
        "/what",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "hbserve.shell", *where, "--temperature", "0"],
        cwd=ROOT,
        env=ENVIRONMENT,
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    hello, first, second, speed, *rest = done.stdout.splitlines()
    assert hello.startswith("hbserve-demo.")
    assert (first, second) == ("OK.", "You said eagle maple.")
    assert re.match(r"[1-9]\d* tokens in [\d.]+ s; the first after \d+ ms", speed)
    start = rest.index(f"user: {lines[0]}")
    assert rest[start + 3] == "assistant: You said eagle maple."
    assert rest[start + 4] == "(a new conversation)"
    assert rest[start + 5] == "unknown command /what"


def test_shell_says_what_is_wrong() -> None:
    command = [sys.executable, "-m", "hbserve.shell", "--url", "http://127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=DEADLINE_S)
    assert done.returncode == 1
    assert done.stderr.startswith("error: 127.0.0.1:9: ")
    assert "Traceback" not in done.stderr


def test_semi_pd(tmp_path: Path) -> None:
    output = run("semi_pd/semi_pd_example.py", tmp_path)
    assert "split: prefill 60 %, decode 40 %" in output
    assert "47 + 38 = 85." in output
    assert "always the same: True" in output


def test_slo_aware_example(tmp_path: Path) -> None:
    arguments = ["--model-path", str(EXAMPLES / "models" / "hbserve-demo"), "--simulation-cycles", "18"]
    targets = ["--ttft-target", "10", "--tpot-target", "50", "--initial-prefill-sm", "60", "--initial-decode-sm", "40"]
    output = run("semi_pd/slo_aware_example.py", tmp_path, *arguments, *targets)
    asked = "the split that was asked for: prefill 60 %, decode 40 % (workers: decode at 40 %, prefill at 60 %)"
    assert asked in output
    cycles = re.findall(r"^ *\d+ +\d+ clients? .*TTFT p95 +[\d.]+ ms .* split +(\d+/ *\d+)$", output, re.MULTILINE)
    assert len(cycles) == 18
    assert cycles[0] == "60/ 40"
    assert "a target is missed; the controller starts to watch" in output
    [moved] = re.findall(r"^decision: \(60, 40\) -> \((\d+), \d+\), because: \S+", output, re.MULTILINE)
    assert "the split in force now: prefill " + moved in output
    assert re.search(r"gain: mean TTFT [\d.]+ ms under \(60, 40\) -> [\d.]+ ms under", output)
