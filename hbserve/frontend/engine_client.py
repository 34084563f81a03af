"""Client of the CPU scheduler: token ids in, token ids out. Runs in the event loop of the API server or the program.

The scheduler may end and be started again. The client then connects again, and sends its open requests with the tokens
that it has of them (`hbserve.frontend.open_requests`): their readers notice a pause only.
`hbserve.frontend.scheduler_line` has the states of the line to the scheduler.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from hbserve import errors
from hbserve.config import InstanceRole, RpcConfig
from hbserve.frontend.open_requests import OpenRequest, OpenRequests, OutputSink
from hbserve.frontend.questions import Question, Questions
from hbserve.frontend.scheduler_line import LineState, SchedulerLine
from hbserve.messages.admin import (
    GetLoad,
    GetStats,
    InstanceChanged,
    LoadEntry,
    PrepareRoles,
    RecentLoad,
    RemoveInstance,
    SetRole,
    Stats,
)
from hbserve.messages.client import (
    AbortRequest,
    AddRequest,
    Attached,
    NotReady,
    OutputBatch,
    Ready,
    RequestOutput,
    SubscribeReady,
)
from hbserve.messages.supervisor import EventKind, ReportEvent
from hbserve.process import event_loop
from hbserve.rpc.async_socket import MAX_REQUEST_BYTES
from hbserve.rpc.cluster_key import ClusterKey

logger = logging.getLogger(__name__)
_Unanswered = ReportEvent | RemoveInstance | PrepareRoles

_OUTPUTS_PER_LOOK = 16
"""Outputs between two looks at the clock."""
_MAX_UNSENT = 100
_NO_ANSWER = 0
"""Id of a question whose answer is not needed."""
_DEFAULTS = RpcConfig()


def error_of(output: RequestOutput) -> errors.HBServeError:
    """Return the typed error of an output with ``finish_reason == "error"``."""
    if output.error_kind == "InvalidRequestError":
        return errors.InvalidRequestError(output.error or "", output.error_param)
    if output.error_kind == "OverloadedError" and output.retry_after_s is not None:
        return errors.OverloadedError(output.error or "", output.retry_after_s)
    kinds: dict[str | None, type[errors.HBServeError]] = {
        "OverloadedError": errors.OverloadedError,
        "EngineDeadError": errors.EngineDeadError,
        "UnservedError": errors.UnservedError,
    }
    return kinds.get(output.error_kind, errors.RequestFailedError)(output.error or "the request failed")


class EngineClient:
    """Client that sends requests to a scheduler and delivers their outputs.

    Must be used from the event loop in which `connect` was awaited.

    Args:
        address: ZeroMQ address of the scheduler's client socket.
        rpc: a scheduler that is silent for ``heartbeat_timeout_s`` is given up; one that has not come back after
            ``recovery_timeout_s`` is dead.
        key: cluster key, if the system has one.
        on_silent: called when the scheduler is given up for its silence, with what it did, in words that follow its
            name. It may still run.
        on_given_up: called with the id of a request that has ended one scheduler after the other.
    """

    def __init__(
        self,
        address: str,
        rpc: RpcConfig = _DEFAULTS,
        key: ClusterKey | None = None,
        on_silent: Callable[[str], None] = lambda what: None,
        on_given_up: Callable[[str], None] = lambda request_id: None,
    ) -> None:
        self._rpc = rpc
        self._on_given_up = on_given_up
        self._encoder = msgspec.msgpack.Encoder()
        client_id = uuid.uuid4().hex
        self._line = SchedulerLine(
            address, rpc, key, client_id, self._subscribe, self._on_lost, on_silent, self._on_overdue
        )
        self._requests = OpenRequests()
        self._questions = Questions(lambda question: self._line.is_connected and self._line.send(question))
        self._query_ids = itertools.count(1)
        self._unsent: deque[_Unanswered] = deque(maxlen=_MAX_UNSENT)
        self._ready: asyncio.Future[Ready] | None = None
        self.formats: dict[str, str] = {}
        """What the numbers of the model are in (`Ready`); empty before it is ready."""
        self._ready_deadline = 0.0
        self._dead: errors.EngineDeadError | None = None
        self._next_send: asyncio.TimerHandle | None = None

    async def connect(self) -> None:
        """Open the line. The scheduler may start later."""
        self._line.open()
        work = (self._receive(), *self._line.watch())
        self._tasks = [asyncio.create_task(coroutine) for coroutine in work]

    async def close(self) -> None:
        """Abort the open requests and close the line."""
        for request in self._requests:
            self._line.send(AbortRequest(request_id=request.id))
        self._fail_all(errors.EngineDeadError("the engine client was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._line.close(linger_ms=200)  # the aborts above must still leave

    async def wait_ready(self, deadline_s: float) -> Ready:
        """Wait until every instance is registered.

        Raises:
            StartupError: at the deadline, naming the missing instances, or when an instance has failed.
            EngineDeadError: if the engine was declared dead meanwhile.
        """
        self._ready = asyncio.get_running_loop().create_future()
        self._ready_deadline = time.monotonic() + deadline_s
        self._subscribe()
        try:
            # The scheduler answers at the deadline; this later one is for a scheduler that does not exist.
            return await asyncio.wait_for(asyncio.shield(self._ready), deadline_s + 5.0)
        except TimeoutError:
            raise errors.StartupError(
                f"no scheduler answered at {self._line.address} within {deadline_s:g} s; is it running?"
            ) from None

    def give_up_waiting(self, reason: str) -> None:
        """Make `wait_ready` raise `StartupError`, because a process that it waits for does not come any more."""
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(errors.StartupError(reason))

    # --- requests --------------------------------------------------------------------------------

    def open(self, request: AddRequest, sink: OutputSink) -> None:
        """Send a request; its outputs, and at most one error, go to ``sink`` until the request ends or is closed.

        While there is no scheduler, the request waits here.

        Raises:
            InvalidRequestError, EngineDeadError
        """
        if self._dead is not None:
            raise self._dead
        if request.request_id in self._requests:
            raise errors.InvalidRequestError(f"request id {request.request_id!r} is in use", "request_id")
        encoded = self._encoder.encode(request)
        if len(encoded) > MAX_REQUEST_BYTES:  # the scheduler's socket would close the connection
            what = f"the request has {len(encoded)} bytes; the scheduler takes at most {MAX_REQUEST_BYTES}"
            raise errors.InvalidRequestError(what, "prompt")
        new = OpenRequest(request, sink, time.monotonic() - request.age_s)
        self._requests.add(new)
        self._send_requests(new, encoded)

    def close_request(self, request_id: str, finish_reason: str = "abort") -> None:
        """End a request, if it has not ended, and discard its further outputs."""
        request = self._requests.pop(request_id)
        if request is not None:
            if request.is_sent:
                self._line.send(AbortRequest(request_id=request_id, finish_reason=finish_reason))
            self._send_requests()

    def abort(self, request_id: str, finish_reason: str = "abort") -> None:
        """End a request; its last output has ``finish_reason``. Unknown ids are ignored."""
        request = self._requests.get(request_id)
        if request is None:
            return
        request.end_reason = finish_reason
        if request.is_sent:
            self._line.send(AbortRequest(request_id=request_id, finish_reason=finish_reason))
        else:
            self._requests.pop(request_id)
            asyncio.get_running_loop().call_soon(request.sink, _end_of(request))

    def _send_requests(self, new: OpenRequest | None = None, encoded: bytes = b"") -> None:
        """Send the requests that the present scheduler does not have, those whose turn it is.

        Args:
            new: a request that has just come, with its encoded message.
        """
        if not self._line.is_attached or not self._requests.has_held:
            return
        if self._next_send is not None:
            self._next_send.cancel()
        now = time.monotonic()
        sendable, wait_s = self._requests.take_sendable(now)
        for request in sendable:
            message = request.to_message(now)
            self._line.send_encoded(encoded if request is new else self._encoder.encode(message))
        self._next_send = None
        if wait_s is not None:
            self._next_send = asyncio.get_running_loop().call_later(wait_s, self._send_requests)

    # --- questions to the scheduler --------------------------------------------------------------

    async def stats(self, timeout_s: float = 10.0, recent: bool = False) -> dict[str, Any]:
        """Ask the scheduler for the state of the system. While it is started again, the question waits.

        Args:
            recent: include ``recent``, the last requests and events; see `hbserve.scheduler.stats`.

        Raises:
            SchedulerRestartingError: if the scheduler does not come back in time.
            EngineDeadError: if the scheduler does not answer in time, or has ended for good.
        """
        return await self._ask(GetStats(query_id=next(self._query_ids), recent=recent), timeout_s)

    async def recent_load(self, seconds: float, timeout_s: float = 10.0) -> list[LoadEntry]:
        """Ask for the requests of the last ``seconds`` that have ended well, by arrival. Errors as in `stats`."""
        answer = await self._ask(GetLoad(query_id=next(self._query_ids), seconds=seconds), timeout_s)
        entries: list[LoadEntry] = answer["entries"]
        return entries

    async def set_role(self, instance_id: str, role: InstanceRole, deadline_s: float = 120.0) -> None:
        """Change an instance between prefill, decode and unified; returns when it has changed.

        An instance whose worker is prepared for the role changes at once; what is under way goes on there. Another one
        gets no more requests, finishes those that it has, and then changes; if it has not finished by the deadline, it
        keeps its role. It keeps its weights and its prefix cache.

        Raises:
            UnknownInstanceError: if no instance has that name.
            InvalidRequestError: if the instance cannot change, or has not finished in time; saying why.
            SchedulerRestartingError: if the scheduler has ended meanwhile; then it is unknown what has changed.
            EngineDeadError: if the scheduler does not answer.
        """
        query_id = next(self._query_ids)
        await self._change(SetRole(query_id=query_id, instance_id=instance_id, role=role, deadline_s=deadline_s))

    def prepare_roles(self, roles: Mapping[str, InstanceRole]) -> None:
        """Have the KV links opened that instances would need in these roles, so that a change to them stops no step."""
        self._send_later(PrepareRoles(roles=dict(roles)))

    async def remove_instance(self, instance_id: str, deadline_s: float = 120.0) -> None:
        """Remove an instance; returns when its process has ended, or is about to.

        The instance gets no more requests and finishes those that it has. It is not started again; another instance
        can join later under its name. An instance that has not finished its requests by the deadline stays.
        Errors as in `set_role`.
        """
        query_id = next(self._query_ids)
        await self._change(RemoveInstance(query_id=query_id, instance_id=instance_id, deadline_s=deadline_s))

    def forget_instance(self, instance_id: str) -> None:
        """Have the scheduler forget an instance that was removed and has ended, if it still waits for it."""
        self._send_later(RemoveInstance(query_id=_NO_ANSWER, instance_id=instance_id, deadline_s=0.0, has_ended=True))

    async def _change(self, message: SetRole | RemoveInstance) -> None:
        answer = await self._ask(message, message.deadline_s + self._rpc.heartbeat_timeout_s)
        if answer["is_unknown"]:
            raise errors.UnknownInstanceError(answer["error"], "instance_id")
        if answer["error"] is not None:
            raise errors.InvalidRequestError(answer["error"])

    async def _ask(self, message: Question, timeout_s: float) -> dict[str, Any]:
        if self._dead is not None:
            raise self._dead
        try:
            return await self._questions.ask(message, timeout_s)
        except TimeoutError:
            if self.restarting is not None:
                raise errors.SchedulerRestartingError(self.restarting) from None
            raise errors.EngineDeadError(f"the scheduler did not answer within {timeout_s:g} s") from None

    def report_event(self, kind: EventKind, subject: str, text: str) -> None:
        """Add an event of this process to the system's events; see `hbserve.messages.supervisor.ReportEvent`."""
        self._send_later(ReportEvent(kind=kind, subject=subject, text=text))

    def _send_later(self, message: _Unanswered) -> None:
        """Send a message that is not answered, when there is a scheduler."""
        if not self._line.is_connected or not self._line.send(message):
            self._unsent.append(message)

    # --- the line to the scheduler ---------------------------------------------------------------

    @property
    def restarting(self) -> str | None:
        """Why there is no scheduler just now, while one is awaited; None: there is one, or there never was."""
        if self._line.lost_since is None:
            return None
        return f"the scheduler is being started again: {self._line.why_lost}"

    @property
    def dead(self) -> errors.EngineDeadError | None:
        """Reason why no more requests are served; None while the scheduler lives, or may come back."""
        return self._dead

    @property
    def num_open(self) -> int:
        """Number of requests that have not ended."""
        return len(self._requests)

    def declare_dead(self, reason: str) -> None:
        """End every request and query with `EngineDeadError`, because the scheduler has ended for good."""
        self._dead = errors.EngineDeadError(reason)
        self._line.give_up()
        self._fail_all(self._dead)

    def _fail_requests(self, error: errors.HBServeError) -> None:
        for request in self._requests.pop_all():
            request.sink(error)

    def _fail_all(self, error: errors.EngineDeadError) -> None:
        self._fail_requests(error)
        self._questions.fail(error)
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)

    def _subscribe(self) -> None:
        if self._ready is not None and not self._ready.done():
            self._line.send(SubscribeReady(deadline_s=max(0.0, self._ready_deadline - time.monotonic())))

    def _on_attached(self, attached: Attached) -> None:
        if attached.ended is not None:
            self.declare_dead(attached.ended)
        if self._dead is not None:
            return
        if not self._line.is_connected:
            self._line.enter(LineState.CONNECTED)
            while self._unsent:
                self._line.send(self._unsent.popleft())
            self._questions.send_all()
        if self._line.is_attached or not attached.takes_requests:
            return
        is_another = self._line.on_attached(attached)
        given_up = self._requests.on_scheduler_back(is_another and attached.after_failure, time.monotonic())
        if given_up is not None:
            self._give_up(given_up)
        self._send_requests()

    def _give_up(self, request: OpenRequest) -> None:
        what = f"the scheduler failed {request.num_failures} times in a row with this request"
        logger.error("given_up: request %s: %s", request.id, what)
        self.report_event("given_up", f"request {request.id}", what)
        request.sink(errors.RequestFailedError(f"given up: {what}"))
        self._on_given_up(request.id)

    def _on_lost(self, reason: str, is_first: bool) -> None:
        """The scheduler has ended, or was given up: the open requests and questions wait for the next one."""
        if is_first:
            logger.warning("%s; %d open requests wait for the next scheduler", reason, len(self._requests))
        for request in self._requests.on_scheduler_lost():
            request.sink(_end_of(request))
        self._questions.on_scheduler_lost(reason)

    def _on_overdue(self) -> None:
        late, why_lost = f"within {self._rpc.recovery_timeout_s:g} s (rpc.recovery_timeout_s)", self._line.why_lost
        if self._line.is_connected:
            error = f"{why_lost}; the next one runs, and no instance has come to it {late}"
            self._fail_requests(errors.RequestFailedError(error))
        else:
            self.declare_dead(f"{why_lost}, and did not come back {late}")

    async def _receive(self) -> None:
        while True:
            await asyncio.sleep(0)  # a queue of messages must not block the loop's other work
            reply = await self._line.receive()
            match reply:
                case OutputBatch(outputs=outputs):
                    turn = event_loop.Turn()
                    num_losses = self._line.num_losses
                    for number, output in enumerate(outputs, start=1):
                        self._on_output(output)
                        if number % _OUTPUTS_PER_LOOK == 0 and turn.is_over:
                            await turn.pass_on()
                            if self._line.num_losses != num_losses:
                                break  # the requests have gone on from the outputs before
                    self._send_requests()  # an output may end a trial
                case Attached():
                    self._on_attached(reply)
                case Stats(query_id=query_id, stats=stats):
                    self._questions.on_answer(query_id, stats)
                case RecentLoad(query_id=query_id, entries=entries):
                    self._questions.on_answer(query_id, {"entries": entries})
                case InstanceChanged() as changed:
                    answer = {"error": changed.error, "is_unknown": changed.is_unknown}
                    self._questions.on_answer(changed.query_id, answer)
                case NotReady(reason=reason):
                    self.give_up_waiting(reason)
                case Ready() as ready:
                    self.formats = ready.formats
                    if self._ready is not None and not self._ready.done():
                        self._ready.set_result(ready)

    def _on_output(self, output: RequestOutput) -> None:
        has_ended = output.finish_reason is not None
        find = self._requests.pop if has_ended else self._requests.get
        request = find(output.request_id)
        if request is not None:
            request.note(output, self._line.last_heard)
            request.sink(error_of(output) if output.finish_reason == "error" else output)


def _end_of(request: OpenRequest) -> RequestOutput:
    """Return the last output of a request whose end was asked for while no scheduler had it."""
    return RequestOutput(request_id=request.id, token_ids=[], finish_reason=request.end_reason)
