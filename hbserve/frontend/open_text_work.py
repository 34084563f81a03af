"""The work that is open at a tokenizer or detokenizer process: questions, and outputs whose text it makes.

The API server keeps all of it, so that a successor can go on when the process dies. Work may be the cause of a death:

1.  Questions that were open at a death are asked again one by one, so that the next death has one cause. Questions
    that the process worked on when it died come last.
2.  A question or output that was open at `_MAX_ATTEMPTS` deaths fails, and the others go on.

No processes and no sockets. Runs in the API server's event loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable

from hbserve.errors import ContextLengthError, EngineDeadError, InvalidRequestError, RequestFailedError
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
    TextRequest,
    TextStreamOptions,
)
from hbserve.process.events import OnEvent
from hbserve.tokenizer.text_service import OnText

_MAX_ATTEMPTS = 3
_DIED = f"the process died of it, or beside it, {_MAX_ATTEMPTS} times; it fails, and the others go on"
_LANES = ("chats", "side")


class OpenQuestion:
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


class OpenStream:
    """Output whose text the process makes; keeps all its tokens, for a successor of the process."""

    def __init__(self, work: OpenTextWork, number: int, options: TextStreamOptions, on_text: OnText) -> None:
        self._work, self.number, self.options, self.on_text = work, number, options, on_text
        self.answered: list[int] = []  # tokens whose text has come
        self.pending: deque[FeedText] = deque()
        self.num_deaths = 0
        self.waits_since = 0.0

    def feed(self, token_ids: list[int], shown: int, last: bool) -> None:
        """See `OutputStream.feed`."""
        request = FeedText(stream=self.number, token_ids=token_ids, shown=shown, last=last)
        if not self.pending:
            self.waits_since = time.monotonic()
        self.pending.append(request)
        self._work.send(request)

    def close(self) -> None:
        """See `OutputStream.close`."""
        self._work.close_stream(self)


class OpenTextWork:
    """Questions and outputs that are open at one process.

    Args:
        name: of the process.
        send: sends a request, with the content that follows it; drops it while there is no process.
    """

    def __init__(
        self, name: str, send: Callable[[TextRequest, bytes | bytearray | None], None], on_event: OnEvent
    ) -> None:
        self._name = name
        self._send = send
        self._on_event = on_event
        self._questions: dict[int, OpenQuestion] = {}
        self._streams: dict[int, OpenStream] = {}
        self._last_answers: dict[str | None, float] = {}  # by lane
        self._to_ask_again: deque[int] = deque()  # questions that were open at a death
        self._suspect: int | None = None  # the one of these that the process has now

    @property
    def num_questions(self) -> int:
        """Number of questions that are not answered yet."""
        return len(self._questions)

    @property
    def num_streams(self) -> int:
        """Number of outputs that have not ended."""
        return len(self._streams)

    @property
    def is_waiting(self) -> bool:
        """Whether the process has something to do."""
        return bool(self._questions) or any(stream.pending for stream in self._streams.values())

    def send(self, request: TextRequest) -> None:
        """Send a request."""
        self._send(request, None)

    def add_question(self, number: int, question: OpenQuestion) -> None:
        """Add a question and send it."""
        self._questions[number] = question
        self._send(question.request, question.content)

    def end_question(self, number: int) -> None:
        """Forget a question. If it has no answer, its client has gone: spare the process the work."""
        question = self._questions.pop(number)
        if not question.answer.done() or question.answer.cancelled():
            self.send(CloseText(stream=number))

    def open_stream(self, number: int, options: TextStreamOptions, on_text: OnText) -> OpenStream:
        """Begin an output."""
        stream = self._streams[number] = OpenStream(self, number, options, on_text)
        self.send(OpenText(stream=number, options=options, token_ids=[]))
        return stream

    def close_stream(self, stream: OpenStream) -> None:
        """Forget an output."""
        if self._streams.pop(stream.number, None) is not None:
            self.send(CloseText(stream=stream.number))

    # --- answers ---------------------------------------------------------------------------------

    def on_text(self, reply: StreamText) -> None:
        """The process has made text of the oldest tokens that an output waits for."""
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

    def on_answer(self, reply: Answer) -> None:
        """The process has answered a question."""
        if reply.query_id == self._suspect:
            self.ask_next_again()
        question = self._questions.get(reply.query_id)
        if question is None:  # its client has gone: whichever lane it had, that one works
            self._last_answers.update(dict.fromkeys(_LANES, time.monotonic()))
        else:
            self._last_answers[question.lane] = time.monotonic()
        if question is None or question.answer.done():
            return
        if not isinstance(reply, TextFailed):
            question.answer.set_result(reply)
        elif reply.is_bug:
            self._on_event("bug", self._name, reply.error)
            question.answer.set_exception(RequestFailedError(reply.error))
        elif reply.is_too_slow:
            question.answer.set_exception(TooSlowError(reply.error, reply.param))
        elif reply.is_too_long:
            question.answer.set_exception(ContextLengthError(reply.error, reply.param))
        else:
            question.answer.set_exception(InvalidRequestError(reply.error, reply.param))

    # --- deaths ----------------------------------------------------------------------------------

    def send_streams_again(self) -> None:
        """Send all outputs to a successor of the process."""
        for stream in self._streams.values():
            stream.waits_since = time.monotonic()
            self.send(OpenText(stream=stream.number, options=stream.options, token_ids=stream.answered))
            for request in stream.pending:
                self.send(request)

    def begin_asking_again(self) -> None:
        """Send a successor the first of the open questions; each answer brings the next."""
        for question in self._questions.values():
            question.asked_at = math.inf  # not yet
        self._to_ask_again = deque(sorted(self._questions, key=lambda number: self._questions[number].was_at_work))
        self.ask_next_again()

    def ask_next_again(self) -> None:
        """Send the next question that was open at a death, alone, so that the next death has one cause."""
        self._suspect = None
        while self._to_ask_again:
            question = self._questions.get(number := self._to_ask_again.popleft())
            if question is not None and not question.answer.done():
                self._suspect = number
                question.asked_at = time.monotonic()
                self._send(question.request, question.content)
                return

    def seconds_with(self, number: int) -> float:
        """Return how long the process has had a question; 0 if it has another one first."""
        question = self._questions.get(number)
        return 0.0 if question is None or number in self._to_ask_again else time.monotonic() - question.asked_at

    def count_deaths(self) -> None:
        """Fail the questions and outputs that were open at too many deaths: they may be the cause."""
        for question in self._oldest_in_lanes():
            question.was_at_work = True
        for number, question in list(self._questions.items()):
            question.num_deaths += self._suspect in (None, number)
            if question.num_deaths >= _MAX_ATTEMPTS and not question.answer.done():
                question.answer.set_exception(RequestFailedError(f"the {self._name} died of the request, or beside it"))
                self._on_event("given_up", f"a request at {self._name}", _DIED)
        for stream in list(self._streams.values()):
            stream.num_deaths += bool(stream.pending)
            if stream.num_deaths >= _MAX_ATTEMPTS:
                del self._streams[stream.number]
                stream.on_text(RequestFailedError(f"the {self._name} died of the output, or beside it"))
                self._on_event("given_up", f"an output at {self._name}", _DIED)

    def fail_all(self, error: EngineDeadError) -> None:
        """End everything: there will be no process any more."""
        for question in self._questions.values():
            if not question.answer.done():
                question.answer.set_exception(error)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.on_text(error)

    # --- silence ---------------------------------------------------------------------------------

    def is_late(self, since: float, last_heard: float) -> bool:
        """Whether a question or an output has waited since ``since``; marks the questions that may be the cause.

        Args:
            last_heard: when the process last sent something.
        """
        is_late = self._has_late_question(since)
        if last_heard < since:  # else other streams get answers, and this one is in a long queue
            is_late |= any(stream.pending and stream.waits_since < since for stream in self._streams.values())
        return is_late

    def _oldest_in_lanes(self) -> list[OpenQuestion]:
        by_lane = [[question for question in self._questions.values() if question.lane == lane] for lane in _LANES]
        return [min(questions, key=lambda question: question.asked_at) for questions in by_lane if questions]

    def _has_late_question(self, late: float) -> bool:
        """Return whether a question has been unanswered since ``late``; marks the questions that may be the cause."""
        own_threads = [question for question in self._questions.values() if question.lane is None]
        causes = [question for question in own_threads if question.asked_at < late]
        for oldest in self._oldest_in_lanes():  # one is answered after the other
            if max(oldest.asked_at, self._last_answers.get(oldest.lane, 0.0)) < late:
                causes.append(oldest)
        for question in causes:
            question.was_at_work = True
        return bool(causes)
