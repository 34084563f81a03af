"""Processes under this one, as /proc shows them: their kinds, and what they hold."""

from __future__ import annotations

import ctypes
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

_PR_SET_CHILD_SUBREAPER = 36
_KINDS = (
    (r"hbserve-api", "API server"),
    (r"hbserve-scheduler", "scheduler"),
    (r"hbserve-detokenizer", "detokenizer"),
    (r"hbserve-tokenizer-slow", "slow tokenizer"),
    (r"hbserve-tokenizer-.*", "tokenizer"),
    (r"hbserve-grammars", "grammar process"),
    (r"hbserve-grammar-checker", "grammar checker"),
    (r"hbserve-.*-standby(-TP\d+)?", "standby"),
    (r"hbserve-.*-resident(-TP\d+)?", "resident process"),
    (r"hbserve-.*\.(prefill|decode|unified)-\d+\.\d+-TP0", "semi-PD worker"),
    (r"hbserve-prefill-\d+-TP0", "prefill worker"),
    (r"hbserve-decode-\d+-TP0", "decode worker"),
    (r"hbserve-unified-\d+-TP0", "unified worker"),
    (r"hbserve-.*-TP[1-9]\d*", "second rank"),
    (r".*python.* -m hbserve\..*", "starting process"),
)


class Process(NamedTuple):
    """A running process.

    Attributes:
        start: time of its start, in the kernel's ticks; with the pid it names a process for ever.
    """

    pid: int
    start: int
    title: str

    @property
    def kind(self) -> str:
        """Return what it is, by its title."""
        return next((kind for pattern, kind in _KINDS if re.fullmatch(pattern, self.title)), "helper")


class Holdings(NamedTuple):
    """What a process holds."""

    descriptors: Counter[str]
    memory_mb: float


def adopt_orphans() -> None:
    """Become the parent of every process under this one whose own parent ends, so that none gets out of sight."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> list[Process]:
    """Return all running processes under this one."""
    found: dict[int, list[tuple[Process, str]]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, *rest = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # it has just ended
            continue
        found.setdefault(int(parent), []).append((Process(int(folder.name), int(rest[17]), title), state))
    tree, result = [os.getpid()], []
    for pid in tree:
        for process, state in found.get(pid, []):
            tree.append(process.pid)
            if state not in "ZX":
                result.append(process)
    return result


def reap(*owned: int) -> None:
    """Reap children of this process that have ended, but for those with an owner, which waits for them itself."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, *_ = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        pid = int(folder.name)
        if state == "Z" and int(parent) == os.getpid() and pid not in owned:
            os.waitpid(pid, os.WNOHANG)


def is_running(process: Process) -> bool:
    """Return whether a process still runs; a zombie does not."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return False
    return fields[0] not in "ZX" and int(fields[19]) == process.start


def holdings(process: Process) -> Holdings | None:
    """Return what a process holds, or None if it has ended."""
    descriptors: Counter[str] = Counter()
    try:
        for entry in Path(f"/proc/{process.pid}/fd").iterdir():
            target = os.readlink(entry)
            descriptors[re.sub(r"[:\d].*", "", target) if "[" in target else target] += 1
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return None
    [anonymous_kb] = re.findall(r"RssAnon:\s*(\d+)", status) or ["0"]
    return Holdings(descriptors, int(anonymous_kb) / 1024)


def shared_segments() -> set[str]:
    """Return the shared memory that processes under this one have mapped."""
    found = set()
    for process in descendants():
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
        except OSError:
            continue
        for line in maps.splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith(("/memfd:", "/dev/shm/")):
                found.add(f"{fields[5].split()[0]} {fields[4]}")
    return found
