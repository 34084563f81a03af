"""A system as an operator starts it: the start script in a process of its own, with its HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from benchmarks.chaos import processes
from benchmarks.chaos.campaign import ChaosError

MODEL = "tiny"
ADMIN_KEY = "chaos-admin"
START_S = 120.0
END_S = 60.0
_POLL_S = 0.25
_ROOT = Path(__file__).resolve().parents[2]
_OPEN_LOOKS = aiohttp.ClientTimeout(total=10.0)


def make_model(folder: Path) -> None:
    """Write a random model with a tokenizer and a chat template; its tokens show every wrong byte of KV."""
    from tests.support import tiny_tokenizers
    from tests.support.model_zoo import save_model

    save_model(folder, "qwen3", vocab_size=352)
    tiny_tokenizers.byte_level(folder, tiny_tokenizers.TOOL_TEMPLATE)


def configuration(folder: Path, mode: str, **sections: Any) -> dict[str, Any]:
    """Return a small system of a model on the CPU; ``sections`` are added to those that it has, key by key."""
    made: dict[str, Any] = {
        "mode": mode,
        "model": {"path": str(folder), "served_name": MODEL, "device": "cpu", "dtype": "float32"},
        "performance": {"num_blocks": 512, "max_num_seqs": 32},
        "server": {"port": 0},
        "logging": {"level": "WARNING"},
    }
    for name, values in sections.items():
        made[name] = {**made[name], **values} if isinstance(made.get(name), dict) else values
    return made


class Service:
    """A running system. `service` starts it, and ends it.

    Attributes:
        url: address of its HTTP server.
        process: the API server's.
        log: file with everything that its processes have logged.
        folder: temporary folder of its processes.
    """

    def __init__(self, process: asyncio.subprocess.Process, url: str, log: Path, folder: Path) -> None:
        self.process, self.url, self.log, self.folder = process, url, log, folder

    @property
    def has_ended(self) -> bool:
        """Whether the API server has ended."""
        return self.process.returncode is not None

    async def get(self, path: str) -> tuple[int, Any]:
        """Return status and document of a GET route; (0, {}) if nothing answers."""
        try:
            async with (
                aiohttp.ClientSession(timeout=_OPEN_LOOKS) as session,
                session.get(self.url + path) as answer,
            ):
                return answer.status, await answer.json()
        except (aiohttp.ClientError, TimeoutError):
            return 0, {}

    async def is_ready(self) -> bool:
        """Return whether every part of the system serves."""
        status, document = await self.get("/health")
        return status == 200 and document["status"] == "ready"

    def log_tail(self, offset: int = 0, max_lines: int = 40) -> str:
        """Return the last lines that were logged behind a place in the log."""
        text = self.log.read_bytes()[offset:].decode(errors="replace")
        return "".join(f"    | {line}\n" for line in text.splitlines()[-max_lines:])

    async def end(self) -> int | None:
        """Tell the system to end, and return its exit code; None if it had to be killed."""
        if not self.has_ended:
            self.process.terminate()
        try:
            return await asyncio.wait_for(self.process.wait(), END_S)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
            return None


@asynccontextmanager
async def service(config: dict[str, Any]) -> AsyncIterator[Service]:
    """Start a system and wait until it serves; in the end kill whatever is left of it.

    Raises:
        ChaosError: if it does not start; the text has the end of its log.
    """
    processes.adopt_orphans()
    before = set(processes.descendants())
    with tempfile.TemporaryDirectory(prefix="hbc-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        (folder / "system.yaml").write_text(yaml.safe_dump(config))
        environment = os.environ | {"TMPDIR": str(folder / "tmp"), "HBSERVE_ADMIN_KEY": ADMIN_KEY}
        environment |= {"PYTHONPATH": os.pathsep.join([str(_ROOT), environment.get("PYTHONPATH", "")])}
        with (folder / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, str(_ROOT / "scripts" / "start_pd_disagg.py")),
                *("--config", str(folder / "system.yaml")),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=environment,
            )
        try:
            assert process.stdout is not None
            try:
                line = (await asyncio.wait_for(process.stdout.readline(), START_S)).decode()
            except TimeoutError:
                line = ""
            started = Service(process, line.split()[3] if line else "", folder / "log", folder / "tmp")
            if not line:
                raise ChaosError(f"the system does not start; the end of its log:\n{started.log_tail()}")
            yield started
        finally:
            while left := [one for one in processes.descendants() if one not in before]:
                for one in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(one.pid, signal.SIGKILL)
                await asyncio.sleep(0.05)
            await process.wait()
            processes.reap()


async def unreturned(running: Service) -> list[str]:
    """Return which requests, steps, transfers or KV blocks a system still has; an idle one has none."""
    from tests.support.engines import leaks

    status, stats = await running.get("/stats")
    if status != 200:
        return [f"/stats answers {status}"]
    found: list[str] = leaks(stats)
    status, shared = await running.get("/v1/semi_pd/status")
    for name, one in shared.get("instances", {}).items():
        if one["switch_requested"] or one["state"] != "running":
            found.append(f"{name} is {one['state']}")
    return found


async def until(holds: Callable[[], Any], deadline_s: float) -> bool:
    """Poll until a condition holds; return False at the deadline. ``holds`` may return an awaitable."""
    deadline = time.monotonic() + deadline_s
    while True:
        found = holds()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return True
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_POLL_S)
