"""Parser that takes a model's reasoning, ``<think>…</think>``, out of an output's text while the text arrives."""

from __future__ import annotations

from collections.abc import Sequence

from hbserve.tokenizer import Tokenizer

BEGIN, END = "<think>", "</think>"
_TAIL_TOKENS = 16


class ReasoningParser:
    """The reasoning and the answer of one output, while it grows.

    ::

        start ── BEGIN ──► inside ── END ──► after ── text ──► answer
          └──────────── other text ────────────────────────────▲

    Text that may be the beginning of a mark is held back. White space around the reasoning belongs to neither part.

    Args:
        is_inside: the prompt ends with `BEGIN`, so the output begins with reasoning.
        end_token_id: token of `END`; None: several tokens write it, and a count of tokens is approximate.
    """

    def __init__(self, is_inside: bool, end_token_id: int | None) -> None:
        self._state = "inside" if is_inside else "start"
        self._end_token_id = end_token_id
        self._held = ""
        self._is_at_begin = True  # of the reasoning: white space there is dropped
        self._has_begun = is_inside
        self._num_tokens = 0
        self._is_counted = False

    def feed(self, text: str, token_ids: Sequence[int], last: bool) -> tuple[str, str]:
        """Add text and its tokens; return new reasoning, and new text of the answer.

        Args:
            last: the output is complete.
        """
        self._held += text
        reasoning = answer = ""
        if self._state == "start":
            begin = self._held.lstrip()
            if begin.startswith(BEGIN):
                self._held, self._state = begin[len(BEGIN) :], "inside"
                self._has_begun = True
            elif last or not BEGIN.startswith(begin):
                self._state = "answer"
        if self._state == "inside":
            before, mark, rest = self._held.partition(END)
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
        text = self._held
        size = next((size for size in range(min(len(text), len(END) - 1), 0, -1) if text.endswith(END[:size])), 0)
        before = text[: len(text) - size]
        return size + len(before) - len(before.rstrip())


def reasoning_parser(tokenizer: Tokenizer, template: str, prompt: Sequence[int]) -> ReasoningParser | None:
    """Return a parser for an output of this prompt; None if the model does not reason, or has been told not to."""
    if BEGIN not in template or END not in template:
        return None
    tail = tokenizer.decode(prompt[-_TAIL_TOKENS:], skip_special_tokens=False).rstrip()
    if tail.endswith(END):
        return None
    return ReasoningParser(tail.endswith(BEGIN), tokenizer.added_token_id(END))
