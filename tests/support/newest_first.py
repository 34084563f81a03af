"""A user's scheduling policy."""

from __future__ import annotations

from hbserve.scheduler.scheduler import CpuScheduler


class NewestFirst(CpuScheduler):
    """Admits the newest request first."""

    async def _schedule_waiting_requests(self) -> None:
        self.waiting.sort(key=lambda sequence: -sequence.arrival)
        await super()._schedule_waiting_requests()
        self.counts["newest_first"] += 1
