"""Text process: encodes prompts and decodes outputs for an API server.

It keeps no state that the API server cannot send again; see `hbserve.frontend.text_process`.

    event loop, in a thread   sockets; outputs; between them short prompts
    main thread               chats, long prompts, large bodies, long outputs, one after the other, with a limit of time
    threads                   grammars; templates of requests, which run in processes of their own

The main thread does the work that a request can make long, because only there can a signal interrupt Python code: a
chat template is a program, and may loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import queue
import resource
import signal
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn

import msgspec
import zmq

from hbserve import bounded_json
from hbserve.config import Config
from hbserve.errors import ContextLengthError, InvalidRequestError
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
from hbserve.rpc.async_socket import AsyncSocket
from hbserve.tokenizer import Tokenizer, leave_out_torch
from hbserve.tokenizer.chat_template import MAX_AT_ONCE
from hbserve.tokenizer.text_service import LONG_TEXT, TextDecoding, in_grammar_thread

logger = logging.getLogger(__name__)

_MAX_TEMPLATES = 4 * MAX_AT_ONCE
"""Requests with a template of their own, waiting ones included: the last must be answered before the API server gives
up the process."""
MAX_CPU_S = 5.0
"""Processor time of this process for one chat, long prompt or large body."""
_MAX_WALL_S = 25.0
"""Time for the same on a busy machine: the API server replaces a process that has not answered for 30 s."""
MAX_MEMORY_BYTES = 4 * 2**30
"""Memory for requests, besides that of the loaded tokenizer."""

_PROMPTS_S = 0.003
"""Time for short prompts before the event loop looks for new outputs."""
_MESSAGES_PER_TURN = 16


class _TooLong(BaseException):
    """The work took too long. Not an Exception, so that no library takes it for its own."""


class _Stopped(BaseException):
    """SIGTERM has come."""


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
        self._jobs: queue.SimpleQueue[Question] = queue.SimpleQueue()
        self._prompts: deque[EncodeText] = deque()  # short ones
        self._has_prompts = asyncio.Event()
        self._waiting: set[int] = set()  # numbers of jobs and prompts that have not begun, and whose clients are there
        self._loop: asyncio.AbstractEventLoop | None = None
        self._until_s = 0.0
        self._is_limited = False  # only while it is set, the alarm interrupts the main thread

    # --- main thread -----------------------------------------------------------------------------

    def work(self) -> NoReturn:
        """Do one job after the other, until SIGTERM."""
        signal.signal(signal.SIGPROF, self._on_cpu_alarm)
        signal.signal(signal.SIGALRM, self._on_alarm)
        while True:
            request = self._jobs.get()
            if request.query_id not in self._waiting:
                continue  # its client has gone
            self._waiting.discard(request.query_id)
            try:
                with self._limited(MAX_CPU_S):
                    reply = self._reply_to(request)
            except _TooLong:
                what = "its chat template" if isinstance(request, EncodeChat) else "reading it"
                param = {EncodeChat: "messages", EncodeText: "prompt"}.get(type(request))
                limits = f"{MAX_CPU_S:g} s of processor time, or {_MAX_WALL_S:g} s in all"
                error = f"the request took more than {limits}, for {what}"
                reply = TextFailed(query_id=request.query_id, error=error, param=param)
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._answer, reply)

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
            signal.setitimer(signal.ITIMER_PROF, left_s)
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
        await asyncio.gather(self._receive(), self._encode_prompts())

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
            else:
                self._jobs.put(request)

    def _feed(self, request: FeedText) -> None:
        decoding = self._streams.get(request.stream)
        if decoding is None:
            return  # the stream has ended
        output = decoding.feed(request.token_ids, request.shown, request.last)
        if request.last or output.stop_string is not None:
            del self._streams[request.stream]
        self._replies.append(StreamText(stream=request.stream, output=output))

    async def _answer_later(self, request: CheckGrammar | EncodeChat) -> None:
        if isinstance(request, CheckGrammar):
            reply = await in_grammar_thread(lambda: self._reply_to(request))
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
        try:
            return self._answer_to(request)
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
        chat = msgspec.msgpack.decode(request.content, type=Chat)
        limits = request.max_chars, request.max_tokens
        ids = self._tokenizer.encode_chat(chat.messages, chat.tools, chat.options, *limits)
        return Encoded(query_id=number, token_ids=ids)

    def _flush(self) -> None:
        if self._replies:
            self._socket.send([self._encoder.encode(self._replies)])
            self._replies.clear()


def main() -> None:
    """Entry point of the process that the API server starts."""
    orders = child.read_orders()
    config = msgspec.convert(orders["config"], Config)
    child.set_process_title(f"hbserve-{orders['name']}")
    child.configure_logging(config.logging, orders["name"])
    leave_out_torch()
    os.nice(orders["niceness"])
    child.exit_after(lambda: _serve(config, orders["address"]))


def _serve(config: Config, address: str) -> int:
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the API server
    child.watch_parent(lambda: os._exit(1))
    try:
        worker = TextWorker(Tokenizer(config.tokenizer_path, config.model.path), address)
        _limit_memory()
        child.freeze_heap()
        event_loop.start_thread(event_loop.new(), worker.run)
        child.report_status({"ready": True})
        worker.work()
    except _Stopped:
        return 0


def _stop(*_: Any) -> NoReturn:
    raise _Stopped


def _limit_memory() -> None:
    """Bound what requests may allocate. Python raises a MemoryError then; a library may end this process."""
    with open("/proc/self/status", encoding="ascii") as file:
        [used_kib] = [int(line.split()[1]) for line in file if line.startswith("VmData:")]
    limit, most = used_kib * 1024 + MAX_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_DATA)[1]
    if most == resource.RLIM_INFINITY or limit < most:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


if __name__ == "__main__":
    main()
