"""Open-loop load: the client sends each request when it is due, whether or not earlier ones are answered."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from hbserve.bench.request_record import RequestRecord, RequestTargets, percentile
from hbserve.bench.serve_workload import ServeRequest, ServeWorkload
from hbserve.bench.target import LoadTarget, TargetError

_PROBE_INTERVAL_S = 0.02
_SPLIT_INTERVAL_S = 1.0


@dataclass
class ClientHealth:
    """Measurements that show whether the client was the bottleneck.

    Attributes:
        loop_lag_s: how much later than asked the event loop came back, at each probe.
        cpu_share: share of one core that this process used.
    """

    loop_lag_s: list[float] = field(default_factory=list)
    cpu_share: float = 0.0

    def as_dict(self, records: list[RequestRecord]) -> dict[str, float]:
        """Return plain numbers, with how late requests were sent."""
        late = sorted(record.sent_s - record.arrival_s for record in records if record.sent_s) or [0.0]
        lags = sorted(self.loop_lag_s) or [0.0]
        return {
            "cpu_share": self.cpu_share,
            "loop_lag_p50_ms": percentile(lags, 50) * 1000,
            "loop_lag_p99_ms": percentile(lags, 99) * 1000,
            "loop_lag_max_ms": lags[-1] * 1000,
            "late_p99_ms": percentile(late, 99) * 1000,
            "late_max_ms": late[-1] * 1000,
        }


@dataclass
class LoadResult:
    """Result of a run.

    Attributes:
        split: (seconds, prefill percent, decode percent, whether mixed) over time; empty without semi-PD.
        cut_short: the run was stopped because it could not keep its targets any more.
    """

    records: list[RequestRecord]
    client: ClientHealth
    split: list[tuple[float, float, float, bool]] = field(default_factory=list)
    cut_short: bool = False


class LoadRun:
    """One run of a workload against a target.

    Args:
        targets: used to stop early.
        told_targets: names of those that are sent along.
        max_missed: stop as soon as more requests than this have missed; None: run to the end.
        drain_s: time that the target has to finish after the last arrival.
        on_done: called with each request that has ended.
    """

    def __init__(
        self,
        target: LoadTarget,
        workload: ServeWorkload,
        targets: RequestTargets | None = None,
        told_targets: Sequence[str] = (),
        max_missed: int | None = None,
        drain_s: float = 120.0,
        on_done: Callable[[RequestRecord], Any] = lambda record: None,
    ) -> None:
        self._target, self._workload = target, workload
        self._targets = targets
        self._sent_targets: dict[str, float] = {}
        if targets is not None:
            named = {name: getattr(targets, name) for name in told_targets}
            self._sent_targets = {name: value for name, value in named.items() if value is not None}
        self._max_missed = max_missed
        self._drain_s = drain_s
        self._on_done = on_done
        self._client = ClientHealth()
        self._split: list[tuple[float, float, float, bool]] = []
        self._records = [
            RequestRecord(index, request.arrival_s, request.input_len, request.output_len)
            for index, request in enumerate(workload.requests)
        ]

    async def run(self) -> LoadResult:
        """Send all requests and wait for their answers."""
        gc.collect()
        gc.freeze()  # collections during the run then skip the objects that exist now
        cpu_start, self._start = time.process_time(), time.perf_counter()
        sending = asyncio.create_task(self._send_all())
        helpers = [asyncio.create_task(self._probe()), asyncio.create_task(self._watch_split())]
        try:
            cut_short = not await self._wait(sending)
        finally:
            for task in (sending, *helpers):
                task.cancel()
            await asyncio.gather(sending, *helpers, return_exceptions=True)
            gc.unfreeze()
        self._client.cpu_share = (time.process_time() - cpu_start) / (time.perf_counter() - self._start)
        return LoadResult(self._records, self._client, self._split, cut_short)

    def _now(self) -> float:
        return time.perf_counter() - self._start

    async def _wait(self, sending: asyncio.Task[None]) -> bool:
        """Wait until all requests have ended; return False if the run was stopped before."""
        deadline = self._workload.requests[-1].arrival_s + self._drain_s
        while not sending.done():
            await asyncio.wait([sending], timeout=0.25)
            now = self._now()
            if self._targets is not None and self._max_missed is not None:
                missed = sum(self._targets.missed_by(record, now) for record in self._records if record.arrival_s < now)
                if missed > self._max_missed:
                    return False
            if now > deadline:
                return False
        sending.result()
        return True

    async def _send_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for request, record in zip(self._workload.requests, self._records, strict=True):
                prompt = self._workload.prompt(request)  # made before the request is due
                delay = request.arrival_s - self._now()
                if delay > 0:
                    await asyncio.sleep(delay)
                group.create_task(self._send(request, record, prompt))

    async def _send(self, request: ServeRequest, record: RequestRecord, prompt: list[int]) -> None:
        record.sent_s = self._now()
        try:
            async with aclosing(self._target.generate(prompt, request.output_len, self._sent_targets)) as arrivals:
                async for count in arrivals:
                    record.token_times.append((self._now(), count))
            record.error = None if record.num_tokens >= request.output_len else "too few tokens"
        except TargetError as error:
            record.error = str(error)
        record.end_s = self._now()
        self._on_done(record)

    async def _probe(self) -> None:
        """Measure the lag of the event loop until cancelled."""
        while True:
            before = time.perf_counter()
            await asyncio.sleep(_PROBE_INTERVAL_S)
            self._client.loop_lag_s.append(time.perf_counter() - before - _PROBE_INTERVAL_S)

    async def _watch_split(self) -> None:
        with suppress(TargetError):
            while (split := await self._target.split()) is not None:
                self._split.append((self._now(), *split))
                await asyncio.sleep(_SPLIT_INTERVAL_S)
