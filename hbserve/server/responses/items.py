"""Items of a response: those of the input as messages, and those of the output while it grows."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from hbserve.errors import InvalidRequestError
from hbserve.server.chat import AnswerGrowth
from hbserve.server.errors import ItemNotFoundError

MAX_REFERENCED_BYTES = 16 << 20
"""Items that one request may refer to; they are decoded in the event loop."""

_TEXT_PARTS = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")

Event = dict[str, Any]


def resolved(items: list[dict[str, Any]], find: Callable[[str], bytes | None]) -> list[dict[str, Any]]:
    """Return the items with stored ones in the place of references to them.

    Args:
        find: function from the id of an item to the stored item, as JSON.

    Raises:
        ItemNotFoundError, InvalidRequestError: ``param`` names the reference.
    """
    referenced: set[str] = set()
    num_bytes = 0
    whole = []
    for number, item in enumerate(items):
        if not is_reference(item):
            whole.append(item)
            continue
        where, item_id = f"input.{number}", item.get("id")
        if not isinstance(item_id, str):
            raise InvalidRequestError(f"{where}: an item_reference needs the id of an item", where)
        if item_id in referenced:
            raise InvalidRequestError(f"{where}: the item {item_id!r} is referred to twice", where)
        found = find(item_id)
        if found is None:
            reason = "its response was made with store: false, or with another key, or it was dropped for later ones"
            raise ItemNotFoundError(f"{where}: there is no item {item_id!r}: {reason}", where)
        num_bytes += len(found)
        if num_bytes > MAX_REFERENCED_BYTES:
            raise InvalidRequestError(f"{where}: the referenced items have over {MAX_REFERENCED_BYTES} bytes", where)
        referenced.add(item_id)
        whole.append(msgspec.json.decode(found))
    return whole


def is_reference(item: dict[str, Any]) -> bool:
    """Return whether an item refers to a stored one; the type of a reference may be missing."""
    return item.get("type") == "item_reference" or (item.get("type") is None and "role" not in item and "id" in item)


def as_messages(items: Iterable[dict[str, Any]], first: int = 0) -> list[dict[str, Any]]:
    """Return the messages of a conversation. Fields that no prompt needs are ignored, because they are history.

    Calls join the assistant's message before them, as chat templates expect.

    Args:
        first: number of the first item in the client's input; negative: the items before 0 are not from there.

    Raises:
        InvalidRequestError: an item is of a kind that is not supported; ``param`` names it.
    """
    messages: list[dict[str, Any]] = []
    reasoning = ""
    for number, item in enumerate(items, first):
        where = f"input.{number}"
        kind = item.get("type") or ("message" if "role" in item else None)
        if kind == "reasoning":
            reasoning += _text(item.get("content"), f"{where}.content")
        elif kind == "message":
            messages.append({"role": item.get("role"), "content": _text(item.get("content"), f"{where}.content")})
            if item.get("role") not in ("user", "assistant", "system", "developer"):
                rule = f"must be user, assistant, system or developer, got {item.get('role')!r}"
                raise InvalidRequestError(f"{where}.role {rule}", f"{where}.role")
        elif kind == "function_call":
            if not isinstance(item.get("name"), str) or not isinstance(item.get("call_id"), str):
                raise InvalidRequestError(f"{where}: a function_call needs call_id and name", where)
            function = {"name": item["name"], "arguments": item.get("arguments")}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            calls = messages[-1].setdefault("tool_calls", [])
            calls.append({"id": item["call_id"], "type": "function", "function": function})
        elif kind == "function_call_output":
            if not isinstance(item.get("call_id"), str):
                raise InvalidRequestError(f"{where}: a function_call_output needs call_id", where)
            text = _text(item.get("output"), f"{where}.output")
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": text})
        else:
            known = "message, function_call, function_call_output, reasoning, item_reference"
            raise InvalidRequestError(f"{where}: items of type {kind!r} are not supported; send {known}", where)
        if reasoning and messages and kind in ("message", "function_call"):
            if messages[-1]["role"] == "assistant":
                messages[-1].setdefault("reasoning_content", reasoning)
            reasoning = ""
    return messages


def _text(content: Any, where: str) -> str:
    """Return text, or the text of a list of parts."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise InvalidRequestError(f"{where} must be text, or a list of text parts", where)
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else part
        if isinstance(part, dict) and kind not in _TEXT_PARTS:
            message = f"parts of type {kind!r} are not supported; the model takes text"
            raise InvalidRequestError(f"{where}.{number}: {message}", f"{where}.{number}")
        if not isinstance(text, str | None):
            raise InvalidRequestError(f"{where}.{number}: the text of a part must be a string", f"{where}.{number}")
        texts.append(text or "")
    return "".join(texts)


class OutputItems:
    """The items of an output, and the events that tell of their growth.

    ::

        reasoning:      output_item.added ─ content_part.added ─ reasoning_text.delta … ─ reasoning_text.done
                        ─ content_part.done ─ output_item.done
        message:        output_item.added ─ content_part.added ─ output_text.delta … ─ output_text.done
                        ─ content_part.done ─ output_item.done
        function_call:  output_item.added ─ function_call_arguments.delta … ─ function_call_arguments.done
                        ─ output_item.done

    At most the last item is open. Events have no ``sequence_number`` yet.

    Attributes:
        items: as they are now; the text and the arguments of an open one are still empty.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._new_logprobs: list[dict[str, Any]] = []  # of tokens whose text has not come yet

    def add(self, new: AnswerGrowth, logprobs: list[dict[str, Any]]) -> list[Event]:
        """Add reasoning, then text, then growth of calls; return the events."""
        self._new_logprobs += logprobs
        events = self._add_reasoning(new.reasoning) if new.reasoning else []
        events += self._add_text(new.text) if new.text else []
        for change in new.calls:
            if "id" in change:
                events += self._begin_call(change)
            events += self._add_arguments(change["function"]["arguments"])
        return events

    def end(self, status: str) -> list[Event]:
        """End the last item; an output without items is a message without text.

        Args:
            status: ``completed`` or ``incomplete``.
        """
        has_answer = any(item["type"] != "reasoning" for item in self.items)
        events = [] if has_answer or (self.items and status != "completed") else self._begin_message()
        return events + self._close(status)

    def _begin(self, item: dict[str, Any]) -> list[Event]:
        events = self._close("completed")
        self.items.append(item)
        self._open, self._pieces, self._logprobs = item, [], []
        return [
            *events,
            {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": dict(item)},
        ]

    def _begin_message(self) -> list[Event]:
        item = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "status": "in_progress", "role": "assistant"}
        events = self._begin(item | {"content": []})
        return [*events, self._at("response.content_part.added", content_index=0, part=_part("", []))]

    def _add_reasoning(self, text: str) -> list[Event]:
        events = []
        if self._open is None:
            item = {"id": f"rs_{uuid.uuid4().hex}", "type": "reasoning", "status": "in_progress", "summary": []}
            events = self._begin(item | {"content": []})
            part = {"type": "reasoning_text", "text": ""}
            events.append(self._at("response.content_part.added", content_index=0, part=part))
        self._pieces.append(text)
        return [*events, self._at("response.reasoning_text.delta", content_index=0, delta=text)]

    def _add_text(self, text: str) -> list[Event]:
        events = []
        if self._open is None or self._open["type"] != "message":
            events = self._begin_message()
        self._pieces.append(text)
        logprobs, self._new_logprobs = self._new_logprobs, []
        self._logprobs += logprobs
        return [*events, self._at("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)]

    def _begin_call(self, change: dict[str, Any]) -> list[Event]:
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "in_progress"}
        return self._begin(item | {"call_id": change["id"], "name": change["function"]["name"], "arguments": ""})

    def _add_arguments(self, arguments: str) -> list[Event]:
        if not arguments:
            return []
        self._pieces.append(arguments)
        return [self._at("response.function_call_arguments.delta", delta=arguments)]

    def _close(self, status: str) -> list[Event]:
        item, text = self._open, "".join(self._pieces)
        if item is None:
            return []
        item["status"] = status
        if item["type"] == "reasoning":
            part = {"type": "reasoning_text", "text": text}
            item["content"] = [part]
            events = [
                self._at("response.reasoning_text.done", content_index=0, text=text),
                self._at("response.content_part.done", content_index=0, part=part),
            ]
        elif item["type"] == "message":
            self._logprobs += self._new_logprobs
            self._new_logprobs = []
            part = _part(text, self._logprobs)
            item["content"] = [part]
            done = {"content_index": 0, "text": text, "logprobs": self._logprobs}
            events = [
                self._at("response.output_text.done", **done),
                self._at("response.content_part.done", content_index=0, part=part),
            ]
        else:
            item["arguments"] = text
            events = [self._at("response.function_call_arguments.done", name=item["name"], arguments=text)]
        self._open = None
        return [*events, {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": dict(item)}]

    def _at(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1} | fields


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
