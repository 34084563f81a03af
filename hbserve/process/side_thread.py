"""A thread beside an event loop, for work of requests that would hold the loop up.

Python passes its lock to a thread that waits for it after the switch interval, and after each call of a library that
keeps the lock. The loop therefore waits for a part of the work, never for the whole.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_SWITCH_INTERVAL_S = 0.0005
"""Time after which a thread that computes gives the lock to one that waits. Python's own default is ten times longer,
and the loop asks for the lock several times per token."""


class SideThread:
    """One thread, which does one piece of work after the other. Only one event loop may use it.

    It is for processes that run nothing but this package, because it shortens the interpreter's switch interval.
    """

    def __init__(self) -> None:
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self._pool = ThreadPoolExecutor(1, "side")

    async def run(self, work: Callable[[], T]) -> T:
        """Do the work; return what it returns, or raise what it raises. If cancelled, drop work that has not begun."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """End the thread after the work that it does now."""
        self._pool.shutdown(wait=False, cancel_futures=True)
