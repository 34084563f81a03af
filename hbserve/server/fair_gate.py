"""The gate between HTTP requests and the engine: API keys take turns, whatever the number of their requests."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from hbserve.errors import OverloadedError, RateLimitedError


class FairGate:
    """Counter and queue of requests per key. Used by one event loop only.

    Args:
        max_open: how many requests may be in the engine at once. The others wait here, and the keys' queues are
            served in turn. None: no request waits here.
        max_waiting: how many requests may wait; further ones are refused.
        max_per_key: how many requests a key may have at once, waiting ones included. None: any number.
        rate_per_minute: how many requests a key may begin per minute; unused ones are saved for at most a minute.
            None: any number.
    """

    def __init__(
        self,
        max_open: int | None = None,
        max_waiting: int = 4096,
        max_per_key: int | None = None,
        rate_per_minute: int | None = None,
    ) -> None:
        self._max_open, self._max_waiting = max_open, max_waiting
        self._max_per_key, self._rate = max_per_key, rate_per_minute
        self._num_open = 0
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}  # in the order of their turns
        self._num_requests: dict[str, int] = {}  # by key, waiting ones included
        self._allowance: dict[str, tuple[float, float]] = {}  # requests saved, and the time of that count

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait here."""
        return sum(map(len, self._queues.values()))

    def begin(self, key: str) -> None:
        """Count a request whose body has not come. The caller must call `end` once after each `begin` that returns.

        Raises:
            RateLimitedError: the key has too many requests, or began too many in the last minute.
        """
        if self._max_per_key is not None and self._num_requests.get(key, 0) >= self._max_per_key:
            raise RateLimitedError(f"{self._max_per_key} requests of this key are open (server.max_requests_per_key)")
        self._count(key)
        self._num_requests[key] = self._num_requests.get(key, 0) + 1

    def end(self, key: str) -> None:
        """Forget a request that has begun, and has left if it has entered."""
        self._num_requests[key] -= 1
        if not self._num_requests[key]:
            del self._num_requests[key]

    async def wait_turn(self, key: str) -> None:
        """Wait for the key's turn. The caller must call `give_back` once after each `wait_turn` that returns.

        Raises:
            OverloadedError: too many requests wait.
        """
        if self._max_open is not None and (self._num_open >= self._max_open or self._queues):
            await self._wait(key)
        else:
            self._num_open += 1

    def give_back(self) -> None:
        """End a turn."""
        self._num_open -= 1
        self._admit()

    async def enter(self, key: str) -> None:
        """Begin, and wait for the turn. The caller must call `leave` once after each `enter` that returns."""
        self.begin(key)
        try:
            await self.wait_turn(key)
        except BaseException:
            self.end(key)
            raise

    def leave(self, key: str) -> None:
        """Undo `enter`."""
        self.give_back()
        self.end(key)

    async def _wait(self, key: str) -> None:
        if self.num_waiting >= self._max_waiting:
            raise OverloadedError(f"{self._max_waiting} requests are waiting (performance.max_waiting_requests)")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(key, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            queue = self._queues.get(key, deque())
            if not turn.cancelled():  # admitted and cancelled in the same turn of the loop
                self._num_open -= 1
                self._admit()
            elif turn in queue:
                queue.remove(turn)
                if not queue:
                    del self._queues[key]
            raise

    def _admit(self) -> None:
        assert self._max_open is not None or not self._queues
        while self._queues and self._num_open < (self._max_open or 0):
            key = next(iter(self._queues))
            queue = self._queues.pop(key)
            turn = queue.popleft()
            if not turn.cancelled():  # because its client has just disconnected
                self._num_open += 1
                turn.set_result(None)
            if queue:
                self._queues[key] = queue  # behind the others

    def _count(self, key: str) -> None:
        if self._rate is None:
            return
        now = time.monotonic()
        saved, since = self._allowance.get(key, (float(self._rate), now))
        saved = min(float(self._rate), saved + (now - since) * self._rate / 60)
        if saved < 1:
            self._allowance[key] = saved, now
            raise RateLimitedError(
                f"{self._rate} requests per minute are this key's limit (server.requests_per_minute_per_key)",
                (1 - saved) * 60 / self._rate,
            )
        self._allowance[key] = saved - 1, now
