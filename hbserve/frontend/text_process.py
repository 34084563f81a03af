"""API server's side of a tokenizer or detokenizer process: start, watch and replace it.

The API server keeps all state that the process needs: the open questions, and the tokens so far of every open output.
A process that dies is replaced, its successor gets that state again, and requests see only a pause.
`hbserve.frontend.text_worker` is the process itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from hbserve.config import Config
from hbserve.errors import ContextLengthError, EngineDeadError, InvalidRequestError, RequestFailedError, StartupError
from hbserve.messages.text import (
    Answer,
    CheckGrammar,
    CloseText,
    EncodeChat,
    FeedText,
    OpenText,
    Question,
    StreamText,
    TextFailed,
    TextReply,
    TextRequest,
    TextStreamOptions,
)
from hbserve.process import event_loop
from hbserve.process.events import OnEvent, log_event
from hbserve.process.parent import ChildProcess, RestartBudget
from hbserve.process.stopwatch import Start
from hbserve.rpc.async_socket import AsyncSocket, remove_file
from hbserve.tokenizer.text_service import OnText, OutputStream

_MODULE = "hbserve.frontend.text_worker"
_ANSWER_TIMEOUT_S = 30.0
_MAX_ATTEMPTS = 3
_DIED = f"the process died of it, or beside it, {_MAX_ATTEMPTS} times; it fails, and the others go on"
_LANES = ("chats", "side")
_RETRY_START_S = 1.0
"""Time between two tries to start a process that the system refuses."""
_REPLIES_PER_LOOK = 16
"""Replies between two looks at the clock."""
_MIN_FRAME_BYTES = 2**16
"""Contents of questions from this size on are sent without a copy."""


class _Query:
    """Question that is not answered yet.

    Attributes:
        content: what does not fit into the request; see `hbserve.messages.text.EncodeText`.
        lane: thread of the process that answers it, after those before it in this lane; None: a thread of its own.
        was_at_work: whether the process worked on it when it ended, or was killed: then it is asked again last.
    """

    def __init__(self, request: Question, content: bytes | bytearray | None, answer: asyncio.Future[Answer]) -> None:
        self.request, self.content, self.answer = request, content, answer
        self.num_deaths = 0
        self.asked_at = time.monotonic()
        self.lane: str | None = "side"
        if isinstance(request, CheckGrammar):
            self.lane = None
        elif isinstance(request, EncodeChat):
            self.lane = None if request.has_template else "chats"
        self.was_at_work = False


class TooSlowError(InvalidRequestError):
    """A chat whose template took longer than its share of processor time."""


class _RemoteStream:
    """Output whose text the process makes; keeps all its tokens, for a successor of the process."""

    def __init__(self, process: TextProcess, number: int, options: TextStreamOptions, on_text: OnText) -> None:
        self._process, self.number, self.options, self.on_text = process, number, options, on_text
        self.answered: list[int] = []  # tokens whose text has come
        self.pending: deque[FeedText] = deque()
        self.num_deaths = 0
        self.waits_since = 0.0

    def feed(self, token_ids: list[int], shown: int, last: bool) -> None:
        request = FeedText(stream=self.number, token_ids=token_ids, shown=shown, last=last)
        if not self.pending:
            self.waits_since = time.monotonic()
        self.pending.append(request)
        self._process.send(request)

    def close(self) -> None:
        self._process.close_stream(self)


class TextProcess:
    """One process, its socket, and what it has to do. Arguments as in `TextProcesses`.

    Args:
        niceness: added to that of this process.
        renders_chats: whether there will be chats, for which the process prepares at its start.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        run_dir: str,
        context: zmq.Context[zmq.Socket[bytes]],
        on_event: OnEvent = log_event,
        niceness: int = 0,
        renders_chats: bool = False,
    ) -> None:
        self.name = name
        self._more_orders = {"niceness": niceness, "renders_chats": renders_chats}
        self._on_event = on_event
        self._config, self._run_dir, self._context = config, run_dir, context
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(list[TextReply])
        self._numbers = itertools.count(1)
        self._queries: dict[int, _Query] = {}
        self._streams: dict[int, _RemoteStream] = {}
        self._batch: list[TextRequest] = []
        self._num_starts = 0
        self._child: ChildProcess | None = None
        self._socket: AsyncSocket | None = None
        self._address = ""
        self._receiver: asyncio.Task[None] | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._dead: EngineDeadError | None = None
        self._last_heard = 0.0
        self._last_answers: dict[str | None, float] = {}  # by lane
        self._is_restarted = False  # killed by `restart`, and not replaced yet
        self._why_killed: str | None = None  # if it was killed, in words that follow its name
        self._to_ask_again: deque[int] = deque()  # questions that were open at a death
        self._suspect: int | None = None  # the one of these that the process has now

    # --- requests --------------------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        """Whether the process is there; False while it starts or is being replaced."""
        return self._socket is not None

    @property
    def num_open(self) -> int:
        """Number of questions that are not answered yet."""
        return len(self._queries)

    async def ask(
        self, make: Callable[[int, bytes | None], Question], content: bytes | bytearray | None = None
    ) -> Answer:
        """Send the question ``make(number, content)`` and wait for its answer.

        Args:
            make: gets None for a content that is too large for the request, and follows it.

        Raises:
            InvalidRequestError: if that is the answer.
            RequestFailedError: if several processes died while they had the question.
            EngineDeadError: if the process is not replaced any more.
        """
        if self._dead is not None:
            raise self._dead
        number = next(self._numbers)
        inline = bytes(content) if content is not None and len(content) < _MIN_FRAME_BYTES else None
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        query = _Query(make(number, inline), content if inline is None else None, future)
        self._queries[number] = query
        try:
            self.send(query.request, query.content)
            return await query.answer
        finally:
            self._queries.pop(number, None)
            if not query.answer.done() or query.answer.cancelled():  # the client has gone: spare the process the work
                self.send(CloseText(stream=number))

    @property
    def dead(self) -> EngineDeadError | None:
        """Reason why the process is not replaced any more, or None."""
        return self._dead

    def open(self, options: TextStreamOptions, on_text: OnText) -> OutputStream:
        """Begin a stream.

        Raises:
            EngineDeadError: if the process is not replaced any more.
        """
        if self._dead is not None:
            raise self._dead
        stream = _RemoteStream(self, next(self._numbers), options, on_text)
        self._streams[stream.number] = stream
        self.send(OpenText(stream=stream.number, options=options, token_ids=[]))
        return stream

    def close_stream(self, stream: _RemoteStream) -> None:
        """Forget a stream."""
        if self._streams.pop(stream.number, None) is not None:
            self.send(CloseText(stream=stream.number))

    def send(self, request: TextRequest, content: bytes | bytearray | None = None) -> None:
        """Send a request, in one message with all others of this turn of the event loop.

        Args:
            content: sent along as a frame of its own, which is not copied and must not change.
        """
        if self._socket is None:
            return  # the successor gets the whole state
        if content is not None:
            self._flush()
            with contextlib.suppress(zmq.Again):
                self._socket.send([self._encoder.encode([request]), content])
            return
        if not self._batch:
            asyncio.get_running_loop().call_soon(self._flush)
        self._batch.append(request)

    def _flush(self) -> None:
        if self._socket is not None and self._batch:
            with contextlib.suppress(zmq.Again):  # the process has just ended; its successor gets the whole state
                self._socket.send([self._encoder.encode(self._batch)])
        self._batch.clear()

    async def _receive(self, socket: AsyncSocket) -> None:
        while True:
            (payload,) = await socket.receive()
            self._last_heard = time.monotonic()
            turn = event_loop.Turn()
            for number, reply in enumerate(self._decoder.decode(payload), start=1):
                if number % _REPLIES_PER_LOOK == 0 and turn.is_over:
                    await turn.pass_on()
                if isinstance(reply, StreamText):
                    self._on_stream_text(reply)
                else:
                    self._on_answer(reply)
            await asyncio.sleep(0)

    def _on_stream_text(self, reply: StreamText) -> None:
        stream = self._streams.get(reply.stream)
        if stream is None:
            return
        request = stream.pending.popleft()
        stream.waits_since = time.monotonic()
        stream.num_deaths = 0
        stream.answered += request.token_ids
        if request.last or reply.output.stop_string is not None:
            del self._streams[reply.stream]
        stream.on_text(reply.output)

    def _on_answer(self, reply: Answer) -> None:
        if reply.query_id == self._suspect:
            self._ask_again()
        query = self._queries.get(reply.query_id)
        if query is None:  # its client has gone: whichever lane it had, that one works
            self._last_answers.update(dict.fromkeys(_LANES, time.monotonic()))
        else:
            self._last_answers[query.lane] = time.monotonic()
        if query is None or query.answer.done():
            return
        if not isinstance(reply, TextFailed):
            query.answer.set_result(reply)
        elif reply.is_bug:
            self._on_event("bug", self.name, reply.error)
            query.answer.set_exception(RequestFailedError(reply.error))
        elif reply.is_too_slow:
            query.answer.set_exception(TooSlowError(reply.error, reply.param))
        elif reply.is_too_long:
            query.answer.set_exception(ContextLengthError(reply.error, reply.param))
        else:
            query.answer.set_exception(InvalidRequestError(reply.error, reply.param))

    # --- start and replacement -------------------------------------------------------------------

    @property
    def latest_start(self) -> Start | None:
        """The process's latest start that has succeeded."""
        return None if self._child is None else self._child.latest_start

    def report(self) -> dict[str, Any]:
        """Return pid, restarts and open work, for the operator."""
        child = self._child
        return {
            "pid": child.pid if child is not None and child.is_alive() else None,
            "restarts": max(0, self._num_starts - 1),
            "open_questions": len(self._queries),
            "open_streams": len(self._streams),
        }

    @property
    def _is_at_work(self) -> bool:
        return bool(self._queries) or any(stream.pending for stream in self._streams.values())

    async def start(self, deadline: float) -> None:
        """Start the process; see `TextProcesses.start`."""
        await self._start(deadline)
        self._watchers = [asyncio.create_task(self._keep_alive()), asyncio.create_task(self._watch_answers())]

    async def _start(self, deadline: float) -> None:
        self._num_starts += 1
        # Each process has an address of its own: no message to a dead process can reach its successor.
        address = f"ipc://{self._run_dir}/{self.name}.{self._num_starts}"
        socket = AsyncSocket(self._context.socket(zmq.DEALER))
        orders = {"config": msgspec.to_builtins(self._config), "name": self.name, "address": address}
        self._child = ChildProcess(f"the {self.name}", _MODULE, orders | self._more_orders)
        try:
            socket.socket.bind(address)
            self._child.start()
            await self._child.wait_ready(deadline)
            await self._wait_for_greeting(socket, self._child)
        except BaseException:
            socket.close()
            remove_file(address)
            raise
        self._socket, self._address = socket, address
        self._receiver = asyncio.create_task(self._receive(socket))
        for stream in self._streams.values():
            stream.waits_since = time.monotonic()
            self.send(OpenText(stream=stream.number, options=stream.options, token_ids=stream.answered))
            for request in stream.pending:
                self.send(request)
        self._flush()  # outputs first: a question may end this process too
        for query in self._queries.values():
            query.asked_at = math.inf  # not yet, see `_ask_again`
        self._to_ask_again = deque(sorted(self._queries, key=lambda number: self._queries[number].was_at_work))
        self._ask_again()

    async def _wait_for_greeting(self, socket: AsyncSocket, child: ChildProcess) -> None:
        """Wait for the first message of a process that is ready, or for its end, whichever comes first."""
        greeting, end = asyncio.create_task(socket.receive()), asyncio.create_task(child.wait())
        try:
            done, _ = await asyncio.wait(
                {greeting, end}, timeout=_ANSWER_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if greeting in done:
                return
            if end in done:
                raise StartupError(f"the {self.name} ended after its start with exit code {end.result()}; see its log")
            raise StartupError(f"the {self.name} was started and sent no message within {_ANSWER_TIMEOUT_S:g} s")
        finally:
            for task in (greeting, end):
                task.cancel()
            await asyncio.gather(greeting, end, return_exceptions=True)

    def _ask_again(self) -> None:
        """Send the next question that was open at a death, alone, so that the next death has one cause."""
        self._suspect = None
        while self._to_ask_again:
            query = self._queries.get(number := self._to_ask_again.popleft())
            if query is not None and not query.answer.done():
                self._suspect = number
                query.asked_at = time.monotonic()
                self.send(query.request, query.content)
                return

    def seconds_with(self, number: int) -> float:
        """Return how long the process has had a question; 0 while it is being replaced, or has another one first."""
        query = self._queries.get(number)
        if query is None or self._socket is None or number in self._to_ask_again:
            return 0.0
        return time.monotonic() - query.asked_at

    def restart(self, why: str) -> None:
        """Replace the process, because it does work that cannot be interrupted; other questions are asked again.

        Args:
            why: in words that follow the name of the process.
        """
        if self._socket is not None and self._child is not None:
            self._why_killed, self._is_restarted = why, True
            self._child.kill()

    async def _keep_alive(self) -> None:
        """Replace the process when it ends on its own."""
        budget = RestartBudget(self._config.rpc.max_restarts)
        while True:
            assert self._child is not None
            code = await self._child.wait()
            # A request may have caused a death at work, and no request may end the service. Only deaths at the start,
            # or without work, count against the budget.
            was_at_work = self._socket is not None and self._is_at_work
            was_restarted, self._is_restarted = self._is_restarted, False
            how, self._why_killed = self._why_killed or f"ended with exit code {code}", None
            if was_at_work and not was_restarted:
                self._count_deaths()
            await self._disconnect()
            if not (was_at_work or was_restarted) and not budget.take():
                self._give_up(f"the {self.name} {how}, too often to be replaced again (rpc.max_restarts)")
                return
            self._on_event("text_restarted", self.name, f"it {how} and is replaced")
            await self._replace()

    async def _replace(self) -> None:
        """Start a successor, which may end again at once; wait while the system has no process or descriptor for it."""
        is_reported = False
        while True:
            try:
                await self._start(time.monotonic() + self._config.rpc.start_timeout_s)
                return
            except StartupError as error:
                self._on_event("start_failed", self.name, f"{error}; it is tried again")
                assert self._child is not None
                await self._child.stop()
                return
            except (OSError, zmq.ZMQError) as error:
                if not is_reported:
                    self._on_event("start_failed", self.name, f"{error}; it is tried again every second")
                is_reported = True
                await asyncio.sleep(_RETRY_START_S)

    def _count_deaths(self) -> None:
        """Fail the questions and outputs that were open at too many deaths: they may be the cause."""
        for query in self._oldest_in_lanes():
            query.was_at_work = True
        for number, query in list(self._queries.items()):
            query.num_deaths += self._suspect in (None, number)
            if query.num_deaths >= _MAX_ATTEMPTS and not query.answer.done():
                query.answer.set_exception(RequestFailedError(f"the {self.name} died of the request, or beside it"))
                self._on_event("given_up", f"a request at {self.name}", _DIED)
        for stream in list(self._streams.values()):
            stream.num_deaths += bool(stream.pending)
            if stream.num_deaths >= _MAX_ATTEMPTS:
                del self._streams[stream.number]
                stream.on_text(RequestFailedError(f"the {self.name} died of the output, or beside it"))
                self._on_event("given_up", f"an output at {self.name}", _DIED)

    def _give_up(self, reason: str) -> None:
        self._on_event("given_up", self.name, reason)
        self._dead = EngineDeadError(reason)
        for query in self._queries.values():
            if not query.answer.done():
                query.answer.set_exception(self._dead)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.on_text(self._dead)

    async def _watch_answers(self) -> None:
        """Kill a process that does not answer; `_keep_alive` then replaces it."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(_ANSWER_TIMEOUT_S / 4)
            if time.monotonic() - began > _ANSWER_TIMEOUT_S / 2:
                continue  # this process did not run itself: first it reads what has come meanwhile
            late = time.monotonic() - _ANSWER_TIMEOUT_S
            is_late = self._has_late_question(late)
            if self._last_heard < late:  # else other streams get answers, and this one is in a long queue
                is_late |= any(stream.pending and stream.waits_since < late for stream in self._streams.values())
            if is_late and self._socket is not None and self._child is not None:
                self._why_killed = f"did not answer for {_ANSWER_TIMEOUT_S:g} s"
                self._child.kill()

    def _oldest_in_lanes(self) -> list[_Query]:
        by_lane = [[query for query in self._queries.values() if query.lane == lane] for lane in _LANES]
        return [min(queries, key=lambda query: query.asked_at) for queries in by_lane if queries]

    def _has_late_question(self, late: float) -> bool:
        """Return whether a question was to be answered since ``late``, and mark the questions that may be the cause."""
        causes = [query for query in self._queries.values() if query.lane is None and query.asked_at < late]
        for oldest in self._oldest_in_lanes():  # one is answered after the other
            if max(oldest.asked_at, self._last_answers.get(oldest.lane, 0.0)) < late:
                causes.append(oldest)
        for query in causes:
            query.was_at_work = True
        return bool(causes)

    async def _disconnect(self) -> None:
        socket, self._socket = self._socket, None
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.cancel()
        if socket is not None:
            socket.close()  # before the first await: a cancel there must not leave the socket open
            remove_file(self._address)
        if receiver is not None:
            await asyncio.gather(receiver, return_exceptions=True)

    async def stop(self) -> None:
        """End the process. May be called twice."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        self._watchers.clear()
        if self._child is not None:
            await self._child.stop()
            self._child = None
        await self._disconnect()
        if self._dead is None:
            self._dead = EngineDeadError("the server has ended")
