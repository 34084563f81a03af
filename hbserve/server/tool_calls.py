"""Tool calls as Hermes and Qwen models write them: JSON between ``<tool_call>`` and ``</tool_call>``."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from hbserve.grammar import json_rule

CALL_BEGIN = "<tool_call>"
CALL_END = "</tool_call>"


def calls_grammar(functions: Mapping[str, dict[str, Any] | None], several: bool) -> str:
    """The grammar of outputs that consist of calls, at least one.

    Args:
        functions: by name, the JSON schema of their arguments; None: any object.
        several: more than one call may follow each other.
    """
    rules = []
    for number, (name, parameters) in enumerate(functions.items()):
        head = json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ')  # as a string of the grammar
        rules += [f'body_{number}: {head} arguments_{number} "}}"']
        # A rule of its own: the references within a schema are to its root.
        rules += [f"arguments_{number}: {json_rule(parameters or {'type': 'object'})}"]
    bodies = " | ".join(f"body_{number}" for number in range(len(functions)))
    start = 'call ("\\n" call)*' if several else "call"
    return "\n".join(
        [
            "%llguidance {}",
            f"start: {start}",
            f'call: "{CALL_BEGIN}\\n" ({bodies}) "\\n{CALL_END}"',
            *rules,
        ]
    )


class ToolCallParser:
    """Takes the calls out of an output's text, as it comes.

    Text that may be the beginning of a call is held back, and so is white space that may only lead
    up to one. What looks like a call and is no JSON object with a name stays text.
    """

    def __init__(self) -> None:
        self._text = ""
        self._gap: str | None = None  # white space before the call whose text is coming; None: outside of calls
        self._after_call = False  # and nothing but white space since
        self.num_calls = 0

    def feed(self, text: str, last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """Add text.

        Args:
            last: no more will come; a call that is complete but for its end mark counts.

        Returns:
            Text to show, and finished calls in OpenAI's form, each with its ``index``.
        """
        self._text += text
        shown = ""
        calls: list[dict[str, Any]] = []
        while True:
            if self._gap is None:
                before, mark, rest = self._text.partition(CALL_BEGIN)
                if not mark:
                    return shown + self._show(last), calls
                kept = before.rstrip()
                shown += self._outside(kept)
                self._gap, self._text = before[len(kept) :], rest
            body, mark, rest = self._text.partition(CALL_END)
            if not mark and not last:
                return shown, calls
            call = self._call(body)
            if call is None:
                shown += self._outside(self._gap + CALL_BEGIN + body + mark)
            else:
                calls.append(call)
                self._after_call = True
            self._gap, self._text = None, rest

    def _show(self, last: bool) -> str:
        """What may be shown of the text outside of calls."""
        size = len(self._text) if last else len(self._text) - _num_held(self._text)
        text, self._text = self._text[:size], self._text[size:]
        return self._outside(text)

    def _outside(self, text: str) -> str:
        if self._after_call:
            text = text.lstrip()
            self._after_call = not text
        return text

    def _call(self, body: str) -> dict[str, Any] | None:
        try:
            document = json.loads(body)
        except ValueError:
            return None
        if not isinstance(document, dict) or not isinstance(document.get("name"), str):
            return None
        arguments = document.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        self.num_calls += 1
        return {
            "index": self.num_calls - 1,
            "id": f"call_{uuid.uuid4().hex}",
            "type": "function",
            "function": {"name": document["name"], "arguments": text},
        }


def _num_held(text: str) -> int:
    """Characters at the end that may belong to the mark of a call, or be the white space before it."""
    longest = min(len(text), len(CALL_BEGIN) - 1)
    mark = next((size for size in range(longest, 0, -1) if text.endswith(CALL_BEGIN[:size])), 0)
    before = text[: len(text) - mark]
    return mark + len(before) - len(before.rstrip())
