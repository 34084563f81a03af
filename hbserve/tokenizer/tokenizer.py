"""The tokenizer of a model, read from a local folder."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jinja2

from hbserve.errors import ContextLengthError, InvalidRequestError, ModelError
from hbserve.grammar import Vocabulary
from hbserve.messages.text import DEFAULT_CHAT, ChatOptions
from hbserve.model_files import is_there, read_config, read_json, shown, whole_number
from hbserve.tokenizer import conversation
from hbserve.tokenizer.chat_template import MessageForms, render_request_template
from hbserve.tokenizer.marks import shown_marks
from hbserve.tokenizer.text_decoder import ByteDecoder, BytesOfPiece, TextDecoder, WindowDecoder, bytes_of_piece
from hbserve.tokenizer_files import has_tokenizer, is_of_library, load_tokenizer, naming_faults, read_vocabulary

ChatMessage = Mapping[str, Any]  # {"role": ..., "content": ...}, as chat templates expect it

_NO_BYTES = frozenset("ÀÁõö÷øùúûüýþÿ")
"""Letters of the byte alphabet whose bytes, C0, C1 and F5 to FF, are in no UTF-8 text: only a text can mean them."""

_TRIAL_TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}

_MIN_LONGEST_TOKEN = 128
"""Characters that one token may stand for in any tokenizer: some have a token for every unknown word."""


class Tokenizer:
    """The encoder of prompts and chats, the decoder of outputs, and the set of tokens that end an output.

    Safe to use from several threads. A folder without any tokenizer file (a bare ``config.json``) is legal: such a
    model takes token ids only, and the text of its outputs is empty.

    Args:
        path: folder with the tokenizer's files.
        model_path: folder of the model, if it is another: its configuration names end tokens too.

    Attributes:
        end_token_ids: all tokens that the model, its generation configuration or its tokenizer names as an end; some
            may be outside the model's vocabulary.
        has_text: False for a folder without a tokenizer.

    Raises:
        ModelError: the folder has tokenizer files that cannot be used.
    """

    def __init__(self, path: str | Path, model_path: str | Path | None = None) -> None:
        self.path = Path(path)
        self.has_text = has_tokenizer(self.path)
        self._special: frozenset[int] = frozenset()
        self._plain_text: dict[int, str] = {}  # added tokens that are text, whatever the alphabet of the vocabulary
        self._added_ids: dict[str, int] = {}
        self._tools_template = ""
        self._message_forms: dict[bool, MessageForms] = {}  # by whether there are tools
        self._bytes_of_piece: BytesOfPiece | None = None
        self._bytes: dict[int, bytes] = {}  # filled when a token is first seen
        self._shown_bytes: dict[int, bytes] = {}  # the same, but special tokens are empty
        self._vocabularies: dict[int, Vocabulary] = {}
        end_token_ids = _configured_end_tokens(Path(model_path or path))
        if self.has_text:
            with naming_faults(self.path):
                end_token_ids |= self._load()
        self.end_token_ids = frozenset(end_token_ids)

    def _load(self) -> set[int]:
        """Load the files; return the end tokens that the tokenizer names."""
        self._loaded = load_tokenizer(self.path)
        self._hf = self._loaded.hf
        backend = self._hf.backend_tokenizer
        # A tokenizer.json may contain the truncation and padding of training; a server must do neither.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._added_ids = {token.content: token_id for token_id, token in added.items()}
        shown = shown_marks(self._added_ids.keys())
        self._special = frozenset(
            token_id for token_id, token in added.items() if token.special and token.content not in shown
        )
        # An added token that is also an ordinary one is written as those are, in Gemma for example.
        vocabulary_size = backend.get_vocab_size(with_added_tokens=False)
        self._plain_text = {
            token_id: token.content
            for token_id, token in added.items()
            if token.special or token_id >= vocabulary_size or token.content in _NO_BYTES
        }
        if self._hf.chat_template:  # one template, or several by name
            templates = self._hf.chat_template
            named = templates if isinstance(templates, dict) else {"default": templates}
            if not all(isinstance(template, str) for template in named.values()):
                raise ModelError(f"the chat template of the tokenizer in {self.path} is not text")
            self._tools_template = named.get("tool_use") or named.get("default", "")
        if backend.decoder is not None:
            self._bytes_of_piece = bytes_of_piece(json.loads(backend.decoder.__getstate__()))
        return set() if self._hf.eos_token_id is None else {int(self._hf.eos_token_id)}

    @property
    def vocab_size(self) -> int:
        """Number of tokens, with added ones; the model's embedding may have more rows."""
        return int(self._backend.get_vocab_size(with_added_tokens=True)) if self.has_text else 0

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has a chat template, which `encode_chat` needs."""
        return self.has_text and bool(self._hf.chat_template)

    @cached_property
    def longest_token(self) -> int:
        """Bound for the characters of a token. A text has at least ``len(text) / longest_token`` tokens."""
        pieces = self._backend.get_vocab(with_added_tokens=True) if self.has_text else ()
        return max(_MIN_LONGEST_TOKEN, max(map(len, pieces), default=0))

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        max_chars: int | None = None,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Return the token ids of a text.

        Args:
            add_special_tokens: add the tokens with which the model expects a prompt to begin (and end).
            max_chars: a longer text cannot fit into the context, and is refused before it costs time and memory.
            max_tokens: more tokens are refused.

        Raises:
            InvalidRequestError: the model has no tokenizer, or the text is not Unicode.
            ContextLengthError: the text has more than ``max_chars`` characters, or than ``max_tokens`` tokens.
        """
        if max_chars is not None and len(text) > max_chars:
            raise ContextLengthError(
                f"the prompt has {len(text)} characters; the model's context holds at most {max_chars}", "prompt"
            )
        if not self.has_text:
            raise InvalidRequestError(f"{self.path} has no tokenizer: send the prompt as token ids", "prompt")
        if self._loaded.adds_space and text and not text.startswith(tuple(self._added_ids)):
            text = f" {text}"
        try:
            # "fast" leaves out the positions of tokens in the text, which saves a third of the time or more
            [encoded] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            ids: list[int] = encoded.ids
        except (UnicodeEncodeError, TypeError):  # JSON can contain half a surrogate pair
            raise InvalidRequestError(
                "the prompt contains a lone surrogate, which is not a character", "prompt"
            ) from None
        except BaseException as error:
            if not is_of_library(error):
                raise
            raise InvalidRequestError(f"the model's tokenizer cannot encode the prompt: {error}", "prompt") from error
        if max_tokens is not None and len(ids) > max_tokens:
            raise ContextLengthError(f"the prompt has {len(ids)} tokens; at most {max_tokens} are encoded", "prompt")
        return ids

    @property
    def tools_template(self) -> str:
        """The chat template for conversations with tools; empty if there is none."""
        return self._tools_template

    def describe(self) -> dict[str, Any]:
        """Return tokenizer_config.json, with class and chat template, which may come from elsewhere."""
        path = self.path / "tokenizer_config.json"
        document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        found = {"tokenizer_class": document.get("tokenizer_class") or type(self._hf).__name__}
        return {**document, **found, "chat_template": self._hf.chat_template}

    def added_token_id(self, text: str) -> int | None:
        """Return the added token of this text, such as a mark in chat templates; None if ordinary tokens write it."""
        return self._added_ids.get(text)

    def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: ChatOptions = DEFAULT_CHAT,
        max_chars: int | None = None,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation and the beginning of its answer, by the model's chat template.

        Arguments and errors as in `render_chat` and `encode_rendered`.
        """
        return self.encode_rendered(self.render_chat(messages, tools, options), max_chars, max_tokens)

    def encode_rendered(self, text: str, max_chars: int | None = None, max_tokens: int | None = None) -> list[int]:
        """Return the token ids of a conversation's text. Arguments and errors as in `encode`."""
        try:
            # The template writes special tokens itself.
            return self.encode(text, add_special_tokens=False, max_chars=max_chars, max_tokens=max_tokens)
        except InvalidRequestError as error:
            raise type(error)(str(error), "messages") from None

    def render_chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: ChatOptions = DEFAULT_CHAT,
    ) -> str:
        """Return the text of a conversation and of the beginning of its answer, by the model's chat template.

        Args:
            messages: in any form that `conversation.normalise` takes.
            tools: functions that the model may call, in OpenAI's form.

        Raises:
            InvalidRequestError: the model has no chat template, or the template rejects the messages or options.
        """
        turns = conversation.normalise(messages)
        if not self.has_text or not (self.has_chat_template or options.template):
            reason = f": {self._loaded.no_template}" if self.has_text and self._loaded.no_template else ""
            raise InvalidRequestError(
                f"the model in {self.path} has no chat template{reason}; use completions with a plain prompt",
                "messages",
            )
        template = options.template or self._tools_template
        variables = dict(options.variables)
        reserved = {"messages", *inspect.signature(self._hf.apply_chat_template).parameters}
        for name in variables:
            if name in reserved or not _names(template, name):
                raise InvalidRequestError(
                    f"chat_template_kwargs: the model's chat template has no option {name!r}", "chat_template_kwargs"
                )
        effort = options.reasoning_effort
        if effort is not None and _names(template, "reasoning_effort"):
            variables.setdefault("reasoning_effort", effort)
        if effort is not None and variables.get("reasoning_effort", effort) != effort:
            raise InvalidRequestError(
                "reasoning_effort differs from the one in chat_template_kwargs; send one", "reasoning_effort"
            )
        try:
            return self._render_chat(turns, list(tools) if tools else None, options, variables)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            # A template is a program that comes with the model; it rejects messages with any of these errors.
            which, param = (
                ("chat_template", "chat_template") if options.template else ("the model's chat template", "messages")
            )
            raise InvalidRequestError(f"{which} rejects the messages: {error}", param) from error

    def prepare_chats(self) -> None:
        """Do now what the first chats would wait for: compile the model's chat templates, and try them out."""
        for has_tools in (False, True) if self.has_text and self.has_chat_template else ():
            self._forms(has_tools).prepare()

    def _forms(self, has_tools: bool) -> MessageForms:
        forms = self._message_forms.get(has_tools)  # a model may have another template for tools
        if forms is None:
            trial = partial(self._hf.apply_chat_template, tools=[_TRIAL_TOOL] if has_tools else None, tokenize=False)
            forms = self._message_forms[has_tools] = MessageForms(trial)
        return forms

    def _render_chat(
        self,
        turns: list[dict[str, Any]],
        tools: list[Mapping[str, Any]] | None,
        options: ChatOptions,
        variables: dict[str, Any],
    ) -> str:
        if options.template is not None:
            variables = self._hf.special_tokens_map | variables
            variables |= {"tools": tools, "documents": None, "add_generation_prompt": options.add_generation_prompt}
            return render_request_template(
                options.template, turns, variables, continue_final_message=options.continue_final_message
            )

        text: str = self._hf.apply_chat_template(
            self._forms(tools is not None).fit(turns),
            tools=tools,
            tokenize=False,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
            **variables,
        )
        return text

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids. Bytes that are not UTF-8 become U+FFFD; unknown ids have no text."""
        if not self.has_text:
            return ""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        if self._bytes_of_piece is None or not any(token_id in self._plain_text for token_id in token_ids):
            return text
        # The library reads added tokens in the alphabet of the others.
        decoder = self.text_decoder(skip_special_tokens)
        exact = "".join(map(decoder.feed, token_ids)) + decoder.flush()
        num_spaces, num_kept = (len(x) - len(x.lstrip(" ")) for x in (exact, text))
        return exact[1:] if num_spaces == num_kept + 1 else exact  # SentencePiece drops a space at the start

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token (UTF-8, perhaps a part of a character)."""
        token_bytes = self._bytes.get(token_id)
        if token_bytes is None:
            token_bytes = self._bytes[token_id] = self._find_bytes(token_id)
        return token_bytes

    def hidden_token_id(self, text: str) -> int | None:
        """Return the special token of this text, which ``skip_special_tokens`` leaves out; None if there is none."""
        token_id = self._added_ids.get(text)
        return token_id if token_id in self._special else None

    def hidden_text_in(self, text: str) -> str | None:
        """Return the text of a special token that is a part of ``text``, but not the whole; None if there is none."""
        found = (token for token, token_id in self._added_ids.items() if token_id in self._special and token in text)
        return next((token for token in found if token and token != text), None)

    def text_decoder(self, skip_special_tokens: bool) -> TextDecoder:
        """Make a decoder for one output; `IncrementalDetokenizer` adds stop strings to it."""
        if self.has_text and self._bytes_of_piece is None:
            hidden = self._special if skip_special_tokens else frozenset()
            return WindowDecoder(lambda ids: self.decode(ids, skip_special_tokens=False), hidden)
        return ByteDecoder(self._shown_token_bytes if skip_special_tokens else self.token_bytes)

    def vocabulary(self, vocab_size: int) -> Vocabulary:
        """Return the vocabulary for grammars of a model whose logits have ``vocab_size`` entries; made at first use."""
        if vocab_size not in self._vocabularies:
            if not self.has_text:
                raise InvalidRequestError(f"structured output needs a tokenizer, and {self.path} has none", "grammar")
            self._vocabularies[vocab_size] = Vocabulary(read_vocabulary(self.path, self._loaded), vocab_size)
        return self._vocabularies[vocab_size]

    def _shown_token_bytes(self, token_id: int) -> bytes:
        shown = self._shown_bytes.get(token_id)
        if shown is None:
            shown = self._shown_bytes[token_id] = b"" if token_id in self._special else self.token_bytes(token_id)
        return shown

    def _find_bytes(self, token_id: int) -> bytes:
        if token_id in self._plain_text:
            return self._plain_text[token_id].encode()
        token = self._backend.id_to_token(token_id) if self.has_text else None
        if token is None:
            return b""
        if self._bytes_of_piece is not None:
            return self._bytes_of_piece(token)
        return self.decode([token_id], skip_special_tokens=False).encode()


def _names(template: str, variable: str) -> bool:
    return re.search(rf"\b{re.escape(variable)}\b", template) is not None


def _configured_end_tokens(folder: Path) -> set[int]:
    """Read the end tokens in config.json (or its text part) and generation_config.json, each one id or a list."""
    found: set[int] = set()
    for name, read in (("config.json", lambda path: read_config(path.parent)), ("generation_config.json", read_json)):
        path = folder / name
        if not is_there(path):
            continue
        document = read(path)
        for section in (document, document.get("text_config")):
            value = section.get("eos_token_id") if isinstance(section, dict) else None
            for entry in value if isinstance(value, list) else [value]:
                token_id = whole_number(entry)
                if token_id is not None:
                    found.add(token_id)
                elif entry is not None:
                    raise ModelError(f"{path}: eos_token_id must be a token id or a list of them, got {shown(value)}")
    return found
