"""Text process: encodes prompts and decodes outputs for an API server.

It keeps no state that the API server cannot send again; see `hbserve.frontend.text_process`.

    event loop, in a thread   sockets; outputs; between them short prompts
    main thread               chats, one after the other, each with a limit of time
    side thread               long prompts, large bodies, long outputs, one after the other
    threads                   grammars; templates of requests, which run in processes of their own

A chat template is a program, and may loop. It runs in the main thread, because only there can a signal interrupt Python
code. What the side thread does takes a time that the limits of size bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import queue
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn, TypeVar

import msgspec
import zmq

from hbserve import bounded_json
from hbserve.cache_folder.transformers_import import leave_out_torch
from hbserve.config import Config
from hbserve.errors import ContextLengthError, InvalidRequestError
from hbserve.grammar import start_thread
from hbserve.messages.text import (
    Answer,
    BodyRead,
    Chat,
    Checked,
    CheckGrammar,
    CloseText,
    Decoded,
    DecodeTokens,
    EncodeChat,
    Encoded,
    EncodeText,
    FeedText,
    OpenText,
    Question,
    ReadBody,
    StreamText,
    TextFailed,
    TextReply,
    TextRequest,
)
from hbserve.process import child, event_loop
from hbserve.process.stopwatch import Stopwatch, process_start
from hbserve.rpc.async_socket import AsyncSocket
from hbserve.tokenizer import Tokenizer
from hbserve.tokenizer.chat_template import MAX_AT_ONCE, TEMPLATE_ERRORS
from hbserve.tokenizer.text_service import LONG_TEXT, TextDecoding

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_TEMPLATES = 4 * MAX_AT_ONCE
"""Requests with a template of their own, waiting ones included: the last must be answered before the API server gives
up the process."""
_MAX_WALL_S = 25.0
"""Time for one chat on a busy machine: the API server replaces a process that has not answered for 30 s."""
_SWITCH_INTERVAL_S = 0.0005
"""Time after which a thread that computes gives Python's lock to one that waits."""
_MIN_TIMER_S = 0.001
"""A timer of less than a microsecond would be none."""
_MAX_TRIAL_S = 5.0
"""Processor time for the model's chat templates at the start."""
MAX_MEMORY_BYTES = 4 * 2**30
"""Memory for requests, besides that of the loaded tokenizer."""

_PROMPTS_S = 0.003
"""Time for short prompts before the event loop looks for new outputs."""
_MESSAGES_PER_TURN = 16
_QUIET_STREAMS = 256
"""Open outputs with which a full garbage collection is short."""


class _TooLong(BaseException):
    """The work took too long. Not an Exception, so that no library takes it for its own."""


class TextWorker:
    """Worker that answers requests, in batches, on one socket.

    Args:
        address: address on which the API server listens.
    """

    def __init__(self, tokenizer: Tokenizer, address: str) -> None:
        self._tokenizer = tokenizer
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = AsyncSocket(self._context.socket(zmq.DEALER))
        self._socket.socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(list[TextRequest])
        self._streams: dict[int, TextDecoding] = {}
        self._replies: list[TextReply] = []
        self._tasks: set[asyncio.Task[None]] = set()
        # Threads of their own: such a template may take seconds, and long texts must not wait for it.
        self._template_threads = ThreadPoolExecutor(MAX_AT_ONCE, "template")
        self._num_templates = 0
        self._side_thread = ThreadPoolExecutor(1, "side")
        self._chats: queue.SimpleQueue[EncodeChat] = queue.SimpleQueue()
        self._prompts: deque[EncodeText] = deque()  # short ones
        self._has_prompts = asyncio.Event()
        self._waiting: set[int] = set()  # numbers of jobs and prompts that have not begun, and whose clients are there
        self._loop: asyncio.AbstractEventLoop | None = None
        self._until_s = 0.0
        self._is_limited = False  # only while it is set, the alarm interrupts the main thread

    # --- main thread -----------------------------------------------------------------------------

    def work(self) -> NoReturn:
        """Render one chat after the other, for ever."""
        while True:
            request = self._chats.get()
            if request.query_id not in self._waiting:
                continue  # its client has gone
            self._waiting.discard(request.query_id)
            try:
                with self._limited(request.max_cpu_s):
                    rendered = self._reply_or(partial(self._render, request), request)
            except _TooLong:
                limits = f"{request.max_cpu_s:g} s of processor time, or {_MAX_WALL_S:g} s in all"
                error = f"the request took more than {limits}, for its chat template"
                rendered = TextFailed(query_id=request.query_id, error=error, param="messages", is_too_slow=True)
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._on_rendered, request, rendered)

    def prepare(self) -> None:
        """Try the chat templates out, so that the first chat takes no longer than others."""
        signal.signal(signal.SIGPROF, self._on_cpu_alarm)
        signal.signal(signal.SIGALRM, self._on_alarm)
        with contextlib.suppress(_TooLong, *TEMPLATE_ERRORS), self._limited(_MAX_TRIAL_S):
            self._tokenizer.prepare_chats()

    def _render(self, request: EncodeChat) -> str:
        assert request.content is not None
        chat = msgspec.msgpack.decode(request.content, type=Chat)
        return self._tokenizer.render_chat(chat.messages, chat.tools, chat.options)

    @contextmanager
    def _limited(self, seconds: float) -> Iterator[None]:
        self._until_s = time.thread_time() + seconds
        self._is_limited = True
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, _MAX_WALL_S)
        try:
            yield
        finally:
            self._is_limited = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _on_cpu_alarm(self, *_: Any) -> None:
        left_s = self._until_s - time.thread_time()  # the alarm counts the time of all threads
        if self._is_limited and left_s > 0:
            signal.setitimer(signal.ITIMER_PROF, max(left_s, _MIN_TIMER_S))
        else:
            self._on_alarm()

    def _on_alarm(self, *_: Any) -> None:
        if self._is_limited:
            self._is_limited = False
            raise _TooLong

    # --- event loop ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve for ever."""
        self._loop = asyncio.get_running_loop()
        self._socket.send([self._encoder.encode(self._replies)])  # a greeting: the connection works
        collect = child.collect_when_quiet(lambda: len(self._streams) <= _QUIET_STREAMS)
        await asyncio.gather(self._receive(), self._encode_prompts(), collect)

    async def _receive(self) -> None:
        for number in itertools.count(1):
            frames = await self._socket.receive()
            for request in self._decoder.decode(frames[0]):
                if len(frames) > 1 and isinstance(request, EncodeText | EncodeChat | ReadBody):
                    request = msgspec.structs.replace(request, content=frames[1])
                self._handle(request)
            self._flush()
            if number % _MESSAGES_PER_TURN == 0:
                await asyncio.sleep(0)

    async def _encode_prompts(self) -> None:
        """Encode short prompts, in turns: outputs of streams must not wait for many of them."""
        while True:
            await self._has_prompts.wait()
            until = time.monotonic() + _PROMPTS_S
            while self._prompts and time.monotonic() < until:
                request = self._prompts.popleft()
                if request.query_id in self._waiting:
                    self._waiting.remove(request.query_id)
                    self._replies.append(self._reply_to(request))
            if not self._prompts:
                self._has_prompts.clear()
            self._flush()
            await asyncio.sleep(0)

    def _handle(self, request: TextRequest) -> None:
        if isinstance(request, FeedText):
            self._feed(request)
        elif isinstance(request, OpenText):
            decoding = self._streams[request.stream] = TextDecoding(self._tokenizer, request.options)
            decoding.feed(request.token_ids, len(request.token_ids), False)
        elif isinstance(request, CloseText):
            self._streams.pop(request.stream, None)
            if request.stream in self._waiting:
                self._waiting.remove(request.stream)
        elif isinstance(request, EncodeChat) and request.has_template and self._num_templates >= _MAX_TEMPLATES:
            error = "too many requests with a chat_template of their own are open; send it again later"
            self._replies.append(TextFailed(query_id=request.query_id, error=error, param="chat_template"))
        elif isinstance(request, CheckGrammar) or (isinstance(request, EncodeChat) and request.has_template):
            self._num_templates += isinstance(request, EncodeChat)
            task = asyncio.create_task(self._answer_later(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._waiting.add(request.query_id)
            if isinstance(request, EncodeText) and len(request.content or b"") < LONG_TEXT:
                self._prompts.append(request)
                self._has_prompts.set()
            elif isinstance(request, EncodeChat):
                self._chats.put(request)
            else:
                self._do_aside(request.query_id, partial(self._reply_to, request))

    def _feed(self, request: FeedText) -> None:
        decoding = self._streams.get(request.stream)
        if decoding is None:
            return  # the stream has ended
        output = decoding.feed(request.token_ids, request.shown, request.last)
        if request.last or output.stop_string is not None:
            del self._streams[request.stream]
        self._replies.append(StreamText(stream=request.stream, output=output))

    def _on_rendered(self, request: EncodeChat, rendered: str | TextFailed) -> None:
        if isinstance(rendered, TextFailed):
            self._answer(rendered)
            return
        encode = partial(self._reply_or, lambda: self._encode_rendered(request, rendered), request)
        if len(rendered) < LONG_TEXT:
            self._answer(encode())
        else:
            self._waiting.add(request.query_id)
            self._do_aside(request.query_id, encode)

    def _do_aside(self, number: int, work: Callable[[], Answer]) -> None:
        """Do work in the side thread, after the work before it, unless its client has gone by then."""

        def run() -> None:
            if number in self._waiting:
                self._waiting.discard(number)
                assert self._loop is not None
                self._loop.call_soon_threadsafe(self._answer, work())

        self._side_thread.submit(run)

    async def _answer_later(self, request: CheckGrammar | EncodeChat) -> None:
        if isinstance(request, CheckGrammar):
            reply = await _in_grammar_thread(lambda: self._reply_to(request))
        else:
            loop = asyncio.get_running_loop()
            reply = await loop.run_in_executor(self._template_threads, self._reply_to, request)
            self._num_templates -= 1
        self._answer(reply)

    def _answer(self, reply: TextReply) -> None:
        self._replies.append(reply)
        self._flush()

    # --- any thread ------------------------------------------------------------------------------

    def _reply_to(self, request: Question) -> Answer:
        return self._reply_or(lambda: self._answer_to(request), request)

    def _reply_or(self, work: Callable[[], T], request: Question) -> T | TextFailed:
        """Do work of a request; if it fails, return why."""
        try:
            return work()
        except InvalidRequestError as error:
            is_too_long = isinstance(error, ContextLengthError)
            return TextFailed(query_id=request.query_id, error=str(error), param=error.param, is_too_long=is_too_long)
        except (MemoryError, RecursionError) as error:  # the request's, not this program's
            error_text = f"the request takes too much {'memory' if isinstance(error, MemoryError) else 'recursion'}"
            return TextFailed(query_id=request.query_id, error=error_text, param=None)
        except Exception:  # concerns one request; the process must serve the others
            logger.exception("bug while encoding or checking")
            error_text = f"the {type(request).__name__} failed; see the server's log"
            return TextFailed(query_id=request.query_id, error=error_text, param=None, is_bug=True)

    def _answer_to(self, request: Question) -> Answer:
        number = request.query_id
        if isinstance(request, DecodeTokens):
            return Decoded(query_id=number, text=self._tokenizer.decode(request.token_ids, request.skip_special_tokens))
        if isinstance(request, CheckGrammar):
            vocabulary = self._tokenizer.vocabulary(request.vocab_size)
            if request.token_ids is None:
                return Checked(query_id=number, grammar=vocabulary.check(request.grammar))
            return Checked(query_id=number, problem=vocabulary.problem_of(request.grammar, request.token_ids))
        assert request.content is not None
        if isinstance(request, ReadBody):
            value = bounded_json.read(request.content, request.max_token_ids, request.max_chars)
            return BodyRead(query_id=number, value=memoryview(msgspec.msgpack.encode(value)))
        if isinstance(request, EncodeText):
            ids = self._tokenizer.encode(
                request.content.decode(),
                add_special_tokens=request.add_special_tokens,
                max_chars=request.max_chars,
                max_tokens=request.max_tokens,
            )
            return Encoded(query_id=number, token_ids=ids)
        return self._encode_rendered(request, self._render(request))

    def _encode_rendered(self, request: EncodeChat, text: str) -> Encoded:
        ids = self._tokenizer.encode_rendered(text, request.max_chars, request.max_tokens)
        return Encoded(query_id=request.query_id, token_ids=ids)

    def _flush(self) -> None:
        if self._replies:
            self._socket.send([self._encoder.encode(self._replies)])
            self._replies.clear()


async def _in_grammar_thread(work: Callable[[], T]) -> T:
    """Run work on a grammar in a thread with a stack for deep grammars; a cancelled caller leaves it running."""
    outcome: Future[T] = Future()

    def run() -> None:
        outcome.set_running_or_notify_cancel()
        try:
            outcome.set_result(work())
        except Exception as error:
            outcome.set_exception(error)

    start_thread(run, "grammar-check")
    return await asyncio.wrap_future(outcome)


def main() -> None:
    """Entry point of the process that the API server starts."""
    orders = child.read_orders()
    stopwatch = Stopwatch(process_start())
    stopwatch.lap("imports")
    config = msgspec.convert(orders["config"], Config)
    child.set_process_title(f"hbserve-{orders['name']}")
    child.configure_logging(config.logging, orders["name"])
    leave_out_torch()
    os.nice(orders["niceness"])
    child.exit_after(lambda: _serve(config, orders["address"], orders["renders_chats"], stopwatch))


def _serve(config: Config, address: str, renders_chats: bool, stopwatch: Stopwatch) -> NoReturn:
    child.watch_signals(lambda: child.exit_now(0))  # whatever the main thread does: it may be in a library
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the API server
    child.watch_parent(lambda: os._exit(1))
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    worker = TextWorker(Tokenizer(config.tokenizer_path, config.model.path), address)
    child.limit_memory(MAX_MEMORY_BYTES)
    if renders_chats:
        worker.prepare()
    child.freeze_heap()
    event_loop.start_thread(event_loop.new(), worker.run)
    stopwatch.lap("tokenizer")
    child.report_status({"ready": True, "start_s": stopwatch.parts})
    worker.work()


if __name__ == "__main__":
    main()
