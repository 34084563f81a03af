"""Parser of outputs that consist of several messages, each on a channel: the harmony format of gpt-oss."""

from __future__ import annotations

import re
from collections.abc import Sequence

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>", _START)
_END = re.compile("|".join(map(re.escape, _ENDS)))
_OF_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_HEADS = (_CHANNEL, _START, "to=")
_ROLE, _REASONING = "assistant", "analysis"
_MAX_HEAD_LENGTH = 500  # characters; a longer text without a message is taken for an answer


_Parts = tuple[list[str], list[str]]
"""New reasoning, and new text of the answer."""


class ChannelParser:
    """The reasoning and the answer of one output, while it grows.

    ::

        <|start|>assistant<|channel|>analysis<|message|> reasoning <|end|>
        <|start|>assistant<|channel|>final<|message|> answer <|return|>

        head ── <|message|> ──► content ── <|end|> ──► head
          └── other text ──► answer

    The prompt ends within the first head. Messages on the channel ``analysis`` are reasoning, and all others are the
    answer. An output without channels is an answer.

    Args:
        tail: the end of the prompt, as text.
        end_token_id: token of ``<|end|>``.
    """

    def __init__(self, tail: str, end_token_id: int | None) -> None:
        self._end_token_id = end_token_id
        self._state = "head"
        self._held = ""
        self._is_reasoning = self._has_reasoned = self._has_answered = False
        self._is_first = True  # head
        self._num_tokens = self._num_head_tokens = 0
        _, start, head = tail.rpartition(_START)
        if start:
            self.feed(head.removeprefix(_ROLE), (), False)

    def feed(self, text: str, token_ids: Sequence[int], last: bool) -> tuple[str, str]:
        """Add text and its tokens, as in `hbserve.server.answers.reasoning.ReasoningParser.feed`."""
        self._held += text
        parts: _Parts = ([], [])
        is_counted = self._has_answered
        while self._step(parts, last):
            pass
        if not is_counted:
            self._count(token_ids)
        return "".join(parts[0]), "".join(parts[1])

    @property
    def num_tokens(self) -> int:
        """Tokens of the reasoning so far, with its marks."""
        return self._num_tokens if self._has_reasoned else 0

    def _step(self, parts: _Parts, last: bool) -> bool:
        """Read what is there; return whether there may be more to read."""
        if self._state == "head":
            head, mark, rest = self._held.partition(_MESSAGE)
            if mark:
                channel = _OF_CHANNEL.search(head)
                self._is_reasoning = channel is not None and channel[1] == _REASONING
                self._held, self._state, self._is_first = rest, "content", False
            elif last and not self._is_text():
                self._held = ""  # a head that was cut off
                return False
            elif last or not self._may_be_head():
                self._state = "answer"
                self._is_reasoning = False
            else:
                return False
            return True
        found = _END.search(self._held) if self._state == "content" else None
        is_whole = last or self._state == "answer"
        size = found.start() if found else len(self._held) - (0 if is_whole else self._num_held())
        self._give(parts, self._held[:size])
        self._held = self._held[found.end() if found else size :]
        if found:
            self._state = "head"
        return found is not None

    def _is_text(self) -> bool:
        return self._is_first and not self._held.lstrip().startswith((_CHANNEL, _START))

    def _may_be_head(self) -> bool:
        text = self._held.lstrip()
        if len(self._held) > _MAX_HEAD_LENGTH:
            return False
        return not self._is_first or any(text.startswith(mark) or mark.startswith(text) for mark in _HEADS)

    def _num_held(self) -> int:
        """Return how many characters at the end may be part of a mark."""
        sizes = range(min(len(self._held), max(map(len, _ENDS)) - 1), 0, -1)
        return next((size for size in sizes if any(end.startswith(self._held[-size:]) for end in _ENDS)), 0)

    def _give(self, parts: _Parts, text: str) -> None:
        if text:
            parts[0 if self._is_reasoning else 1].append(text)
            self._has_reasoned = self._has_reasoned or self._is_reasoning
            self._has_answered = self._has_answered or not self._is_reasoning

    def _count(self, token_ids: Sequence[int]) -> None:
        """Count the tokens of reasoning, with the heads and marks of its messages."""
        num_counted = 0
        if self._state == "content" and self._is_reasoning:
            num_counted = len(token_ids)
        elif self._has_reasoned and self._end_token_id is not None and self._end_token_id in token_ids:
            num_counted = len(token_ids) - list(reversed(token_ids)).index(self._end_token_id)
        if num_counted:
            self._num_tokens += self._num_head_tokens + num_counted
            self._num_head_tokens = 0
        self._num_head_tokens += len(token_ids) - num_counted
