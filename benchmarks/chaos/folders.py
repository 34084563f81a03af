"""``python -m benchmarks chaos folders``: model folders with one or two things broken.

Each case loads one in a process with limits (`folder_loader`), as a worker and a text process do, and computes some
tokens. Every 100th starts a whole system. What must hold: the folder serves, or is refused with an error that names the
file; in time; and the memory of the process does not grow.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from benchmarks.chaos.campaign import Campaign, ChaosError
from benchmarks.chaos.model_folders import FILES, OTHER_FILES, ModelFolders

LOAD_S, SERVE_S = 60.0, 180.0
_MAX_GROWTH_MB = 200.0
_WHOLE_EVERY = 100
_ROOT = Path(__file__).resolve().parents[2]


class Loader:
    """The process that loads folders, and the thread that reads what it writes."""

    def __init__(self, log: IO[bytes]) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.chaos.folder_loader"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="folder-loader", daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def load(self, folder: Path, whole: bool = False) -> dict[str, Any] | str:
        """Load a folder; return the process' account, or what is wrong with it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"folder": str(folder), "whole": whole}).encode() + b"\n")
        self._process.stdin.flush()
        deadline_s = SERVE_S if whole else LOAD_S
        try:
            line = self._lines.get(timeout=deadline_s)
        except queue.Empty:
            return f"is not loaded within {deadline_s:g} s"
        if not line:
            return f"ends the process with exit code {self._process.wait()}"
        account: dict[str, Any] = json.loads(line)
        return account

    def end(self) -> None:
        """End the process, however busy it is."""
        self._process.kill()
        self._process.wait()


def problem(account: dict[str, Any] | str) -> str | None:
    """Say what is wrong with an account of `folder_loader`."""
    if isinstance(account, str):
        return account
    if account["left"]:
        return f"leaves processes {account['left']}"
    for step, outcome in account["outcomes"].items():
        # What a template or a tokenizer cannot do with a text is found when it gets one, not in a file.
        names = (*FILES, *OTHER_FILES, "cannot encode", "template")
        if outcome != "ok" and not any(name in outcome for name in names):
            return f"{step}: the refusal names no file: {outcome:.300}"
        if len(outcome) > 2000:
            return f"{step}: the refusal has {len(outcome)} characters"
    return None


def run(campaign: Campaign, folder: Path) -> None:
    """Run all cases; the figures are the largest memory of the process that loads."""
    folders = ModelFolders(folder)
    first_mb = largest_mb = 0.0
    with tempfile.NamedTemporaryFile() as log, ExitStack() as stack:
        loader: Loader | None = None
        for number in campaign.cases():
            if loader is None:
                stack.close()
                loader = Loader(log.file)
                stack.callback(loader.end)
                accounts = [loader.load(good) for good in folders.good]
                if wrong := [found for account in accounts if (found := problem(account)) is not None]:
                    raise ChaosError(f"a good folder: {wrong[0]}")
                first_mb = max(account["memory_mb"] for account in accounts if isinstance(account, dict))
            log_offset = os.path.getsize(log.name)
            change, path = folders.make(campaign.chance(number))
            account = loader.load(path, whole=number % _WHOLE_EVERY == _WHOLE_EVERY - 1)
            what = problem(account)
            if isinstance(account, dict):
                for step, outcome in account["outcomes"].items():
                    campaign.counts[f"{step} {'ok' if outcome == 'ok' else 'refused'}"] += 1
                largest_mb = max(largest_mb, account["memory_mb"])
                if largest_mb > first_mb + _MAX_GROWTH_MB and what is None:
                    what = f"takes the memory of the process from {first_mb:.0f} to {largest_mb:.0f} MB"
            if what is not None:
                tail = Path(log.name).read_bytes()[log_offset:].decode(errors="replace").splitlines()[-30:]
                campaign.fail(number, f"{change}: {what}", "".join(f"    | {line}\n" for line in tail))
                loader = None
            campaign.figures["memory_mb"] = {"good folders": round(first_mb), "largest": round(largest_mb)}
