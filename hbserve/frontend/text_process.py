"""API server's side of a tokenizer or detokenizer process: start, watch and replace it.

`hbserve.frontend.text_worker` is the process itself. When it dies, a successor gets all open work again
(`hbserve.frontend.open_text_work`), and requests see only a pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from hbserve.config import Config
from hbserve.errors import EngineDeadError, StartupError
from hbserve.frontend.open_text_work import OpenQuestion, OpenTextWork
from hbserve.messages.text import (
    Answer,
    Question,
    StreamText,
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
_RETRY_START_S = 1.0
"""Time between two tries to start a process that the system refuses."""
_REPLIES_PER_LOOK = 16
"""Replies between two looks at the clock."""
_MIN_FRAME_BYTES = 2**16
"""Contents of questions from this size on are sent without a copy."""


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
        self._work = OpenTextWork(name, self.send, on_event)
        self._batch: list[TextRequest] = []
        self._num_starts = 0
        self._child: ChildProcess | None = None
        self._socket: AsyncSocket | None = None
        self._address = ""
        self._receiver: asyncio.Task[None] | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._dead: EngineDeadError | None = None
        self._last_heard = 0.0
        self._is_restarted = False  # killed by `restart`, and not replaced yet
        self._why_killed: str | None = None  # if it was killed, in words that follow its name

    # --- requests --------------------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        """Whether the process is there; False while it starts or is being replaced."""
        return self._socket is not None

    @property
    def num_open(self) -> int:
        """Number of questions that are not answered yet."""
        return self._work.num_questions

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
        question = OpenQuestion(make(number, inline), content if inline is None else None, future)
        try:
            self._work.add_question(number, question)
            return await future
        finally:
            self._work.end_question(number)

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
        return self._work.open_stream(next(self._numbers), options, on_text)

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
                    self._work.on_text(reply)
                else:
                    self._work.on_answer(reply)
            await asyncio.sleep(0)

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
            "open_questions": self._work.num_questions,
            "open_streams": self._work.num_streams,
        }

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
        self._work.send_streams_again()
        self._flush()  # outputs first: a question may end this process too
        self._work.begin_asking_again()

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

    def seconds_with(self, number: int) -> float:
        """Return how long the process has had a question; 0 while it is being replaced, or has another one first."""
        return 0.0 if self._socket is None else self._work.seconds_with(number)

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
            was_at_work = self._socket is not None and self._work.is_waiting
            was_restarted, self._is_restarted = self._is_restarted, False
            how, self._why_killed = self._why_killed or f"ended with exit code {code}", None
            if was_at_work and not was_restarted:
                self._work.count_deaths()
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

    def _give_up(self, reason: str) -> None:
        self._on_event("given_up", self.name, reason)
        self._dead = EngineDeadError(reason)
        self._work.fail_all(self._dead)

    async def _watch_answers(self) -> None:
        """Kill a process that does not answer; `_keep_alive` then replaces it."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(_ANSWER_TIMEOUT_S / 4)
            if time.monotonic() - began > _ANSWER_TIMEOUT_S / 2:
                continue  # this process did not run itself: first it reads what has come meanwhile
            is_late = self._work.is_late(time.monotonic() - _ANSWER_TIMEOUT_S, self._last_heard)
            if is_late and self._socket is not None and self._child is not None:
                self._why_killed = f"did not answer for {_ANSWER_TIMEOUT_S:g} s"
                self._child.kill()

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
