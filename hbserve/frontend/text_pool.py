"""Text service of an API server by other processes.

    detokenizer           outputs of all requests; short prompts, if there is no other tokenizer
    tokenizer-0, -1, ...  short prompts and short chats, if configured
    tokenizer-large       long prompts and chats, many tokens; all chats, if there is no other tokenizer
    tokenizer-slow        large bodies, and chats whose template takes long; from the first one on
    grammar-checker       grammars, from the first one on

Streams run in the detokenizer, and nothing else there takes more than a few milliseconds: a chat template may loop. A
chat first gets a short time. A template that needs more begins again in tokenizer-slow, so that other chats do not
wait for it. In this process, the side thread writes and reads what is large.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec
import zmq

from hbserve import bounded_json
from hbserve.config import Config
from hbserve.errors import EngineDeadError, InvalidRequestError, OverloadedError, RequestFailedError, StartupError
from hbserve.frontend.open_text_work import TooSlowError
from hbserve.frontend.text_process import TextProcess
from hbserve.messages.text import (
    DEFAULT_CHAT,
    Answer,
    BodyRead,
    Chat,
    ChatOptions,
    Checked,
    CheckGrammar,
    Decoded,
    DecodeTokens,
    EncodeChat,
    Encoded,
    EncodeText,
    ReadBody,
    TextStreamOptions,
)
from hbserve.process.events import OnEvent, log_event
from hbserve.process.side_thread import SideThread
from hbserve.process.stopwatch import Start
from hbserve.tokenizer import ChatMessage
from hbserve.tokenizer.text_service import LONG_TEXT, OnText, OutputStream

T = TypeVar("T")

_NICENESS = 5
"""Niceness of the processes that carry no stream, so that the detokenizer and the API server get the cores first."""
MAX_QUICK_CPU_S = 0.03
"""Processor time for the template of a chat, while other chats wait. Most need a tenth of that."""
MAX_SLOW_CPU_S = 5.0
"""The same in the process for slow ones, which renders one after the other."""
MAX_SLOW_CHATS = 4
"""Slow chats at once: the last must be answered before its process counts as hung."""
MAX_CHECK_S = 10.0
"""Time in which a grammar is checked, while others' grammars are checked too."""


class TextProcesses:
    """`TextService` whose work is done in other processes.

    Args:
        config: ``server.num_tokenizers`` processes encode short prompts and chats.
        run_dir: folder for the sockets.
        on_event: called with kind, subject and text when a process is replaced, or given up.

    Attributes:
        max_chars, max_tokens: see `TextService`.
    """

    def __init__(self, config: Config, run_dir: str, on_event: OnEvent = log_event) -> None:
        self.max_chars: int | None = None
        self.max_tokens: int | None = None
        self._side = SideThread()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._detokenizer = TextProcess("detokenizer", config, run_dir, self._context, on_event)
        self._tokenizers = [
            TextProcess(f"tokenizer-{number}", config, run_dir, self._context, on_event, renders_chats=True)
            for number in range(config.server.num_tokenizers)
        ]
        self._checker = TextProcess("grammar-checker", config, run_dir, self._context, on_event, _NICENESS)
        self._slow = TextProcess("tokenizer-slow", config, run_dir, self._context, on_event, _NICENESS, True)
        self._late_starts: dict[TextProcess, asyncio.Task[None]] = {}  # of processes that start when they are needed
        self._num_slow_chats = 0
        self._start_timeout_s = config.rpc.start_timeout_s
        self._checks: set[asyncio.Task[Checked]] = set()
        self._large = TextProcess("tokenizer-large", config, run_dir, self._context, on_event, _NICENESS, True)
        self._processes = [self._detokenizer, *self._tokenizers, self._large]

    @property
    def dead(self) -> EngineDeadError | None:
        needed = (*self._processes, self._slow)  # the grammar checker's end concerns grammars only
        return next((process.dead for process in needed if process.dead is not None), None)

    @property
    def missing(self) -> list[str]:
        return [process.name for process in self._processes if not process.is_connected]

    @property
    def latest_starts(self) -> list[Start | None]:
        """The latest start of each process."""
        return [process.latest_start for process in self._processes]

    async def start(self, deadline: float) -> None:
        """Start all processes and return when they are ready.

        Args:
            deadline: on the monotonic clock.

        Raises:
            StartupError: naming the process that failed and why.
        """
        starts = [asyncio.create_task(process.start(deadline)) for process in self._processes]
        try:
            await asyncio.gather(*starts)
        finally:
            for start in starts:  # one that goes on would keep its socket open
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)

    async def stop(self) -> None:
        """End all processes. May be called twice."""
        tasks = [*self._checks, *self._late_starts.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(process.stop() for process in (*self._processes, self._checker, self._slow)))
        self._side.close()
        self._context.term()

    def report(self) -> dict[str, dict[str, Any]]:
        """Return the pid, the restarts and the open work of each process, by its name."""
        return {process.name: process.report() for process in (*self._processes, *self._late_starts)}

    async def aside(self, work: Callable[[], T]) -> T:
        return await self._side.run(work)

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            content = text.encode() if len(text) < LONG_TEXT else await self._side.run(text.encode)
        except UnicodeEncodeError:  # JSON can write half a surrogate pair
            raise InvalidRequestError("prompt holds a lone surrogate, which is no character", "prompt") from None
        process = self._large if len(content) >= LONG_TEXT else self._tokenizer(self._detokenizer)
        reply = await process.ask(
            lambda number, inline: EncodeText(
                query_id=number,
                content=inline,
                add_special_tokens=add_special_tokens,
                max_chars=self.max_chars,
                max_tokens=self.max_tokens,
            ),
            content,
        )
        assert isinstance(reply, Encoded)
        return reply.token_ids

    async def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[dict[str, Any]] | None = None,
        options: ChatOptions = DEFAULT_CHAT,
        is_light: bool = True,
    ) -> list[int]:
        def written() -> bytes:
            return msgspec.msgpack.encode(
                Chat(messages=list(messages), tools=list(tools) if tools else None, options=options)
            )

        try:
            content = written() if is_light else await self._side.run(written)
        except UnicodeEncodeError:
            raise InvalidRequestError("messages holds a lone surrogate, which is no character", "messages") from None
        has_template = options.template is not None
        process = self._large if len(content) >= LONG_TEXT or has_template else self._tokenizer(self._large)
        try:
            reply = await process.ask(self._chat(has_template, MAX_QUICK_CPU_S), content)
        except TooSlowError:
            reply = await self._ask_slowly(content)
        assert isinstance(reply, Encoded)
        return reply.token_ids

    def _chat(self, has_template: bool, max_cpu_s: float) -> Callable[[int, bytes | None], EncodeChat]:
        return lambda number, inline: EncodeChat(
            query_id=number,
            content=inline,
            has_template=has_template,
            max_cpu_s=max_cpu_s,
            max_chars=self.max_chars,
            max_tokens=self.max_tokens,
        )

    async def _ask_slowly(self, content: bytes) -> Answer:
        """Ask the process for chats whose template takes long."""
        if self._num_slow_chats >= MAX_SLOW_CHATS:
            raise OverloadedError("too many chats whose template takes long are open; send it again later")
        self._num_slow_chats += 1
        try:
            slow = await self._started(self._slow)
            return await slow.ask(self._chat(False, MAX_SLOW_CPU_S), content)
        finally:
            self._num_slow_chats -= 1

    async def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        reply = await self._large.ask(
            lambda number, _: DecodeTokens(
                query_id=number, token_ids=token_ids, skip_special_tokens=skip_special_tokens
            )
        )
        assert isinstance(reply, Decoded)
        return reply.text

    async def read_json(self, body: bytes | bytearray) -> Any:
        if bounded_json.is_moderate(body):
            return await self._side.run(partial(bounded_json.read, body, self.max_tokens, self.max_chars))
        slow = await self._started(self._slow)
        reply = await slow.ask(
            lambda number, inline: ReadBody(
                query_id=number, content=inline, max_token_ids=self.max_tokens, max_chars=self.max_chars
            ),
            body,
        )
        assert isinstance(reply, BodyRead)
        return await self._side.run(partial(msgspec.msgpack.decode, reply.value))

    def open(self, options: TextStreamOptions, on_text: OnText) -> OutputStream:
        return self._detokenizer.open(options, on_text)

    async def check_grammar(self, grammar: str, vocab_size: int) -> str:
        return (await self._check(grammar, vocab_size, None)).grammar

    async def check_output(self, grammar: str, vocab_size: int, token_ids: list[int]) -> str | None:
        return (await self._check(grammar, vocab_size, token_ids)).problem

    async def _check(self, grammar: str, vocab_size: int, token_ids: list[int] | None) -> Checked:
        # A task of its own: a client that leaves does not keep the process from being replaced in time.
        check = asyncio.create_task(self._check_in_time(grammar, vocab_size, token_ids))
        self._checks.add(check)
        check.add_done_callback(self._on_checked)
        return await asyncio.shield(check)

    def _on_checked(self, check: asyncio.Task[Checked]) -> None:
        self._checks.discard(check)
        if not check.cancelled():
            check.exception()  # the client may have left; this marks it as read

    async def _check_in_time(self, grammar: str, vocab_size: int, token_ids: list[int] | None) -> Checked:
        """Check in a process of its own, which is replaced if it takes too long or dies: a grammar is a program."""
        checker = await self._started(self._checker)
        numbers: list[int] = []

        def make(number: int, _: object) -> CheckGrammar:
            numbers.append(number)
            return CheckGrammar(query_id=number, grammar=grammar, vocab_size=vocab_size, token_ids=token_ids)

        answer = asyncio.create_task(checker.ask(make))
        try:
            paused_s = 0.0  # time in which this process did not run itself: it does not count
            while not answer.done():
                began, look_s = time.monotonic(), MAX_CHECK_S / 8
                await asyncio.wait({answer}, timeout=look_s)
                elapsed_s = time.monotonic() - began
                paused_s += elapsed_s if elapsed_s > 2 * look_s else 0.0
                if not answer.done() and checker.seconds_with(numbers[0]) - paused_s > MAX_CHECK_S:
                    checker.restart(f"took longer than {MAX_CHECK_S:g} s for a grammar")
                    what = f"the grammar is too complex: its check takes longer than {MAX_CHECK_S:g} s; make it smaller"
                    raise InvalidRequestError(what, "grammar")
            reply = answer.result()
        finally:
            answer.cancel()
        assert isinstance(reply, Checked)
        return reply

    async def _started(self, process: TextProcess) -> TextProcess:
        """Return a process that starts when it is first needed.

        Raises:
            RequestFailedError: if it does not start; the next request tries again.
        """
        if process not in self._late_starts:
            deadline = time.monotonic() + self._start_timeout_s
            self._late_starts[process] = asyncio.create_task(process.start(deadline))
        start = self._late_starts[process]
        try:
            await asyncio.shield(start)
        except (StartupError, OSError, zmq.ZMQError) as error:
            if self._late_starts.get(process) is start:
                del self._late_starts[process]
            raise RequestFailedError(f"the {process.name} does not start: {error}") from None
        return process

    def _tokenizer(self, otherwise: TextProcess) -> TextProcess:
        """Return the tokenizer with the least work; ``otherwise`` if there is none."""
        if not self._tokenizers:
            return otherwise
        return min(self._tokenizers, key=lambda process: (not process.is_connected, process.num_open))
