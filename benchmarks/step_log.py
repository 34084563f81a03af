"""A log of what passes through the scheduler, with times: requests, plans, results, first tokens.

`RecordingScheduler` writes it in the scheduler's process, where ``performance.scheduler`` names it. All times are of
the host's monotonic clock, which all its processes share.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import msgspec

from hbserve.config import Config
from hbserve.messages.client import AddRequest, OutputBatch
from hbserve.messages.worker import StepPlan, StepResult
from hbserve.scheduler.core_io import FromClient, FromWorker, Inbox, Outbox, Start
from hbserve.scheduler.scheduler import CpuScheduler
from hbserve.scheduler.sequence import InflightStep

FILE_VARIABLE = "HBSERVE_STEP_LOG"
"""Environment variable with the file's path."""
_FLUSH_S = 0.25
_KEY_TOKENS = 8
Key = tuple[int, ...]


class Taken(msgspec.Struct, tag=True, array_like=True):
    """A request has been taken from its client's socket. ``key``: of its prompt, see `key_of`."""

    at: float
    request_id: str
    key: Key


class Planned(msgspec.Struct, tag=True, array_like=True):
    """A step has been planned and is about to be sent.

    Attributes:
        expected_s: predicted time of the step; 0: unknown. lead_s: time to the expected end of the step before it, if
            one is in flight.
        chunks: by request, the chunk of its prompt: first position, end, and whether it is the last one.
        worker_id: the worker that computes it.
    """

    at: float
    step_id: int
    decode_rows: int
    decode_keys: float
    prompt_tokens: int
    pairs: float
    expected_s: float
    lead_s: float | None
    chunks: dict[str, tuple[int, int, bool]]
    worker_id: str


class Done(msgspec.Struct, tag=True, array_like=True):
    """A step's result has come; the fields are those of `StepResult`."""

    at: float
    step_id: int
    busy_s: float
    host_s: float
    early_s: float


class First(msgspec.Struct, tag=True, array_like=True):
    """The first output of a request is about to be sent."""

    at: float
    request_id: str


class Core(msgspec.Struct, tag=True, array_like=True):
    """One step of the scheduler: when it began, and how long it computed."""

    at: float
    seconds: float


Entry = Taken | Planned | Done | First | Core


def key_of(prompt: list[int]) -> Key:
    """Return what tells prompts apart whose tokens are random."""
    return (len(prompt), *prompt[-_KEY_TOKENS:])


def read_log(path: Path) -> list[Entry]:
    """Read all entries, in their order."""
    return msgspec.json.decode(b"[" + b",".join(path.read_bytes().splitlines()) + b"]", type=list[Entry])


class RecordingScheduler(CpuScheduler):
    """The scheduler, and a log of its messages."""

    def __init__(self, config: Config, instance_addresses: dict[str, str], start: Start) -> None:
        super().__init__(config, instance_addresses, start)
        self._log: list[Entry] = []
        self._path = Path(os.environ[FILE_VARIABLE])
        self._flushed_at = start.now
        self._has_token: set[str] = set()
        self._expected_ends: dict[str, float | None] = {}

    async def step_async(self, now: float, inbox: Inbox = ()) -> Outbox:
        """Do the step, and note its messages."""
        began = time.monotonic()
        for event in inbox:
            match event:
                case FromClient(message=AddRequest() as request):
                    self._log.append(Taken(now, request.request_id, key_of(request.prompt_token_ids)))
                case FromWorker(reply=StepResult() as result):
                    self._log.append(Done(now, result.step_id, result.busy_s, result.host_s, result.early_s))
        outbox = await super().step_async(now, inbox)
        at = time.monotonic()
        for _, command in outbox.to_workers:
            if isinstance(command, StepPlan):
                self._note_plan(at, command)
        for _, reply in outbox.to_clients:
            for output in reply.outputs if isinstance(reply, OutputBatch) else ():
                if output.token_ids and output.request_id not in self._has_token:
                    self._has_token.add(output.request_id)
                    self._log.append(First(at, output.request_id))
        self._log.append(Core(began, at - began))
        if at - self._flushed_at > _FLUSH_S:
            self._flush(at)
        return outbox

    def _note_plan(self, at: float, plan: StepPlan) -> None:
        for instance in self.instances.values():
            for worker in instance.workers.values():
                for number, step in enumerate(worker.inflight):
                    if step.step_id == plan.step_id and step.work is not None:
                        end = worker.timing.expected_end()
                        seconds = worker.timing.predictor.seconds(step.work)
                        lead_s = end - seconds - at if number and end is not None else None
                        self._log.append(_planned(at, worker.id, step, seconds, lead_s))

    def _flush(self, at: float) -> None:
        self._flushed_at = at
        lines = b"".join(msgspec.json.encode(entry) + b"\n" for entry in self._log)
        self._log.clear()
        with self._path.open("ab") as file:
            file.write(lines)


def _planned(at: float, worker_id: str, step: InflightStep, seconds: float, lead_s: float | None) -> Planned:
    work: Any = step.work
    chunks = {
        row.sequence.request.request_id: (row.start, row.end, row.end == row.allocation.num_tokens_at_entry)
        for row in step.rows
        if row.start < row.allocation.num_tokens_at_entry
    }
    return Planned(
        at,
        step.step_id,
        work.decode_rows,
        work.decode_keys,
        work.prompt_tokens,
        work.prompt_pairs,
        seconds,
        lead_s,
        chunks,
        worker_id,
    )
