"""What goes into the scheduler's core and what comes out of it; see `CpuScheduler.step`.

The core is every module of this room except `shell.py` and `process.py`. It has no clock, no socket and no log of its
own: the same inboxes at the same times give the same outboxes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from hbserve.messages.client import ClientMessage, OutputBatch, RequestOutput, SchedulerReply
from hbserve.messages.supervisor import Predecessor
from hbserve.messages.worker import InstanceCommand, InstanceReply
from hbserve.metrics.request_metrics import RequestMetrics
from hbserve.policy.step_profile import StepProfile


class Start(NamedTuple):
    """What the core is told once, before its first step.

    Attributes:
        now: the time, on the clock of all later steps.
        time_ns: the same moment in nanoseconds since 1970. It is also the scheduler's epoch, because workers obey the
            scheduler that was started last, and the number before the first step's id, because workers compare ids.
        predecessor: the scheduler whose place this one takes; None: it is the system's first.
        profile: step times of the model on the device, if they were measured.
        learns_profile: learn them from the system's own steps.
    """

    now: float
    time_ns: int
    predecessor: Predecessor | None = None
    profile: StepProfile | None = None
    learns_profile: bool = False


# --- in -------------------------------------------------------------------------------------------


class FromClient(msgspec.Struct, frozen=True):
    """A message of a client, an operator, a supervisor or an instance that joins."""

    client: bytes
    message: ClientMessage


class ClientGone(msgspec.Struct, frozen=True):
    """A client cannot be reached any more."""

    client: bytes


class FromWorker(msgspec.Struct, frozen=True):
    """A message of the worker at the other end of a connection."""

    connection: int
    reply: InstanceReply


class ConnectionMade(msgspec.Struct, frozen=True):
    """A connection to a worker is there."""

    connection: int


class ConnectionBroke(msgspec.Struct, frozen=True):
    """A connection to a worker broke; all messages from before that have been delivered. It connects again."""

    connection: int


InboxEvent = FromClient | ClientGone | FromWorker | ConnectionMade | ConnectionBroke
Inbox = Sequence[InboxEvent]
"""What has happened since the step before, in order."""


# --- out ------------------------------------------------------------------------------------------


class EndedRequest(NamedTuple):
    """A request that has ended; ``outcome`` is ``completed``, ``aborted`` or ``failed``."""

    request_id: str
    metrics: RequestMetrics
    outcome: str


class Outbox(msgspec.Struct):
    """What is to be done after a step, in the order of the fields.

    Attributes:
        connects: connections to open, by number, with the address at which the worker listens. A connection that
            breaks is opened again, until it is among the ``disconnects``.
        to_workers: messages, each with the number of its connection. Those that cannot be delivered are dropped.
        to_clients: messages, each with its client. If one cannot be delivered, the next inbox has a `ClientGone`.
        disconnects: connections to close.
        log: lines for the log, each with its level.
        ended: requests that have ended, for traces.
        learnt: step times that have been learnt, once, to be kept for the next start.
        call_at: when the next step must come, if nothing happens before.
    """

    connects: list[tuple[int, str]] = []
    to_workers: list[tuple[int, InstanceCommand]] = []
    to_clients: list[tuple[bytes, SchedulerReply]] = []
    disconnects: list[int] = []
    log: list[tuple[int, str]] = []
    ended: list[EndedRequest] = []
    learnt: StepProfile | None = None
    call_at: float = math.inf


class OutboxWriter:
    """The outbox of the step under way: every part of the core sends through it.

    A client gets the outputs of a step in two batches: those of requests that had no token before come ahead. It takes
    some milliseconds to bring the text of a hundred streams to their readers. A first token would come last, because
    prompts are the last rows of a step.
    """

    def __init__(self) -> None:
        self._outbox = Outbox()
        self._first_outputs: dict[bytes, list[RequestOutput]] = {}
        self._outputs: dict[bytes, list[RequestOutput]] = {}
        self._num_connections = 0

    def connect(self, address: str) -> int:
        """Open a connection to the worker that listens at an address; returns the connection's number."""
        self._num_connections += 1
        self._outbox.connects.append((self._num_connections, address))
        return self._num_connections

    def disconnect(self, connection: int) -> None:
        """Close a connection."""
        self._outbox.disconnects.append(connection)

    def send(self, connection: int, command: InstanceCommand) -> None:
        """Send to a worker."""
        self._outbox.to_workers.append((connection, command))

    def reply(self, client: bytes, reply: SchedulerReply) -> None:
        """Send to a client."""
        self._outbox.to_clients.append((client, reply))

    def push(self, client: bytes, output: RequestOutput, is_first: bool = False) -> None:
        """Add to a batch that the client gets at the end of the step; ``is_first``: the request had no token before."""
        batches = self._first_outputs if is_first else self._outputs
        outputs = batches.get(client)
        if outputs is None:
            batches[client] = [output]
        else:
            outputs.append(output)

    def log(self, level: int, text: str) -> None:
        """Add a line to the log."""
        self._outbox.log.append((level, text))

    def on_ended(self, request: EndedRequest) -> None:
        """A request has ended."""
        self._outbox.ended.append(request)

    def on_learnt(self, profile: StepProfile) -> None:
        """Step times have been learnt."""
        self._outbox.learnt = profile

    def take(self, call_at: float) -> Outbox:
        """Return the outbox of this step, and begin that of the next."""
        outbox, self._outbox = self._outbox, Outbox()
        for batches in (self._first_outputs, self._outputs):
            outbox.to_clients += [(client, OutputBatch(outputs=outputs)) for client, outputs in batches.items()]
        self._first_outputs, self._outputs = {}, {}
        outbox.call_at = call_at
        return outbox


# --- time -----------------------------------------------------------------------------------------


class Clock:
    """The time of the step under way, and the times at which later steps must come.

    Attributes:
        now: in seconds; it stands still during a step.
    """

    def __init__(self, start: Start) -> None:
        self.now = start.now
        self._unix_offset_s = start.time_ns / 1e9 - start.now
        self._alarms: list[float] = []

    def __call__(self) -> float:
        """Return ``now``."""
        return self.now

    @property
    def unix_time(self) -> float:
        """``now`` in seconds since 1970."""
        return self.now + self._unix_offset_s

    def advance(self, now: float) -> None:
        """Begin a step."""
        assert now >= self.now, "time runs backwards"
        self.now = now
        while self._alarms and self._alarms[0] <= now:
            heapq.heappop(self._alarms)

    def call_at(self, at: float) -> None:
        """Have a step come at a time, or at the first moment after it."""
        heapq.heappush(self._alarms, at)

    @property
    def next_call(self) -> float:
        """The next time at which a step must come; infinity if there is none."""
        return self._alarms[0] if self._alarms else math.inf
