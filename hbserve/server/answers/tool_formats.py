"""The forms in which model families write calls of tools. A model's chat template tells its family."""

from __future__ import annotations

import json
import re
import secrets
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from hbserve.grammar import json_rule

TokenId = Callable[[str], int | None]
Functions = Mapping[str, dict[str, Any] | None]
ARGUMENTS_KEYS = ("arguments", "parameters")


class ToolFormat(ABC):
    """The form of one family: ``mark opening call separator call … closing``.

    A call is a JSON object with a name and arguments, or it ends with its arguments as a JSON object.

    Attributes:
        mark: text after which calls follow, anywhere in an answer.
        mark_is_optional: an answer that begins like a call is a call, also without the mark.
        opening, separator, closing: text before the first call, between two calls, and after the last.
        head: pattern of a call up to its arguments, with a group ``name``.
        arguments_key: key of the arguments in the object of a call; None: they stand alone, after the head. Models
            also write another of `ARGUMENTS_KEYS`.
        knows_names: only names of the offered tools make a call, because the form alone could be another answer.
    """

    mark: str
    mark_is_optional = False
    opening = ""
    separator = ""
    closing = ""
    arguments_key: str | None = "arguments"
    knows_names = False

    @property
    def head(self) -> re.Pattern[str]:
        return _HEAD if self.arguments_key else _HEAD_WITHOUT_OBJECT

    def new_id(self) -> str:
        """Make an id for a call, in a form that the chat template accepts later."""
        return f"call_{uuid.uuid4().hex}"

    @abstractmethod
    def grammar(self, functions: Functions, several: bool, token_id: TokenId) -> str:
        """Return the grammar of outputs that consist of one call or more.

        Args:
            functions: JSON schema of the arguments by name of the function, of type object; None: any object.
            several: whether more than one call is allowed.
            token_id: function from a mark to its token; it returns None for a mark that is ordinary text.
        """

    def _grammar(self, functions: Functions, start: str, head: Callable[[str], str], tail: str) -> str:
        rules = []
        for number, (name, parameters) in enumerate(functions.items()):
            rules += [f"call_{number}: {head(name)} arguments_{number} {tail}".rstrip()]
            # A rule of its own, because references within a schema start at its root.
            rules += [f"arguments_{number}[capture]: {json_rule(parameters or {'type': 'object'})}"]
        calls = " | ".join(f"call_{number}" for number in range(len(functions)))
        return "\n".join(["%llguidance {}", f"start: {start}", f"call: {calls}", *rules])

    def _object_head(self, name: str) -> str:
        return json.dumps(f'{{"name": {json.dumps(name)}, "{self.arguments_key}": ')  # as a string of the grammar


_NAME = r'"(?P<name>[^"\\]+)"'
_HEAD = re.compile(rf'\s*\{{\s*"name"\s*:\s*{_NAME}\s*,\s*"(?:{"|".join(ARGUMENTS_KEYS)})"\s*:\s*(?=\{{)')
_HEAD_WITHOUT_OBJECT = re.compile(r"\s*(?P<name>[\w.-]{1,64})\s*(?:\[CALL_ID\]\s*\w+\s*)?\[ARGS\]\s*(?=\{)")


class HermesFormat(ToolFormat):
    """Hermes, Qwen 2.5 and 3: each call between marks, ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``."""

    mark = "<tool_call>"
    closing = "</tool_call>"

    def grammar(self, functions: Functions, several: bool, token_id: TokenId) -> str:
        begin, end = _mark(self.mark, token_id), _mark(self.closing, token_id)
        start = f'{begin} "\\n" call "\\n" {end}'
        if several:
            start += f' ("\\n" {begin} "\\n" call "\\n" {end})*'
        return self._grammar(functions, start, self._object_head, '"}"')


class LlamaFormat(ToolFormat):
    """Llama 3.1 to 3.3: the whole answer is ``{"name": …, "parameters": {…}}``, after a mark or not.

    Their templates refuse conversations with more than one call in a turn, so no grammar allows several.
    """

    mark = "<|python_tag|>"
    mark_is_optional = True
    separator = ";"
    arguments_key = "parameters"
    knows_names = True

    def grammar(self, functions: Functions, several: bool, token_id: TokenId) -> str:
        return self._grammar(functions, "call", self._object_head, '"}"')


class MistralFormat(ToolFormat):
    """Mistral up to tokenizer 7: a list of calls, ``[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]``."""

    mark = "[TOOL_CALLS]"
    opening, separator, closing = "[", ",", "]"

    def new_id(self) -> str:
        return secrets.token_hex(5)[:9]  # the templates accept exactly nine letters and digits

    def grammar(self, functions: Functions, several: bool, token_id: TokenId) -> str:
        more = ' (", " call)*' if several else ""
        start = f'{_mark(self.mark, token_id)} " "? "[" call{more} "]"'
        return self._grammar(functions, start, self._object_head, '"}"')


class MistralNamedFormat(MistralFormat):
    """Mistral from tokenizer 11 on: ``[TOOL_CALLS]name[ARGS]{…}`` for each call."""

    opening = separator = closing = ""
    arguments_key = None

    def grammar(self, functions: Functions, several: bool, token_id: TokenId) -> str:
        call = f"{_mark(self.mark, token_id)} call"
        separator = _mark("[ARGS]", token_id)
        start = f"({call})+" if several else call
        return self._grammar(functions, start, lambda name: f"{json.dumps(name)} {separator}", "")


@cache
def tool_format(template: str) -> ToolFormat | None:
    """Return the form of a model with this chat template; None: it has no tools, or an unknown form."""
    if "tools" not in template:
        return None
    if "[TOOL_CALLS]" in template:
        return MistralNamedFormat() if "[ARGS]" in template else MistralFormat()
    if "<tool_call>" in template:  # Qwen3-Coder and GLM write XML between the same marks
        return None if "<function=" in template or "<arg_key>" in template else HermesFormat()
    if "<|start_header_id|>" in template and ("<|python_tag|>" in template or '"parameters"' in template):
        return LlamaFormat()
    return None


def _mark(text: str, token_id: TokenId) -> str:
    """Write a mark in a grammar: as its token, which differs from text of the same letters."""
    number = token_id(text)
    return json.dumps(text) if number is None else f"<[{number}]>"
