"""Event loops: the fast one for processes with much traffic, and one in a thread beside a process's main work.

`Turn`, `SharedTurn` and `Pace` keep one task, or many at once, from taking a loop's time for long.
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


_MAX_TURN_S = 0.003


class Turn:
    """The time of one task in a loop: long work goes on in later turns, and others get theirs in between."""

    def __init__(self) -> None:
        self._until = time.monotonic() + _MAX_TURN_S

    @property
    def is_over(self) -> bool:
        """Whether it was long enough, so that `pass_on` is due."""
        return time.monotonic() >= self._until

    async def pass_on(self) -> None:
        """Let others have their turn, and go on in a later one."""
        await asyncio.sleep(0)
        self._until = time.monotonic() + _MAX_TURN_S


class SharedTurn:
    """The time that many tasks with long work have together in one turn of a loop, however many they are.

    The tasks look at `is_over` between two small pieces of work. When the time is over, they wait in one queue, and
    each turn of the loop wakes the first of them. Used by one loop only.
    """

    def __init__(self) -> None:
        self._until: float | None = None  # None: no work has begun in this turn of the loop
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_due = False

    @property
    def is_over(self) -> bool:
        """Whether the tasks have used the time of this turn, so that `pass_on` is due."""
        now = time.monotonic()
        if self._until is None:
            self._until = now + _MAX_TURN_S
            self._schedule()
        return now >= self._until

    async def pass_on(self) -> None:
        """Wait for a later turn of the loop, behind the tasks that wait already."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._schedule()
        await turn  # one that is cancelled is passed over

    def _schedule(self) -> None:
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._is_due, self._until = False, None
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                break
        if self._waiting:
            self._schedule()


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
