"""Text to token ids and back as a service, in this process (`LocalText`) or in others (`frontend/text_pool.py`)."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from hbserve import bounded_json
from hbserve.errors import EngineDeadError, HBServeError, InvalidRequestError
from hbserve.grammar_process.parent import GrammarProcess
from hbserve.messages.grammar import OutputChecked
from hbserve.messages.text import DEFAULT_CHAT, ChatOptions, OutputText, TextStreamOptions
from hbserve.tokenizer.detokenizer import IncrementalDetokenizer
from hbserve.tokenizer.tokenizer import ChatMessage, Tokenizer

LONG_TEXT = 20_000
"""Bytes. A longer prompt takes milliseconds to encode, and must not block an event loop."""

T = TypeVar("T")
OnText = Callable[[OutputText | HBServeError], None]


class OutputStream(Protocol):
    """The decoding of one sample's tokens."""

    def feed(self, token_ids: list[int], shown: int, last: bool) -> None:
        """Add tokens. Each call gets one answer, in the order of the calls.

        Args:
            shown: how many of them have text: an end token is counted, but not shown.
            last: the output is complete.
        """

    def close(self) -> None:
        """Drop the rest. May be called at any time."""


class TextService(Protocol):
    """An encoder of prompts and decoder of outputs.

    Attributes:
        max_chars, max_tokens: limits of a prompt, set by the engine that knows the context length; see
            `Tokenizer.encode`.
    """

    max_chars: int | None
    max_tokens: int | None

    @property
    def missing(self) -> Sequence[str]:
        """Processes without which some requests wait now: they are being replaced."""

    @property
    def dead(self) -> EngineDeadError | None:
        """Why the service has ended; None while it works."""

    async def aside(self, work: Callable[[], T]) -> T:
        """Do work of a request that takes longer than some milliseconds, beside the event loop."""

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a prompt. Errors as in `Tokenizer.encode`."""

    async def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[dict[str, Any]] | None = None,
        options: ChatOptions = DEFAULT_CHAT,
        is_light: bool = True,
    ) -> list[int]:
        """Return the token ids of a conversation. Errors as in `Tokenizer.encode_chat`.

        Args:
            is_light: the event loop may write it down in one go.
        """

    async def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """Return the text of any number of tokens. Errors as in `Tokenizer.decode`."""

    async def read_json(self, body: bytes | bytearray) -> Any:
        """Return the value of a body of any size. Errors as in `bounded_json.read`."""

    async def check_grammar(self, grammar: str, vocab_size: int) -> str:
        """Compile a grammar, and return the one to follow. Errors as in `Vocabulary.check`."""

    async def check_output(self, grammar: str, vocab_size: int, token_ids: list[int]) -> str | None:
        """Return why a finished output, without its end token, does not fit its grammar; None if it fits."""

    def open(self, options: TextStreamOptions, on_text: OnText) -> OutputStream:
        """Begin to decode one output; ``on_text`` gets each answer to `OutputStream.feed`, or an error."""


class TextDecoding:
    """The decoding state of one output, in a text process or in `LocalText`."""

    def __init__(self, tokenizer: Tokenizer, options: TextStreamOptions) -> None:
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            skip_special_tokens=options.skip_special_tokens,
            stop=options.stop,
            min_tokens=options.min_tokens,
            include_stop=options.include_stop,
        )

    def feed(self, token_ids: list[int], shown: int, last: bool) -> OutputText:
        """Decode tokens as in `OutputStream.feed`, and answer at once. No token may follow a stop string."""
        detokenizer = self._detokenizer
        text = ""
        for number, token_id in enumerate(token_ids[:shown], start=1):
            text += detokenizer.push(token_id)
            if detokenizer.stop_string is not None:
                return OutputText(text=text, num_tokens=number, stop_string=detokenizer.stop_string)
        if last:
            text += detokenizer.finish()
        return OutputText(text=text, num_tokens=len(token_ids), stop_string=detokenizer.stop_string)


class LocalText:
    """The service in this process, for programs that embed the engine.

    Slow work runs in threads. Grammars are checked in a process that starts with the first of them, within its limits
    of time and memory.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._grammars: GrammarProcess | None = None  # of one vocabulary: a service has one engine
        self.max_chars: int | None = None
        self.max_tokens: int | None = None

    @property
    def missing(self) -> Sequence[str]:
        """Always empty."""
        return ()

    @property
    def dead(self) -> None:
        """Always None: the service lives as long as its process."""

    async def aside(self, work: Callable[[], T]) -> T:
        return await asyncio.to_thread(work)

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        encode = partial(
            self._tokenizer.encode,
            text,
            add_special_tokens=add_special_tokens,
            max_chars=self.max_chars,
            max_tokens=self.max_tokens,
        )
        return encode() if len(text) < LONG_TEXT else await asyncio.to_thread(encode)

    async def read_json(self, body: bytes | bytearray) -> Any:
        return await asyncio.to_thread(bounded_json.read, body, self.max_tokens, self.max_chars)

    async def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[dict[str, Any]] | None = None,
        options: ChatOptions = DEFAULT_CHAT,
        is_light: bool = True,
    ) -> list[int]:
        limits = self.max_chars, self.max_tokens
        return await asyncio.to_thread(self._tokenizer.encode_chat, messages, tools, options, *limits)

    async def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return await asyncio.to_thread(self._tokenizer.decode, token_ids, skip_special_tokens)

    async def check_grammar(self, grammar: str, vocab_size: int) -> str:
        return (await self._check(grammar, vocab_size, None)).grammar

    async def check_output(self, grammar: str, vocab_size: int, token_ids: list[int]) -> str | None:
        return (await self._check(grammar, vocab_size, token_ids)).problem

    async def _check(self, grammar: str, vocab_size: int, token_ids: list[int] | None) -> OutputChecked:
        if not self._tokenizer.has_text:
            raise InvalidRequestError(
                f"structured output needs a tokenizer, and {self._tokenizer.path} has none", "grammar"
            )
        if self._grammars is None:
            self._grammars = GrammarProcess(self._tokenizer.path, vocab_size)
            weakref.finalize(self, self._grammars.close)
        return await asyncio.wrap_future(self._grammars.check(grammar, token_ids))

    def open(self, options: TextStreamOptions, on_text: OnText) -> OutputStream:
        return _LocalStream(TextDecoding(self._tokenizer, options), on_text)


class _LocalStream:
    def __init__(self, decoding: TextDecoding, on_text: OnText) -> None:
        self._decoding, self._on_text = decoding, on_text

    def feed(self, token_ids: list[int], shown: int, last: bool) -> None:
        self._on_text(self._decoding.feed(token_ids, shown, last))

    def close(self) -> None:
        pass
