"""Event loops: the fast one for processes with much traffic, and one in a thread beside a process's main work.

`Turn` and `Pace` keep one task, or many at once, from taking a loop's time for long.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


def new() -> asyncio.AbstractEventLoop:
    """Make a loop, of uvloop where it is installed: the same behaviour, a third less time per event."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run like `asyncio.run`, on a loop of `new`."""
    with asyncio.Runner(loop_factory=new) as runner:
        return runner.run(main)


def start_thread(loop: asyncio.AbstractEventLoop, main: Callable[[], Coroutine[Any, Any, None]]) -> threading.Thread:
    """Run ``main`` on the loop in a new thread, which closes the loop; if ``main`` fails, end the process."""

    def work() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(main())
        except BaseException:
            logger.exception("the event loop failed; exiting")
            os._exit(1)
        loop.close()

    thread = threading.Thread(target=work, name="io")
    thread.start()
    return thread


class Turn:
    """The time of one task in a loop: long work goes on in later turns, and others get theirs in between."""

    _MAX_S = 0.003

    def __init__(self) -> None:
        self._until = time.monotonic() + self._MAX_S

    @property
    def is_over(self) -> bool:
        """Whether it was long enough, so that `pass_on` is due."""
        return time.monotonic() >= self._until

    async def pass_on(self) -> None:
        """Let others have their turn, and go on in a later one."""
        await asyncio.sleep(0)
        self._until = time.monotonic() + self._MAX_S


class Pace:
    """Limit of the tasks that begin in one turn of a loop, however many come at once. Used by one loop only."""

    def __init__(self, max_per_turn: int) -> None:
        self._max_per_turn = max_per_turn
        self._num_left = max_per_turn
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_due = False

    async def wait(self) -> None:
        """Return in a turn in which not too many others have begun."""
        loop = asyncio.get_running_loop()
        if not self._is_due:
            self._is_due = True
            loop.call_soon(self._next_turn)
        if self._num_left and not self._waiting:
            self._num_left -= 1
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        await turn  # one that is cancelled is passed over

    def _next_turn(self) -> None:
        self._num_left = self._max_per_turn
        while self._waiting and self._num_left:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self._num_left -= 1
        self._is_due = self._num_left < self._max_per_turn
        if self._is_due:
            asyncio.get_running_loop().call_soon(self._next_turn)
