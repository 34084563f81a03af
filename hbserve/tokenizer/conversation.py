"""Messages of a conversation, from the forms that clients send to the one form that chat templates take.

Every path to a chat template goes through `normalise`: the HTTP routes and the Python API. History is taken leniently,
because clients send back what they received from any server: fields that no template uses are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic_core

from hbserve.errors import InvalidRequestError

MAX_DEPTH = 64
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TEMPLATE_ROLES = {"developer": "system", "function": "tool"}  # chat templates know the older, and the newer name
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def normalise(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages as chat templates take them.

    A message has ``role`` and ``content``: text, or a list of ``{"type": "text", "text": …}`` if the client sent a
    list. If present it also has ``name``, ``reasoning_content``, ``tool_calls`` (arguments are an object) and
    ``tool_call_id``. The messages that were given are not changed.

    Raises:
        InvalidRequestError: ``param`` names message and field.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequestError("messages must be a list of dictionaries with role and content", "messages")
    if not messages:
        raise InvalidRequestError("messages must not be empty", "messages")
    return [_message(message, f"messages.{number}") for number, message in enumerate(messages)]


def not_too_deep(value: Any) -> Any:
    """Refuse JSON that is nested so deeply that a recursive program may fail on it.

    Raises:
        ValueError
    """
    containers = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        inner = [item for c in containers for item in (c.values() if isinstance(c, dict) else c)]
        containers = [item for item in inner if isinstance(item, dict | list)]
        if not containers:
            return value
    raise ValueError(f"must not be nested more than {MAX_DEPTH} levels deep")


def _message(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f"{where} must be an object with role and content", where)
    role = given.get("role")
    if role not in _ROLES:
        choice = "system, developer, user, assistant or tool"
        raise InvalidRequestError(f"{where}.role must be {choice}, got {role!r}", f"{where}.role")
    message: dict[str, Any] = {"role": _TEMPLATE_ROLES.get(role, role), "content": _content(given, where)}
    name = given.get("name")
    if not isinstance(name, str | None):
        raise InvalidRequestError(f"{where}.name must be text", f"{where}.name")
    if name:
        message["name"] = name
    if message["role"] == "assistant":
        reasoning = given.get("reasoning_content") or given.get("reasoning")  # two names of one thing
        if isinstance(reasoning, str) and reasoning:
            message["reasoning_content"] = reasoning
        calls = _calls(given, where)
        if calls:
            message["tool_calls"] = calls
    if message["role"] == "tool" and isinstance(given.get("tool_call_id"), str):
        message["tool_call_id"] = given["tool_call_id"]
    return message


def _content(given: Mapping[str, Any], where: str) -> str | list[dict[str, str]]:
    content, role = given.get("content"), given["role"]
    if content is None and role == "assistant":  # an answer that is a refusal, or was spoken
        audio = given.get("audio")
        content = given.get("refusal") or (audio.get("transcript") if isinstance(audio, Mapping) else None)
        if content is None and audio:
            raise InvalidRequestError(f"{where}.audio is not supported, unless it has a transcript", f"{where}.audio")
    elif "content" not in given:
        raise InvalidRequestError(f"{where}: content is missing", where)
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    where = f"{where}.content"
    if not isinstance(content, list | tuple):
        raise InvalidRequestError(f"{where} must be text, or a list of text parts", where)
    return [{"type": "text", "text": _text(part, f"{where}.{number}")} for number, part in enumerate(content)]


def _text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in _TEXT_PARTS:
        rule = "must be {'type': 'text', 'text': ...}; other kinds of parts are not supported"
        raise InvalidRequestError(f"{where} {rule}" + (f", got {kind!r}" if kind else ""), where)
    text = part.get(_TEXT_PARTS[kind], "")
    if not isinstance(text, str | None):
        raise InvalidRequestError(f"{where}: the text of a part must be a string", where)
    return text or ""


def _calls(given: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    calls = given.get("tool_calls")
    if not calls and given.get("function_call"):  # the form that preceded tool_calls
        calls, where = [{"id": None, "function": given["function_call"]}], f"{where}.function_call"
    elif not isinstance(calls, list | tuple | None):
        raise InvalidRequestError(f"{where}.tool_calls must be a list", f"{where}.tool_calls")
    else:
        where = f"{where}.tool_calls"
    return [_call(call, number, f"{where}.{number}") for number, call in enumerate(calls or ())]


def _call(call: Any, number: int, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or (call.get("type") or "function") != "function":
        rule = "must be {'id': ..., 'type': 'function', 'function': {'name': ..., 'arguments': ...}}"
        raise InvalidRequestError(f"{where} {rule}", where)
    name, call_id = function.get("name"), call.get("id")
    if not isinstance(name, str) or not name:
        raise InvalidRequestError(f"{where}: the name of the function is missing", where)
    if not isinstance(call_id, str | None):
        raise InvalidRequestError(f"{where}: id must be text", where)
    arguments = _arguments(function.get("arguments"), where)
    return {"id": call_id or f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(given: Any, where: str) -> dict[str, Any] | str:
    """Return the arguments of a call as an object.

    A call that ``max_tokens`` cut off has its arguments so far: they are completed, without what is half a name or a
    number. What a model wrote instead of JSON stays text, and the template decides.
    """
    arguments = given
    if isinstance(given, str):
        try:
            arguments = json.loads(given, strict=False) if given.strip() else {}
        except (ValueError, RecursionError):
            arguments = _completed(given)
    try:
        arguments = not_too_deep({} if arguments is None else arguments)
    except ValueError as error:
        raise InvalidRequestError(f"{where}: the arguments {error}", where) from None
    if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
        return arguments
    if not isinstance(arguments, Mapping):
        raise InvalidRequestError(f"{where}: the arguments of a tool call must be a JSON object", where)
    return dict(arguments)


def _completed(text: str) -> Any:
    """Return the JSON of which ``text`` is the beginning; the text itself if it is the beginning of none."""
    try:
        return pydantic_core.from_json(text, allow_partial="trailing-strings")
    except ValueError:
        return text
