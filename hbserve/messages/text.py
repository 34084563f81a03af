"""Messages between the API server and its text processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from hbserve.messages.base import Message, Value

# --- API server -> text process -------------------------------------------------------------------


class TextStreamOptions(Value, frozen=True):
    """Options for turning an output into text; see `hbserve.tokenizer.IncrementalDetokenizer`."""

    skip_special_tokens: bool
    stop: list[str]
    min_tokens: int
    include_stop: bool = False


class ChatOptions(Value, frozen=True):
    """How a conversation becomes a prompt; see `hbserve.tokenizer.Tokenizer.encode_chat`.

    Attributes:
        variables: further variables of the chat template, by name, such as ``enable_thinking`` for Qwen 3.
        reasoning_effort: a variable that only templates which name it get.
        template: chat template in place of the model's.
        add_generation_prompt: the prompt ends with the beginning of an answer.
        continue_final_message: the prompt ends within the last message, which the answer continues.
    """

    variables: dict[str, Any] = msgspec.field(default_factory=dict)
    reasoning_effort: str | None = None
    template: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False


DEFAULT_CHAT = ChatOptions()


class Chat(Value, frozen=True):
    """What `EncodeChat` is about. ``messages``, ``tools``: plain data, as clients send them."""

    messages: list[Mapping[str, Any]]
    tools: list[dict[str, Any]] | None
    options: ChatOptions


class EncodeText(Message, frozen=True):
    """Tokenize a text. Answered by `Encoded` or `TextFailed`.

    Attributes:
        content: the text in UTF-8; None: it is the second frame of the message, as in all questions with a ``content``.
        max_chars, max_tokens: see `hbserve.tokenizer.Tokenizer.encode`.
    """

    query_id: int
    content: bytes | None
    add_special_tokens: bool
    max_chars: int | None = None
    max_tokens: int | None = None


class EncodeChat(Message, frozen=True):
    """Tokenize a chat. Answered by `Encoded` or `TextFailed`.

    Attributes:
        content: a `Chat` in msgpack; see `EncodeText`.
        has_template: the chat brings a template that its client wrote.
        max_cpu_s: processor time for the model's template.
    """

    query_id: int
    content: bytes | None
    has_template: bool
    max_cpu_s: float
    max_chars: int | None = None
    max_tokens: int | None = None


class ReadBody(Message, frozen=True):
    """Read the JSON body of an HTTP request, as `hbserve.bounded_json.read`. Answered by `BodyRead` or `TextFailed`.

    ``content``: the body; see `EncodeText`.
    """

    query_id: int
    content: bytes | None
    max_token_ids: int | None
    max_chars: int | None


class DecodeTokens(Message, frozen=True):
    """Turn token ids into text. Answered by `Decoded` or `TextFailed`."""

    query_id: int
    token_ids: list[int]
    skip_special_tokens: bool


class CheckGrammar(Message, frozen=True):
    """Check a grammar, or an output against it. Answered by `Checked` or `TextFailed`.

    Attributes:
        token_ids: an output without its end token, to be checked; None: check whether the grammar can be followed at
            all.
    """

    query_id: int
    grammar: str
    vocab_size: int
    token_ids: list[int] | None


class OpenText(Message, frozen=True):
    """Begin a stream; not answered. ``token_ids``: tokens that it had in a process that has died."""

    stream: int
    options: TextStreamOptions
    token_ids: list[int]


class FeedText(Message, frozen=True):
    """Add tokens to a stream, answered by one `StreamText`; see `hbserve.tokenizer.text_service.OutputStream`."""

    stream: int
    token_ids: list[int]
    shown: int
    last: bool


class CloseText(Message, frozen=True):
    """Forget a stream, or a question that has not begun; not answered."""

    stream: int


# --- text process -> API server -------------------------------------------------------------------


class Encoded(Message, frozen=True):
    """Answer to `EncodeText` and `EncodeChat`."""

    query_id: int
    token_ids: list[int]


class Checked(Message, frozen=True):
    """Answer to `CheckGrammar`.

    Attributes:
        problem: why the output does not follow the grammar.
        grammar: the grammar to follow, if no output was to be checked; see `hbserve.grammar.Vocabulary.check`.
    """

    query_id: int
    problem: str | None = None
    grammar: str = ""


class Decoded(Message, frozen=True):
    """Answer to `DecodeTokens`."""

    query_id: int
    text: str


class TextFailed(Message, frozen=True):
    """A query that can never be answered: an `InvalidRequestError`, or if ``is_bug`` a `RequestFailedError`.

    Attributes:
        is_too_long: it is a `ContextLengthError`.
        is_too_slow: a chat's template took longer than ``max_cpu_s``.
    """

    query_id: int
    error: str
    param: str | None
    is_bug: bool = False
    is_too_long: bool = False
    is_too_slow: bool = False


class BodyRead(Message, frozen=True):
    """Answer to `ReadBody`. ``value``: the document in msgpack, which is read much faster; a view of the message."""

    query_id: int
    value: memoryview


class OutputText(Value, frozen=True):
    """Text of some tokens.

    Attributes:
        text: text that may be shown now.
        num_tokens: tokens used; fewer than were given if a stop string ended the text earlier.
        stop_string: the stop string that ended the text.
    """

    text: str
    num_tokens: int
    stop_string: str | None = None


class StreamText(Message, frozen=True):
    """Answer to `FeedText`."""

    stream: int
    output: OutputText


Question = EncodeText | EncodeChat | ReadBody | DecodeTokens | CheckGrammar
TextRequest = Question | OpenText | FeedText | CloseText
Answer = Encoded | BodyRead | Decoded | Checked | TextFailed
TextReply = Answer | StreamText
