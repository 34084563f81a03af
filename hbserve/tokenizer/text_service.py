"""Text to token ids and back as a service, so that it can run in this process or in others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from hbserve.errors import EngineDeadError, HBServeError
from hbserve.grammar import Vocabulary
from hbserve.messages.text import OutputText, TextStreamOptions
from hbserve.tokenizer.detokenizer import IncrementalDetokenizer
from hbserve.tokenizer.tokenizer import ChatMessage, Tokenizer

LONG_TEXT = 20_000
"""Characters; a longer prompt takes milliseconds to encode, so not in an event loop."""

OnText = Callable[[OutputText | HBServeError], None]


class OutputStream(Protocol):
    """The text of one sample's tokens."""

    def feed(self, token_ids: list[int], shown: int, last: bool) -> None:
        """Add tokens; what becomes of them comes back once, in order.

        Args:
            shown: how many of them have text: an end token is counted, but not shown.
            last: no more will come.
        """

    def close(self) -> None:
        """Nobody wants the rest. May be called at any time."""


class TextService(Protocol):
    """Encodes prompts and decodes outputs."""

    @property
    def dead(self) -> EngineDeadError | None:
        """Why nothing is encoded or decoded any more, or None while it is."""

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt. Errors as in `Tokenizer.encode`."""

    async def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[dict[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation. Errors as in `Tokenizer.encode_chat`."""

    async def check_grammar(self, grammar: str, vocab_size: int) -> None:
        """Compile a grammar. Errors as in `Vocabulary.check`."""

    async def check_output(self, grammar: str, vocab_size: int, token_ids: list[int]) -> str | None:
        """Why a finished output, without its end token, is not one of its grammar's; None if it is."""

    def open(self, options: TextStreamOptions, on_text: OnText) -> OutputStream:
        """Begin the text of one output; ``on_text`` is called with each answer to `OutputStream.feed`, or an error."""


class TextDecoding:
    """One output's text as a state machine; what a text process, or `LocalText`, keeps per stream."""

    def __init__(self, tokenizer: Tokenizer, options: TextStreamOptions) -> None:
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            skip_special_tokens=options.skip_special_tokens,
            stop=options.stop,
            min_tokens=options.min_tokens,
        )

    def feed(self, token_ids: list[int], shown: int, last: bool) -> OutputText:
        """As `OutputStream.feed`, answered at once. Nothing may follow a stop string."""
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
    """The service within this process, at once: for programs that embed the engine."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._vocabularies: dict[int, Vocabulary] = {}

    @property
    def dead(self) -> None:
        """It is as alive as its process."""

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) < LONG_TEXT:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens=add_special_tokens)

    async def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[dict[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        return await asyncio.to_thread(self._tokenizer.encode_chat, messages, tools, template_options)

    async def check_grammar(self, grammar: str, vocab_size: int) -> None:
        await asyncio.to_thread(lambda: self._vocabulary(vocab_size).check(grammar))

    async def check_output(self, grammar: str, vocab_size: int, token_ids: list[int]) -> str | None:
        return await asyncio.to_thread(lambda: self._vocabulary(vocab_size).problem_of(grammar, token_ids))

    def open(self, options: TextStreamOptions, on_text: OnText) -> OutputStream:
        return _LocalStream(TextDecoding(self._tokenizer, options), on_text)

    def _vocabulary(self, vocab_size: int) -> Vocabulary:
        vocabulary = self._vocabularies.get(vocab_size)
        if vocabulary is None:
            vocabulary = self._vocabularies[vocab_size] = Vocabulary(self._tokenizer.path, vocab_size)
        return vocabulary


class _LocalStream:
    def __init__(self, decoding: TextDecoding, on_text: OnText) -> None:
        self._decoding, self._on_text = decoding, on_text

    def feed(self, token_ids: list[int], shown: int, last: bool) -> None:
        self._on_text(self._decoding.feed(token_ids, shown, last))

    def close(self) -> None:
        pass
