"""The forms in which model families write their reasoning. A chat template tells its family.

A parser takes the reasoning out of an output's text while the text arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hbserve.server.answers.channels import ChannelParser
from hbserve.tokenizer import Tokenizer

_TAIL_TOKENS = 16


class ReasoningParser(Protocol):
    """The reasoning and the answer of one output, while it grows."""

    def feed(self, text: str, token_ids: Sequence[int], last: bool) -> tuple[str, str]:
        """Add text and its tokens; return new reasoning, and new text of the answer.

        Args:
            last: the output is complete.
        """

    @property
    def num_tokens(self) -> int:
        """Tokens of the reasoning so far, with its marks."""


@dataclass(frozen=True)
class ReasoningForm:
    """The form of one or more families.

    Attributes:
        marks: texts in their chat templates.
        parser: function from the end of the prompt, as text, and the token of the last mark, to a parser of the output;
            it returns None if the model has been told not to reason. The token is None if several tokens write the
            mark; a count of tokens is then approximate.
    """

    marks: tuple[str, ...]
    parser: Callable[[str, int | None], ReasoningParser | None]


def reasoning_parser(tokenizer: Tokenizer, template: str, prompt: Sequence[int]) -> ReasoningParser | None:
    """Return a parser for an output of this prompt; None if the model does not reason, or has been told not to."""
    form = next((form for form in FORMS if all(mark in template for mark in form.marks)), None)
    if form is None:
        return None
    tail = tokenizer.decode(prompt[-_TAIL_TOKENS:], skip_special_tokens=False)
    return form.parser(tail, tokenizer.added_token_id(form.marks[-1]))


def between(begin: str, end: str) -> ReasoningForm:
    """Return the form of reasoning that stands between two marks, before the answer."""

    def parser(tail: str, end_token_id: int | None) -> ReasoningParser | None:
        tail = tail.rstrip()
        return None if tail.endswith(end) else MarkedParser(begin, end, tail.endswith(begin), end_token_id)

    return ReasoningForm((begin, end), parser)


class MarkedParser:
    """The parser of reasoning between two marks.

    ::

        start ── begin ──► inside ── end ──► after ── text ──► answer
          └──────────── other text ────────────────────────────▲

    Text that may be the beginning of a mark is held back. White space around the reasoning belongs to neither part.

    Args:
        is_inside: the prompt ends with the mark ``begin``, so the output begins with reasoning.
        end_token_id: token of the mark ``end``.
    """

    def __init__(self, begin: str, end: str, is_inside: bool, end_token_id: int | None) -> None:
        self._begin, self._end = begin, end
        self._state = "inside" if is_inside else "start"
        self._end_token_id = end_token_id
        self._held = ""
        self._is_at_begin = True  # of the reasoning: white space there is dropped
        self._has_begun = is_inside
        self._num_tokens = 0
        self._is_counted = False

    def feed(self, text: str, token_ids: Sequence[int], last: bool) -> tuple[str, str]:
        """Add text and its tokens, as in `ReasoningParser.feed`."""
        self._held += text
        reasoning = answer = ""
        if self._state == "start":
            begin = self._held.lstrip()
            if begin.startswith(self._begin):
                self._held, self._state = begin[len(self._begin) :], "inside"
                self._has_begun = True
            elif last or not self._begin.startswith(begin):
                self._state = "answer"
        if self._state == "inside":
            before, mark, rest = self._held.partition(self._end)
            if mark:
                reasoning, self._held, self._state = before.rstrip(), rest, "after"
            else:
                size = len(self._held.rstrip()) if last else len(self._held) - self._num_held()
                reasoning, self._held = self._held[:size], "" if last else self._held[size:]
            if self._is_at_begin:
                reasoning = reasoning.lstrip()
                self._is_at_begin = not reasoning
        if self._state == "after":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "answer"
        if self._state == "answer":
            answer, self._held = self._held, ""
        self._count(token_ids)
        return reasoning, answer

    @property
    def num_tokens(self) -> int:
        """Tokens of the reasoning so far, with its marks."""
        return self._num_tokens if self._has_begun else 0

    def _count(self, token_ids: Sequence[int]) -> None:
        if self._is_counted:
            return
        self._is_counted = self._state in ("after", "answer")
        num_tokens = len(token_ids)
        if self._is_counted and self._end_token_id is not None and self._end_token_id in token_ids:
            num_tokens = list(token_ids).index(self._end_token_id) + 1
        self._num_tokens += num_tokens

    def _num_held(self) -> int:
        """Return how many characters at the end may be part of the end mark, or the white space before it."""
        text, end = self._held, self._end
        size = next((size for size in range(min(len(text), len(end) - 1), 0, -1) if text.endswith(end[:size])), 0)
        before = text[: len(text) - size]
        return size + len(before) - len(before.rstrip())


FORMS = (
    between("<think>", "</think>"),  # Qwen 3, DeepSeek R1, Magistral of June 2025, and many others
    between("[THINK]", "[/THINK]"),  # Magistral since then, and Ministral 3
    ReasoningForm(("<|channel|>", "<|message|>", "<|end|>"), ChannelParser),  # gpt-oss
)
