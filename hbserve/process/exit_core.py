"""Exit core: a core on which processes end, and on which no other thread of the system runs.

A process that ends frees its GPU context in the kernel. That takes 0.15 s, and blocks the core for up to 60 ms at a
time (H200, driver 580; docs/benchmarks.md). A thread that last ran on that core waits so long, even while other cores
are idle; a step's launch, a plan or a token then comes late. If workers end while others serve, all processes
therefore stay off one core, and a process that ends moves there first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Set

_VARIABLE = "HBSERVE_ENDING_CORE"
_MIN_CORES = 8
"""A machine with fewer cores cannot spare one."""

_set_apart: list[int] = []


def set_apart() -> None:
    """Reserve the exit core, for this process and its later children, if the machine has enough cores."""
    allowed = os.sched_getaffinity(0)
    if _core() is None and len(allowed) >= _MIN_CORES:
        _set_apart.append(max(allowed))


def environment() -> dict[str, str]:
    """Return the variables that tell a child which core it is."""
    core = _core()
    return {} if core is None else {_VARIABLE: str(core)}


def keep_off() -> None:
    """Keep all threads of this process off the exit core, if there is one."""
    core = _core()
    if core is not None:
        _move(os.sched_getaffinity(0) - {core})


def move_to() -> None:
    """Move all threads of this process to the exit core, if there is one."""
    core = _core()
    if core is not None:
        _move({core})


def _core() -> int | None:
    if _set_apart:
        return _set_apart[0]
    named = os.environ.get(_VARIABLE)
    return None if named is None else int(named)


def _move(cores: Set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):  # threads that they start inherit the cores
        with contextlib.suppress(OSError):  # the thread has ended, or the core is not allowed
            os.sched_setaffinity(int(thread), cores)
