"""Text service of an API server by other processes: one detokenizer, and tokenizers if configured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import zmq

from hbserve.config import Config
from hbserve.errors import EngineDeadError, InvalidRequestError, RequestFailedError, StartupError
from hbserve.frontend.text_process import OnEvent, TextProcess
from hbserve.messages.text import (
    DEFAULT_CHAT,
    ChatOptions,
    Checked,
    CheckGrammar,
    EncodeChat,
    Encoded,
    EncodeText,
    TextStreamOptions,
)
from hbserve.tokenizer import ChatMessage
from hbserve.tokenizer.text_service import OnText, OutputStream

MAX_CHECK_S = 10.0
"""Time in which a grammar is checked, while others' grammars are checked too."""


class TextProcesses:
    """`TextService` whose work is done in other processes.

    Args:
        config: ``server.num_tokenizers`` processes encode; with 0 the detokenizer encodes too.
        run_dir: folder for the sockets.
        on_event: called with kind, subject and text when a process is replaced, or given up.
    """

    def __init__(self, config: Config, run_dir: str, on_event: OnEvent = lambda *_: None) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._detokenizer = TextProcess("detokenizer", config, run_dir, self._context, on_event)
        self._tokenizers = [
            TextProcess(f"tokenizer-{number}", config, run_dir, self._context, on_event)
            for number in range(config.server.num_tokenizers)
        ]
        self._checker = TextProcess("grammar-checker", config, run_dir, self._context, on_event)
        self._checker_start: asyncio.Task[None] | None = None
        self._start_timeout_s = config.rpc.start_timeout_s
        self._checks: set[asyncio.Task[Checked]] = set()
        self._processes = [self._detokenizer, *self._tokenizers]

    @property
    def dead(self) -> EngineDeadError | None:
        return next((process.dead for process in self._processes if process.dead is not None), None)

    async def start(self, deadline: float) -> None:
        """Start all processes and return when they are ready.

        Args:
            deadline: on the monotonic clock.

        Raises:
            StartupError: naming the process that failed and why.
        """
        await asyncio.gather(*(process.start(deadline) for process in self._processes))

    async def stop(self) -> None:
        """End all processes. May be called twice."""
        tasks = [*self._checks, *([] if self._checker_start is None else [self._checker_start])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._checker.stop()
        await asyncio.gather(*(process.stop() for process in self._processes))
        self._context.term()

    def report(self) -> dict[str, dict[str, Any]]:
        """Return the pid, the restarts and the open work of each process, by its name."""
        checkers = [self._checker] if self._checker_start is not None else []
        return {process.name: process.report() for process in [*self._processes, *checkers]}

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        reply = await self._tokenizer().ask(
            lambda number: EncodeText(query_id=number, text=text, add_special_tokens=add_special_tokens), "prompt"
        )
        assert isinstance(reply, Encoded)
        return reply.token_ids

    async def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[dict[str, Any]] | None = None,
        options: ChatOptions = DEFAULT_CHAT,
    ) -> list[int]:
        reply = await self._tokenizer().ask(
            lambda number: EncodeChat(
                query_id=number,
                messages=list(messages),
                tools=list(tools) if tools else None,
                options=options,
            ),
            "messages",
        )
        assert isinstance(reply, Encoded)
        return reply.token_ids

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
        checker = await self._started_checker()
        numbers: list[int] = []

        def make(number: int) -> CheckGrammar:
            numbers.append(number)
            return CheckGrammar(query_id=number, grammar=grammar, vocab_size=vocab_size, token_ids=token_ids)

        answer = asyncio.create_task(checker.ask(make, "grammar"))
        try:
            while not answer.done():
                await asyncio.wait({answer}, timeout=MAX_CHECK_S / 8)
                if not answer.done() and checker.seconds_with(numbers[0]) > MAX_CHECK_S:
                    checker.restart()
                    what = f"the grammar is too complex: its check takes longer than {MAX_CHECK_S:g} s; make it smaller"
                    raise InvalidRequestError(what, "grammar")
            reply = answer.result()
        finally:
            answer.cancel()
        assert isinstance(reply, Checked)
        return reply

    async def _started_checker(self) -> TextProcess:
        """Return the process that checks grammars, which starts with the first of them.

        Raises:
            RequestFailedError: if it does not start; the next request tries again.
        """
        if self._checker_start is None:
            deadline = time.monotonic() + self._start_timeout_s
            self._checker_start = asyncio.create_task(self._checker.start(deadline))
        try:
            await asyncio.shield(self._checker_start)
        except StartupError as error:
            self._checker_start = None
            raise RequestFailedError(str(error)) from None
        return self._checker

    def _tokenizer(self) -> TextProcess:
        if not self._tokenizers:
            return self._detokenizer
        return min(self._tokenizers, key=lambda process: process.num_open)
