"""Where time goes: a stopwatch for work that has parts, and the starts of processes as a table."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Stopwatch:
    """Stopwatch for work that has parts; time belongs to the part that ends next, so parts sum to the whole.

    Args:
        began: when the work began, on the monotonic clock; default: now.

    Attributes:
        parts: seconds by name, in the order of the parts' ends.
    """

    def __init__(self, began: float | None = None) -> None:
        self.parts: dict[str, float] = {}
        self.began = self._last = time.monotonic() if began is None else began

    def lap(self, part: str) -> None:
        """End a part; a part with several pieces is their sum."""
        now = time.monotonic()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now


def process_start() -> float:
    """Return when this process was started, on the monotonic clock, to a hundredth of a second."""
    after_name = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    since_boot = int(after_name.split()[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5)
    return since_boot - (time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic())


class Start(NamedTuple):
    """The start of one process.

    Attributes:
        began, ready: on the monotonic clock.
        parts: seconds by name; they sum to the whole, except for what the process does not know.
    """

    name: str
    began: float
    ready: float
    parts: dict[str, float]


def table(starts: Iterable[Start], since: float) -> list[str]:
    """Return the lines of a table of processes' starts, in seconds after ``since``."""
    lines = [f"{'start of':<20}{'from s':>7}{'to s':>7}  parts, s"]
    for start in sorted(starts, key=lambda start: start.began):
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in start.parts.items() if seconds >= 0.005)
        lines.append(f"{start.name:<20}{start.began - since:>7.2f}{start.ready - since:>7.2f}  {parts}")
    return lines
