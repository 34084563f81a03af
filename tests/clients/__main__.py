"""Run unmodified clients of other projects against one server: ``python -m tests.clients [NAME ...]``.

Each client is a program in this folder, as the client's documentation has it. It runs in an environment of its own,
with the versions of constraints.txt or package-lock.json. It ends with an error if an answer is wrong.

All that is made lies in a temporary folder; only the caches of uv and npm stay.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import yaml
from uv import find_uv_bin

from tests.support.paths import ROOT

HERE = Path(__file__).parent
DEMO_MODEL = ROOT / "examples" / "models" / "hbserve-demo"
KEY = "sk-clients-12345"
INSTALL_TIMEOUT_S, START_TIMEOUT_S, RUN_TIMEOUT_S = 300.0, 120.0, 150.0


class Client(NamedTuple):
    """A program, and the packages that it needs: PyPI's, or npm's if there are none."""

    program: str
    packages: tuple[str, ...] = ()


CLIENTS = {
    "lm-eval": Client("use_lm_eval.py", ("lm-eval[api]",)),
    "litellm": Client("use_litellm.py", ("litellm",)),
    "page": Client("use_page.py"),
    "openai-agents": Client("use_openai_agents.py", ("openai-agents",)),
    "langchain-openai": Client("use_langchain.py", ("langchain-openai",)),
    "pydantic-ai": Client("use_pydantic_ai.py", ("pydantic-ai-slim[openai]",)),
    "autogen": Client("use_autogen.py", ("autogen-agentchat", "autogen-ext[openai]")),
    "openai": Client("use_openai.py", ("openai",)),
    "ai-sdk (npm)": Client("use_ai_sdk.mjs"),
    "openai (npm)": Client("use_openai.mjs"),
}
"""By name; those that take longest are first."""


class Failure(Exception):
    """A program that failed, with its output."""


async def run(*command: str | Path, timeout_s: float, cwd: Path = HERE, env: dict[str, str] | None = None) -> str:
    """Run a program to its end; return its output.

    Raises:
        Failure: it failed, or took too long; then it is killed with all its children.
    """
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        cwd=cwd,
        env=env,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    output = bytearray()
    reason = ""
    try:
        async with asyncio.timeout(timeout_s):
            while piece := await process.stdout.read(1 << 16):
                output += piece
            await process.wait()
    except TimeoutError:
        reason = f"it did not end within {timeout_s:g} s"
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode != 0:
        name = Path(command[0]).name
        raise Failure(f"{output.decode(errors='replace')}\n{name}: {reason or f'exit code {process.returncode}'}")
    return output.decode(errors="replace")


@contextmanager
def page_server(folder: Path) -> Iterator[int]:
    """Serve a folder to the browser; yield the port."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def make_model(folder: Path) -> None:
    """Make a copy of the demo model that takes tools, and whose answers are the same at every run."""
    shutil.copytree(DEMO_MODEL, folder)
    shutil.copy(HERE / "chat_template.jinja", folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.0}))


@asynccontextmanager
async def hbserve(folder: Path, page_origin: str) -> AsyncIterator[asyncio.Future[str]]:
    """Start a system; yield the future address of its server, and end the system afterwards.

    Raises:
        Failure: it did not start, or did not end well.
    """
    make_model(folder / "hbserve-demo")
    config = {
        "mode": "unified",
        "model": {"path": "hbserve-demo", "device": "cpu", "dtype": "float32"},
        "gpu_instances": [{"instance_id": "worker", "instance_type": "unified", "num_threads": 1}],
        "performance": {"num_blocks": 1024},
        "server": {"port": 0, "cors_origins": [page_origin]},
        "logging": {"level": "WARNING"},
    }
    (folder / "system.yaml").write_text(yaml.safe_dump(config))
    with (folder / "server.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            ROOT / "scripts" / "start_pd_disagg.py",
            "--config",
            folder / "system.yaml",
            env=os.environ | {"HBSERVE_API_KEYS": KEY},
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    assert process.stdout is not None
    stdout = process.stdout

    async def address() -> str:
        async with asyncio.timeout(START_TIMEOUT_S):
            line = (await stdout.readline()).decode()
        if not line.startswith("HBServe is ready: "):
            raise Failure((folder / "server.log").read_text() + "\nthe server did not start")
        return line.split()[3]

    starting = asyncio.create_task(address())
    try:
        yield starting
        process.terminate()
        async with asyncio.timeout(60):
            code = await process.wait()
        log_text = (folder / "server.log").read_text()
        if code != 0 or "Traceback" in log_text:
            raise Failure(f"{log_text}\nthe server ended with exit code {code}")
    finally:
        starting.cancel()
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def install_npm(folder: Path) -> None:
    """Install npm's packages, beside the programs and the page that use them."""
    for name in ("package.json", "package-lock.json", "page.html", *(path.name for path in HERE.glob("*.mjs"))):
        shutil.copy(HERE / name, folder)
    if shutil.which("npm") is None:
        raise Failure("npm is not installed; Node.js 20 or later brings it")
    await run("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", timeout_s=INSTALL_TIMEOUT_S, cwd=folder)


async def install_python(folder: Path, packages: tuple[str, ...]) -> Path:
    """Make an environment with the packages; return its interpreter.

    Raises:
        Failure: the installation failed, or constraints.txt does not pin what was installed.
    """
    uv, python, constraints = find_uv_bin(), folder / "bin" / "python", HERE / "constraints.txt"
    await run(uv, "venv", "--quiet", "--python", sys.executable, folder, timeout_s=INSTALL_TIMEOUT_S)
    pip = (uv, "pip", "install", "--quiet", "--python", python, "--constraint", constraints)
    await run(*pip, *packages, timeout_s=INSTALL_TIMEOUT_S)
    installed = (await run(uv, "pip", "freeze", "--quiet", "--python", python, timeout_s=60)).split()
    pinned = {line.split()[0] for line in constraints.read_text().splitlines() if line and not line.startswith("#")}
    if loose := sorted(set(installed) - pinned):
        raise Failure(f"constraints.txt does not pin {', '.join(loose)}")
    return python


class Runner:
    """Installs and runs clients, one more than there are cores at a time, because each also waits.

    Attributes:
        results: by name of the client, seconds of installation and of its run; and the failure, if it failed.
    """

    def __init__(self, folder: Path, url: asyncio.Future[str], page_url: str, npm: asyncio.Future[None]) -> None:
        self.results: dict[str, tuple[float, float, Failure | None]] = {}
        self._folder, self._url, self._page_url, self._npm = folder, url, page_url, npm
        self._turns = asyncio.Semaphore((os.cpu_count() or 1) + 1)

    async def run(self, name: str, client: Client) -> None:
        """Install and run one client; print what it printed."""
        async with self._turns:
            began = time.monotonic()
            installed = began
            try:
                folder = self._folder / name
                command: list[str | Path]
                if client.packages:
                    command = [await install_python(folder, client.packages), HERE / client.program]
                else:
                    await self._npm
                    program = client.program
                    is_python = program.endswith(".py")
                    command = (
                        [sys.executable, HERE / program] if is_python else ["node", self._folder / "npm" / program]
                    )
                url = await self._url
                installed = time.monotonic()
                output = await run(*command, timeout_s=RUN_TIMEOUT_S, env=self._environment(url))
                failure = None
            except Failure as error:
                output, failure = str(error), error
        ended = time.monotonic()
        self.results[name] = (installed - began, ended - installed, failure)
        print(f"--- {name}: {'FAILED' if failure else 'passed'}\n{output.strip()}\n", flush=True)

    def _environment(self, url: str) -> dict[str, str]:
        """Return the environment of a client: nothing of this one, and caches that are removed afterwards."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self._folder),
            "HF_HUB_OFFLINE": "1",
            "MODEL": "hbserve-demo",
            "OPENAI_API_KEY": KEY,
            "OPENAI_BASE_URL": f"{url}/v1",
            "PAGE_URL": self._page_url,
        }


async def main() -> int:
    """Run the clients that are named, or all; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(CLIENTS)}; default: all")
    names: list[str] = parser.parse_args().names
    if unknown := set(names) - set(CLIENTS):
        parser.error(f"there is no client {', '.join(unknown)}; there are {', '.join(CLIENTS)}")
    with (
        tempfile.TemporaryDirectory(prefix="hbserve-clients-") as temporary,
        page_server(Path(temporary) / "npm") as port,
    ):
        folder = Path(temporary)
        (folder / "npm").mkdir()
        origin = f"http://127.0.0.1:{port}"
        async with hbserve(folder, origin) as url:
            npm = asyncio.create_task(install_npm(folder / "npm"))
            runner = Runner(folder, url, f"{origin}/page.html", npm)
            chosen = {name: client for name, client in CLIENTS.items() if not names or name in names}
            await asyncio.gather(*(runner.run(name, client) for name, client in chosen.items()))
            await asyncio.gather(npm, return_exceptions=True)
    print(f"{'client':<18}{'install, s':>11}{'run, s':>8}")
    for name, (install_s, run_s, failure) in runner.results.items():
        print(f"{name:<18}{install_s:11.1f}{run_s:8.1f}  {'FAILED' if failure else 'passed'}")
    num_failed = sum(failure is not None for _, _, failure in runner.results.values())
    print(f"{len(runner.results) - num_failed} passed, {num_failed} failed")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
