"""Chat templates: which forms of messages one takes, and templates that come with a request.

A template of a request is a program of a stranger. It runs in a process of its own (this file as a script, with
nothing but jinja2 and the standard library), in jinja's sandbox, with limits of time and memory.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

Turns = list[dict[str, Any]]
Render = Callable[[Turns], str]

TIMEOUT_S = 5.0
"""Time that a request's template may take, with the start of its process."""
_MAX_MEMORY_BYTES = 1 << 30
_MAX_TEXT = 10_000_000  # characters of a rendered conversation
MAX_AT_ONCE = 4

TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What a template raises: it is a program, and rejects messages with any of these."""

_turns = threading.BoundedSemaphore(MAX_AT_ONCE)


# --- forms of messages ---------------------------------------------------------------------------


class MessageForms:
    """The forms in which a template shows the content of a message, by role, and calls of tools.

    Templates are programs, so the forms are found by trials. Each role's content is rendered as text and as parts, and
    a call is rendered with its arguments as an object and as text.

    Args:
        render: function from messages to the prompt.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        self._shows = {
            role: tuple(_shows(render, make, content) for content in _CONTENTS) for role, make in _TRIALS.items()
        }

    def prepare(self) -> None:
        """Do the trial that only messages with calls need."""
        _ = self._wants_text

    def fit(self, turns: Sequence[Mapping[str, Any]]) -> Turns:
        """Return the messages with each content and each call in a form that the template shows."""
        fitted = [{**turn, "content": self._fitting(turn["role"], turn["content"])} for turn in turns]
        return [_with_text(turn) if turn.get("tool_calls") and self._wants_text else turn for turn in fitted]

    @cached_property
    def _wants_text(self) -> bool:
        """Whether the template shows the arguments of a call only if they are text."""
        return not _shows_call(self._render, dict) and _shows_call(self._render, _with_text)

    def _fitting(self, role: str, content: Any) -> Any:
        shows = self._shows.get(role, ())
        if not any(shows):  # the trial was rejected: the role has other rules, but the same macros
            shows = self._shows["user"]
        shows_text, shows_parts, shows_one_part = shows
        if shows_parts and not isinstance(content, str):
            return content
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        return [{"type": "text", "text": text}] if shows_one_part and not shows_text else text


_FIRST, _SECOND, _MARK = "Qzfirstzq", "Qzsecondzq", "Qzmarkzq"
_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
_USER = {"role": "user", "content": "x"}
_TRIALS: dict[str, Callable[[Any], Turns]] = {
    "user": lambda content: [{"role": "user", "content": content}],
    "system": lambda content: [{"role": "system", "content": content}, _USER],
    "assistant": lambda content: [_USER, {"role": "assistant", "content": content}, _USER],
    "tool": lambda content: [
        _USER,
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "content": content, "tool_call_id": "abcdefghi", "name": "f"},
    ],
}


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text, "mark": _MARK}


_CONTENTS: tuple[Any, ...] = (_FIRST + _SECOND, [_part(_FIRST), _part(_SECOND)], [_part(_FIRST + _SECOND)])
"""Contents on trial: text, several parts, and one part, because some templates show only the first."""


def _shows(render: Render, make: Callable[[Any], Turns], content: Any) -> bool:
    try:
        text = render(make(content))
    except TEMPLATE_ERRORS:
        return False
    return _FIRST in text and _SECOND in text and _MARK not in text  # the mark: the list was printed as it is


def _with_text(turn: dict[str, Any]) -> dict[str, Any]:
    """Write the arguments of calls as JSON text."""

    def written(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return call | {"function": function | {"arguments": text}}

    return turn | {"tool_calls": [written(call) for call in turn["tool_calls"]]}


def _shows_call(render: Render, form: Callable[[dict[str, Any]], dict[str, Any]]) -> bool:
    call = _CALL | {"function": {"name": _FIRST, "arguments": {_SECOND: _MARK}}}
    result = {"role": "tool", "content": "x", "tool_call_id": _CALL["id"], "name": _FIRST}
    try:
        text = render([_USER, form({"role": "assistant", "content": "", "tool_calls": [call]}), result])
    except TEMPLATE_ERRORS:
        return False
    return all(part in text for part in (_FIRST, _SECOND, _MARK))


# --- the template of a request -------------------------------------------------------------------


def render_request_template(
    template: str, turns: Turns, variables: Mapping[str, Any], *, continue_final_message: bool
) -> str:
    """Render a conversation by a template that came with the request, in a process of its own.

    Args:
        turns: as from `conversation.normalise`.
        variables: further variables of the template, all plain data.
        continue_final_message: the prompt ends with the text of the last message.

    Raises:
        jinja2.TemplateError: the template is wrong, rejects the messages, or takes too much time or memory.
    """
    order = {
        "template": template,
        "turns": turns,
        "variables": dict(variables),
        "continue_final_message": continue_final_message,
    }
    if not _turns.acquire(timeout=TIMEOUT_S):
        raise jinja2.TemplateError("too many requests with a template of their own are open; send it again later")
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__],
            input=json.dumps(order).encode(),
            capture_output=True,
            timeout=TIMEOUT_S,
            env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},  # no secrets
            cwd="/",
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise jinja2.TemplateError(f"the template took more than {TIMEOUT_S:g} s") from None
    finally:
        _turns.release()
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise jinja2.TemplateError("the template takes too much time or memory") from None
    if "error" in answer:
        raise jinja2.TemplateError(answer["error"])
    text: str = answer["text"]
    return text


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}``, with which templates mark answers for training: shown as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _render(order: Mapping[str, Any]) -> str:
    """Render as transformers does (``apply_chat_template``)."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    template = environment.from_string(order["template"])
    variables = order["variables"]
    forms = MessageForms(lambda turns: template.render(**variables, messages=turns))
    turns = forms.fit(order["turns"])
    if not order["continue_final_message"]:
        return template.render(**variables, messages=turns)
    tag = "Qzcontinuezq"
    content = turns[-1]["content"]
    if isinstance(content, list):
        content[-1]["text"] += tag
    else:
        turns[-1]["content"] += tag
    text, found, _ = template.render(**variables, messages=turns).rpartition(tag)
    if not found:
        raise jinja2.TemplateError("continue_final_message: the template does not show the last message")
    return text


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (int(TIMEOUT_S) + 1, int(TIMEOUT_S) + 1))
    try:
        text = _render(json.load(sys.stdin.buffer))
        answer = (
            {"text": text} if len(text) <= _MAX_TEXT else {"error": "the prompt that the template makes is too long"}
        )
    except (*TEMPLATE_ERRORS, RecursionError) as error:
        answer = {"error": str(error) or type(error).__name__}
    except MemoryError:
        answer = {"error": "the template takes too much memory"}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    _main()
