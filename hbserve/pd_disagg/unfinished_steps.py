"""Which plans an instance has taken and not finished, and for how long."""

from __future__ import annotations

import asyncio
import time

from hbserve.messages.worker import StepPlan


class UnfinishedSteps:
    """Plans in the order in which they came; of the event loop's thread alone."""

    def __init__(self) -> None:
        self._since: dict[tuple[int, int], float] = {}  # (epoch, step) -> when it became the first
        self._none_left = asyncio.Event()
        self._none_left.set()

    def begin(self, plan: StepPlan) -> None:
        """A plan has come."""
        self._none_left.clear()
        self._since[plan.epoch, plan.step_id] = time.monotonic()

    def end(self, plan: StepPlan) -> None:
        """It is done, or dropped."""
        del self._since[plan.epoch, plan.step_id]
        if self._since:  # the clock of the next one starts now: it could not begin before
            self._since[next(iter(self._since))] = time.monotonic()
        else:
            self._none_left.set()

    async def wait_until_none(self) -> None:
        """Return when nothing is left."""
        await self._none_left.wait()

    async def watch(self, timeout_s: float) -> None:
        """Return when a step has taken longer than that."""
        while True:
            await asyncio.sleep(min(timeout_s / 4, 5.0))
            first = next(iter(self._since.values()), None)
            if first is not None and time.monotonic() - first > timeout_s:
                return
