"""Parser that takes the calls of tools out of an output's text while the text arrives."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from hbserve.server.answers.tool_formats import ARGUMENTS_KEYS, ToolFormat

_STRUCTURE = re.compile(r'["\\{}\[\]]')
_KEYS_OF_CALLS = {"name", "type", "id"}  # besides the arguments
_MAX_HEAD_LENGTH = 200  # characters; a longer text that may still become a name is taken for ordinary text


class ToolCallParser:
    """The visible text of one output, and the calls in it, while the output grows.

    ::

        outside ── mark, or "{" at the start ──► opening ──► call ── complete ──► after ── separator ──► call
           ▲                                        │          │                    │
           └──────────────── not a call: it becomes text ◄─────┘                    └── other text ──► outside

    Text that may be the beginning of a call is held back, with the white space before it. Once a call has a name and
    begins its arguments, the arguments are passed on as they arrive. A call that is cut off therefore has its
    arguments so far. Text that looks like a call and is none stays text.

    Args:
        names: names of the offered tools.
        forced: the output consists of calls only; if one is cut off, its beginning is not shown.
        only_one: ignore everything after the first call.

    Attributes:
        num_calls: number of calls found so far, with one that has only begun.
        num_complete_calls: number of calls whose objects have ended.
    """

    def __init__(
        self, form: ToolFormat, names: Collection[str], *, forced: bool = False, only_one: bool = False
    ) -> None:
        self._form, self._names = form, names
        self._forced, self._only_one = forced, only_one
        self._text = ""  # not decided yet
        self._state = self._outside
        self._last = False
        self._shown = ""
        self._changes: list[dict[str, Any]] = []
        self._at_start = form.mark_is_optional  # only white space so far
        self._after_call = False  # only white space since the last call
        self._prefix = ""  # text before the present call; shown if that turns out to be no call
        self._scan = _ObjectScan()
        self._arguments_at: int | None = None  # where the arguments begin in the text; None: not found yet
        self._num_sent = 0  # characters of the text up to the last argument passed on
        self.num_calls = 0
        self.num_complete_calls = 0

    @property
    def ends_with_calls(self) -> bool:
        """Whether there are calls, and the last one is not cut off: the finish reason is then ``tool_calls``."""
        return 0 < self.num_calls == self.num_complete_calls

    def feed(self, text: str, last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """Add text.

        Args:
            last: the output is complete.

        Returns:
            Text to show, and the growth of the calls in the form of OpenAI's streams: ``index`` and
            ``function.arguments``; at the beginning of a call also ``id``, ``type`` and ``function.name``.
        """
        self._text += text
        self._last = last
        while self._state():
            pass
        shown, self._shown = self._shown, ""
        changes, self._changes = self._changes, []
        return "" if self._forced else shown, changes

    # --- states: each method reads what it can, and returns whether the next state can go on ----------

    def _outside(self) -> bool:
        if self._only_one and self.num_calls:
            self._text = ""
            return False
        if self._at_start:
            begin = self._text.lstrip()
            if not self._last and self._form.mark.startswith(begin):  # true of an empty text too
                return False
            self._at_start = False
            if begin.startswith("{"):
                self._prefix = self._text[: -len(begin)]
                return self._begin_calls(begin)
        before, mark, rest = self._text.partition(self._form.mark)
        if not mark:
            size = len(self._text) if self._last else len(self._text) - self._num_held()
            self._show(self._text[:size])
            self._text = self._text[size:]
            return False
        kept = before.rstrip()
        self._show(kept)
        self._prefix = before[len(kept) :] + mark
        return self._begin_calls(rest)

    def _begin_calls(self, text: str) -> bool:
        self._text = text
        self._state = self._opening
        return True

    def _opening(self) -> bool:
        opening = self._form.opening
        begin = self._text.lstrip()
        if not begin and not self._last:
            return False
        if not begin.startswith(opening):
            return self._no_call(0)
        self._prefix += self._text[: len(self._text) - len(begin)] + opening
        self._begin_call(begin[len(opening) :])
        return True

    def _begin_call(self, text: str) -> None:
        self._text = text
        self._arguments_at, self._num_sent = None, 0
        self._scan = _ObjectScan()
        self._state = self._call

    def _call(self) -> bool:
        stands_alone = self._form.arguments_key is None
        if self._arguments_at is None:
            found = self._form.head.match(self._text)
            if found is not None:
                if self._form.knows_names and found["name"] not in self._names:
                    return self._no_call(found.end())
                self._arguments_at = self._num_sent = found.end()
                self._begin_change(found["name"])
            elif stands_alone:
                return not self._may_be_head() and self._no_call(0)
            elif (begin := self._text.lstrip()) and begin[0] != "{":
                return self._no_call(0)
        end = self._scan.run(self._text, (self._arguments_at or 0) if stands_alone else 0, self._arguments_at)
        if self._arguments_at is not None:
            so_far = self._scan.inner_end or len(self._text)
            self._grow(self._text[self._num_sent : so_far])
            self._num_sent = so_far
            if end is None:
                return False
        elif end is None:
            return self._last and self._no_call(len(self._text))
        elif not self._read_whole(self._text[:end]):
            return self._no_call(end)
        self._text, self._prefix = self._text[end:], ""
        self.num_complete_calls += 1
        self._after_call = True
        self._state = self._after
        return True

    def _may_be_head(self) -> bool:
        return not self._last and len(self._text) < _MAX_HEAD_LENGTH and "{" not in self._text

    def _after(self) -> bool:
        """Read the text between two calls, or after the last."""
        rest = self._text.lstrip()
        closing, separator = self._form.closing, self._form.separator
        if closing and rest.startswith(closing):
            rest = rest[len(closing) :]
        elif (not rest or closing.startswith(rest)) and (closing or separator):
            if self._last:
                self._text = ""
            return False
        elif separator and rest.startswith((separator, "{")):
            more = rest.removeprefix(separator).lstrip()
            if not more and not self._last:
                return False
            if more.startswith("{") and not self._only_one:
                self._prefix = rest[: len(rest) - len(more)]
                self._begin_call(more)
                return True
        self._text = rest
        self._state = self._outside
        return True

    def _no_call(self, size: int) -> bool:
        """Show the text before the present point as text, with ``size`` characters after it."""
        self._show(self._prefix + self._text[:size])
        self._text, self._prefix = self._text[size:], ""
        self._state = self._outside
        return True

    # --- output --------------------------------------------------------------------------------------

    def _show(self, text: str) -> None:
        if self._after_call:
            text = text.lstrip()
            self._after_call = not text
        self._shown += text

    def _num_held(self) -> int:
        """Return how many characters at the end may be part of a call's mark, or the white space before it."""
        text, mark = self._text, self._form.mark
        max_size = min(len(text), len(mark) - 1)
        size = next((size for size in range(max_size, 0, -1) if text.endswith(mark[:size])), 0)
        before = text[: len(text) - size]
        return size + len(before) - len(before.rstrip())

    def _read_whole(self, text: str) -> bool:
        """Read a complete call whose parts are in an unusual order; return False if it is no call."""
        try:
            document = json.loads(text, strict=False)
        except (ValueError, RecursionError):
            return False
        if isinstance(document.get("function"), dict):  # OpenAI's form
            document = document["function"]
        name, arguments = document.get("name"), self._arguments_of(document)
        if not isinstance(name, str) or arguments is None or (self._form.knows_names and name not in self._names):
            return False
        self._begin_change(name)
        self._grow(arguments)
        return True

    def _arguments_of(self, document: dict[str, Any]) -> str | None:
        """Return the arguments in the object of a call, as the text of an object; None if that is no call's object.

        A call without arguments says null, or has no further key.
        """
        keys = [key for key in (self._form.arguments_key, *ARGUMENTS_KEYS) if key in document]
        if not keys:
            return None if self._form.knows_names or document.keys() - _KEYS_OF_CALLS else "{}"
        arguments = document[keys[0]]
        if arguments is None or arguments == "":
            return "{}"
        if not isinstance(arguments, str):
            return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else None
        try:
            return arguments if isinstance(json.loads(arguments, strict=False), dict) else None
        except (ValueError, RecursionError):
            return None

    def _begin_change(self, name: str) -> None:
        function = {"name": name, "arguments": ""}
        self._changes.append(
            {"index": self.num_calls, "id": self._form.new_id(), "type": "function", "function": function}
        )
        self.num_calls += 1

    def _grow(self, arguments: str) -> None:
        index = self.num_calls - 1
        if not arguments:
            return
        if not self._changes or self._changes[-1]["index"] != index:
            self._changes.append({"index": index, "function": {"arguments": ""}})
        self._changes[-1]["function"]["arguments"] += arguments


class _ObjectScan:
    """A search for the end of a JSON object, and of one within it, in a growing text.

    Attributes:
        inner_end: end of the inner object, once found.
    """

    def __init__(self) -> None:
        self._at = 0
        self._depth = 0
        self._in_string = False
        self._inner_depth: int | None = None
        self.inner_end: int | None = None

    def run(self, text: str, start: int, inner_start: int | None) -> int | None:
        """Continue to the end of ``text``, which has only grown; return the end of the object, or None.

        Args:
            start, inner_start: beginnings of the object and of the inner one.
        """
        at = max(self._at, start)
        while (found := _STRUCTURE.search(text, at)) is not None:
            at, char = found.end(), found[0]
            if self._in_string:
                if char == "\\":
                    if at == len(text):
                        at -= 1
                        break  # the escaped character has not arrived yet
                    at += 1
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                if found.start() == inner_start:
                    self._inner_depth = self._depth
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self.inner_end is None and self._depth == self._inner_depth:
                    self.inner_end = at
                if self._depth <= 0:
                    self._at = at
                    return at
        else:
            at = len(text)
        self._at = at
        return None
