"""Takes the calls of tools out of an output's text, as it comes."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from hbserve.server.tool_formats import ToolFormat

_STRUCTURE = re.compile(r'["\\{}\[\]]')
_MAX_HEAD_LENGTH = 200  # characters of what may become a name that stands alone, before it is taken to be none


class ToolCallParser:
    """What is shown of one output, and the calls in it, as they grow.

    Text that may be the beginning of a call is held back, and so is white space that may only lead up to one.
    From the point where a call has a name and begins its arguments, these are passed on as they come; so a call
    that is cut off is there as far as it came. What looks like a call and is none stays text.

    Args:
        names: of the offered tools.
        forced: the output is known to consist of calls; the beginning of one that was cut off is not shown.
        only_one: nothing is told of what follows the first call.

    Attributes:
        num_calls: found so far.
    """

    def __init__(
        self, form: ToolFormat, names: Collection[str], *, forced: bool = False, only_one: bool = False
    ) -> None:
        self._form, self._names = form, names
        self._forced, self._only_one = forced, only_one
        self._text = ""  # what is not decided yet
        self._state = self._outside
        self._last = False
        self._shown = ""
        self._changes: list[dict[str, Any]] = []
        self._at_start = form.mark_is_optional  # nothing but white space so far
        self._after_call = False  # likewise since the last call
        self._prefix = ""  # what led up to the call at work: text, if it is none
        self._scan = _ObjectScan()
        self._arguments_at: int | None = None  # where they begin in the text; None: not found yet
        self._num_sent = 0  # characters of the text whose arguments are passed on
        self.num_calls = 0

    def feed(self, text: str, last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """Add text.

        Args:
            last: no more will come.

        Returns:
            Text to show, and what the calls have grown by, in the form of OpenAI's streams: ``index`` and
            ``function.arguments``, and where one begins also ``id``, ``type`` and ``function.name``.
        """
        self._text += text
        self._last = last
        while self._state():
            pass
        shown, self._shown = self._shown, ""
        changes, self._changes = self._changes, []
        return "" if self._forced else shown, changes

    # --- states: each does what it can, and says whether another can go on ---------------------------

    def _outside(self) -> bool:
        if self._only_one and self.num_calls:
            self._text = ""
            return False
        if self._at_start:
            begin = self._text.lstrip()
            if not self._last and self._form.mark.startswith(begin):  # also while there is nothing yet
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
        elif not self._whole(self._text[:end]):
            return self._no_call(end)
        self._text, self._prefix = self._text[end:], ""
        self._after_call = True
        self._state = self._after
        return True

    def _may_be_head(self) -> bool:
        return not self._last and len(self._text) < _MAX_HEAD_LENGTH and "{" not in self._text

    def _after(self) -> bool:
        """Between two calls, or behind the last one."""
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
        """What led up to here is text, and so is as much of what follows."""
        self._show(self._prefix + self._text[:size])
        self._text, self._prefix = self._text[size:], ""
        self._state = self._outside
        return True

    # --- what comes out -----------------------------------------------------------------------------

    def _show(self, text: str) -> None:
        if self._after_call:
            text = text.lstrip()
            self._after_call = not text
        self._shown += text

    def _num_held(self) -> int:
        """Characters at the end that may belong to the mark of a call, or be the white space before it."""
        text, mark = self._text, self._form.mark
        longest = min(len(text), len(mark) - 1)
        size = next((size for size in range(longest, 0, -1) if text.endswith(mark[:size])), 0)
        before = text[: len(text) - size]
        return size + len(before) - len(before.rstrip())

    def _whole(self, text: str) -> bool:
        """A call whose parts come in another order than usual."""
        try:
            document = json.loads(text, strict=False)
        except (ValueError, RecursionError):
            return False
        name = document.get("name")
        if not isinstance(name, str) or (self._form.knows_names and name not in self._names):
            return False
        arguments = document.get(self._form.arguments_key, None if self._form.knows_names else {})
        if arguments is None and self._form.knows_names:
            return False
        self._begin_change(name)
        self._grow(arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
        return True

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
    """Finds where a JSON object ends in a growing text, and one within it.

    Attributes:
        inner_end: where the inner one ends, once found.
    """

    def __init__(self) -> None:
        self._at = 0
        self._depth = 0
        self._in_string = False
        self._inner_depth: int | None = None
        self.inner_end: int | None = None

    def run(self, text: str, start: int, inner_start: int | None) -> int | None:
        """Go on to the end of ``text``, which has only grown; the end of the object, or None.

        Args:
            start, inner_start: of the object and of the one within.
        """
        at = max(self._at, start)
        while (found := _STRUCTURE.search(text, at)) is not None:
            at, char = found.end(), found[0]
            if self._in_string:
                if char == "\\":
                    if at == len(text):
                        at -= 1
                        break  # what it escapes has not come yet
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
