"""Text service of an API server by other processes: one detokenizer, and tokenizers if configured."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import zmq

from hbserve.config import Config
from hbserve.errors import EngineDeadError
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
        await asyncio.gather(*(process.stop() for process in self._processes))
        self._context.term()

    def report(self) -> dict[str, dict[str, Any]]:
        """Return the pid, the restarts and the open work of each process, by its name."""
        return {process.name: process.report() for process in self._processes}

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
        # All checks go to one process, because the vocabulary that it makes for grammars is large.
        reply = await self._processes[-1].ask(
            lambda number: CheckGrammar(query_id=number, grammar=grammar, vocab_size=vocab_size, token_ids=token_ids),
            "grammar",
        )
        assert isinstance(reply, Checked)
        return reply

    def _tokenizer(self) -> TextProcess:
        if not self._tokenizers:
            return self._detokenizer
        return min(self._tokenizers, key=lambda process: process.num_open)
