"""A core on which processes end, and on which nothing else of ours runs.

A process that ends gives its GPU context back within the kernel. That takes 0.15 s, in which it keeps others from a
core for up to 60 ms at a time (H200, driver 580; docs/benchmarks.md). A thread that was last on that core and is to
run again waits so long, even where other cores are idle: a step's launch, a plan, a token. Where workers end while
others serve, all of them therefore stay off one core, and who ends goes there first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Set

_VARIABLE = "HBSERVE_ENDING_CORE"
_MIN_CORES = 8
"""With fewer, one is too much to give away."""

_set_apart: list[int] = []


def set_apart() -> None:
    """Set a core apart, for this process and those it starts from now on, where there are cores enough."""
    allowed = os.sched_getaffinity(0)
    if _core() is None and len(allowed) >= _MIN_CORES:
        _set_apart.append(max(allowed))


def environment() -> dict[str, str]:
    """What tells it to processes started from here."""
    core = _core()
    return {} if core is None else {_VARIABLE: str(core)}


def keep_off() -> None:
    """Stay off that core with all threads of this process; nothing happens where none is set apart."""
    core = _core()
    if core is not None:
        _move(os.sched_getaffinity(0) - {core})


def move_to() -> None:
    """Go there with all threads of this process; nothing happens where none is set apart."""
    core = _core()
    if core is not None:
        _move({core})


def _core() -> int | None:
    if _set_apart:
        return _set_apart[0]
    named = os.environ.get(_VARIABLE)
    return None if named is None else int(named)


def _move(cores: Set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):  # what they start goes where they are
        with contextlib.suppress(OSError):  # it has ended, or may not go there
            os.sched_setaffinity(int(thread), cores)
