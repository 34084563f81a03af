"""A tokenizer or detokenizer process of an API server, started, watched and replaced.

Everything that it must know to go on is kept here: open questions, and of every open output the
tokens so far. So one that dies is replaced, is told it all again, and no request notices more than a
pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from hbserve.config import Config
from hbserve.errors import EngineDeadError, InvalidRequestError, RequestFailedError, StartupError
from hbserve.messages.text import (
    Checked,
    CloseText,
    Encoded,
    FeedText,
    OpenText,
    StreamText,
    TextFailed,
    TextReply,
    TextRequest,
    TextStreamOptions,
)
from hbserve.process.parent import ChildProcess, RestartBudget
from hbserve.rpc.async_socket import AsyncSocket
from hbserve.tokenizer.text_service import OnText, OutputStream

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 30.0
_MAX_ATTEMPTS = 3


class _Query:
    """A question, until it is answered."""

    def __init__(self, request: TextRequest, answer: asyncio.Future[TextReply]) -> None:
        self.request, self.answer = request, answer
        self.num_deaths = 0
        self.since = time.monotonic()


class _RemoteStream:
    """An output whose text is made in the process; what it has had is kept, to be told again."""

    def __init__(self, process: TextProcess, number: int, options: TextStreamOptions, on_text: OnText) -> None:
        self._process, self.number, self.options, self.on_text = process, number, options, on_text
        self.answered: list[int] = []
        self.pending: deque[FeedText] = deque()
        self.num_deaths = 0
        self.since = 0.0

    def feed(self, token_ids: list[int], shown: int, last: bool) -> None:
        request = FeedText(stream=self.number, token_ids=token_ids, shown=shown, last=last)
        if not self.pending:
            self.since = time.monotonic()
        self.pending.append(request)
        self._process.send(request)

    def close(self) -> None:
        self._process.close_stream(self)


class TextProcess:
    """One process and its line. Arguments as in `TextProcesses`."""

    def __init__(self, name: str, config: Config, run_dir: str, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.name = name
        self._config, self._run_dir, self._context = config, run_dir, context
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(list[TextReply])
        self._numbers = itertools.count(1)
        self._queries: dict[int, _Query] = {}
        self._streams: dict[int, _RemoteStream] = {}
        self._batch: list[msgspec.Raw] = []
        self._num_starts = 0
        self._child: ChildProcess | None = None
        self._socket: AsyncSocket | None = None
        self._receiver: asyncio.Task[None] | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._dead: EngineDeadError | None = None
        self._heard = 0.0  # when something last came from it
        self._to_ask_again: deque[int] = deque()  # questions that were open when it died, one at a time
        self._suspect: int | None = None  # the one of them that it is at

    # --- requests --------------------------------------------------------------------------------

    @property
    def num_open(self) -> int:
        """Questions that are not answered yet."""
        return len(self._queries)

    async def ask(self, make: Callable[[int], TextRequest], param: str) -> TextReply:
        """Send what ``make(number)`` gives, and wait for its answer.

        Args:
            param: the parameter of the request that it is about.

        Raises:
            InvalidRequestError: if that is the answer.
            RequestFailedError: if the process died of it, again and again.
            EngineDeadError: if the process is gone for good.
        """
        if self._dead is not None:
            raise self._dead
        number = next(self._numbers)
        query = _Query(make(number), asyncio.get_running_loop().create_future())
        self._queries[number] = query
        try:
            self.send(query.request)
            return await query.answer
        except UnicodeEncodeError:  # JSON can write half a surrogate pair
            raise InvalidRequestError(f"{param} holds a lone surrogate, which is no character", param) from None
        finally:
            self._queries.pop(number, None)

    @property
    def dead(self) -> EngineDeadError | None:
        """Why it is gone for good, or None."""
        return self._dead

    def open(self, options: TextStreamOptions, on_text: OnText) -> OutputStream:
        """Begin a stream.

        Raises:
            EngineDeadError: if the process is gone for good.
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

    def send(self, request: TextRequest) -> None:
        """Send with what else there is to send in this turn of the event loop."""
        encoded = msgspec.Raw(self._encoder.encode(request))
        if self._socket is None:
            return  # who comes next is told everything
        if not self._batch:
            asyncio.get_running_loop().call_soon(self._flush)
        self._batch.append(encoded)

    def _flush(self) -> None:
        if self._socket is not None and self._batch:
            with contextlib.suppress(zmq.Again):  # it has just gone; who comes next is told everything
                self._socket.send([self._encoder.encode(self._batch)])
        self._batch.clear()

    async def _receive(self, socket: AsyncSocket) -> None:
        while True:
            (payload,) = await socket.receive()
            self._heard = time.monotonic()
            for reply in self._decoder.decode(payload):
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
        stream.since = time.monotonic()
        stream.num_deaths = 0
        stream.answered += request.token_ids
        if request.last or reply.output.stop_string is not None:
            del self._streams[reply.stream]
        stream.on_text(reply.output)

    def _on_answer(self, reply: Encoded | Checked | TextFailed) -> None:
        if reply.query_id == self._suspect:
            self._ask_again()
        query = self._queries.get(reply.query_id)
        if query is None or query.answer.done():
            return
        if isinstance(reply, TextFailed):
            is_bug = reply.is_bug
            query.answer.set_exception(
                RequestFailedError(reply.error) if is_bug else InvalidRequestError(reply.error, reply.param)
            )
        else:
            query.answer.set_result(reply)

    # --- life ------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """For the operator."""
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
        # A new address each time: nothing that was sent to a dead one can reach the next.
        address = f"ipc://{self._run_dir}/{self.name}.{self._num_starts}"
        socket = AsyncSocket(self._context.socket(zmq.DEALER))
        socket.socket.bind(address)
        orders = {"config": msgspec.to_builtins(self._config), "name": self.name, "address": address}
        self._child = ChildProcess(f"the {self.name}", "hbserve.frontend.text_worker", orders)
        try:
            self._child.start()
            await self._child.wait_ready(deadline)
            await asyncio.wait_for(socket.receive(), max(1.0, deadline - time.monotonic()))  # its greeting
        except TimeoutError:
            socket.close()
            raise StartupError(f"the {self.name} was not ready in time (rpc.start_timeout_s)") from None
        except BaseException:
            socket.close()
            raise
        self._socket = socket
        self._receiver = asyncio.create_task(self._receive(socket))
        for stream in self._streams.values():
            stream.since = time.monotonic()
            self.send(OpenText(stream=stream.number, options=stream.options, token_ids=stream.answered))
            for request in stream.pending:
                self.send(request)
        self._flush()  # outputs are answered before any question that may be the end of this process too
        for query in self._queries.values():
            query.since = time.monotonic()
        self._to_ask_again = deque(self._queries)
        self._ask_again()

    def _ask_again(self) -> None:
        """The next of the questions that were open at a death: alone, so that the next death has one cause."""
        self._suspect = None
        while self._to_ask_again:
            query = self._queries.get(number := self._to_ask_again.popleft())
            if query is not None and not query.answer.done():
                self._suspect = number
                query.since = time.monotonic()
                self.send(query.request)
                return

    async def _keep_alive(self) -> None:
        """Replace the process when it ends on its own."""
        budget = RestartBudget(self._config.rpc.max_restarts)
        while True:
            assert self._child is not None
            code = await self._child.wait()
            # Who ended at its start had not heard of any request. A death at work may be a request's doing, which must
            # not be able to end the service: only other deaths count against it.
            was_at_work = self._socket is not None and self._is_at_work
            if was_at_work:
                self._count_deaths()
            await self._hang_up()
            if not was_at_work and not budget.take():
                self._give_up(f"the {self.name} ended with exit code {code}, too often to be replaced again")
                return
            logger.warning("the %s ended with exit code %d; replacing it", self.name, code)
            try:
                await self._start(time.monotonic() + self._config.rpc.start_timeout_s)
            except StartupError as error:
                logger.error("%s", error)
                await self._child.stop()
            except OSError as error:
                self._give_up(f"no process can be started in place of the {self.name}: {error}")
                return

    def _count_deaths(self) -> None:
        """What has been there at too many deaths may be their cause."""
        for number, query in list(self._queries.items()):
            query.num_deaths += self._suspect in (None, number)
            if query.num_deaths >= _MAX_ATTEMPTS and not query.answer.done():
                query.answer.set_exception(RequestFailedError(f"the {self.name} died of the request, or beside it"))
        for stream in list(self._streams.values()):
            stream.num_deaths += bool(stream.pending)
            if stream.num_deaths >= _MAX_ATTEMPTS:
                del self._streams[stream.number]
                stream.on_text(RequestFailedError(f"the {self.name} died of the output, or beside it"))

    def _give_up(self, reason: str) -> None:
        logger.error("%s", reason)
        self._dead = EngineDeadError(reason)
        for query in self._queries.values():
            if not query.answer.done():
                query.answer.set_exception(self._dead)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.on_text(self._dead)

    async def _watch_answers(self) -> None:
        """A process that hangs is ended, and then replaced."""
        while True:
            await asyncio.sleep(_ANSWER_TIMEOUT_S / 4)
            late = time.monotonic() - _ANSWER_TIMEOUT_S
            waits = any(query.since < late for query in self._queries.values())
            if (
                self._heard < late
            ):  # streams are answered in turn: one that waits while others do not is in a long queue
                waits |= any(stream.pending and stream.since < late for stream in self._streams.values())
            if waits and self._socket is not None and self._child is not None:
                logger.error("the %s has not answered for %g s; ending it", self.name, _ANSWER_TIMEOUT_S)
                self._child.kill()

    async def _hang_up(self) -> None:
        socket, self._socket = self._socket, None
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.cancel()
        if socket is not None:
            socket.close()  # before anything is awaited: a cancel there must not leave it behind
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
        await self._hang_up()
        if self._dead is None:
            self._dead = EngineDeadError("the server has ended")
