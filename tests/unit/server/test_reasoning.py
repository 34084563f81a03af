"""Reasoning between marks: it is told apart from the answer, however the text arrives."""

from __future__ import annotations

import pytest

from hbserve.server.answers.reasoning import ReasoningParser

CASES = [
    ("<think>\nI see.\n</think>\n\nYes.", False, "I see.", "Yes."),
    ("\n<think>a < b </thin and </think>c</think>", False, "a < b </thin and", "c</think>"),
    ("I see.\n</think>\n\nYes.", True, "I see.", "Yes."),
    ("\nstill at it ", True, "still at it", ""),
    ("<think></think>Yes.", False, "", "Yes."),
    ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
    ("<th", False, "", "<th"),
    ("  <b>Yes.</b>", False, "", "  <b>Yes.</b>"),
    ("Yes: <think>no</think>.", False, "", "Yes: <think>no</think>."),
    ("", False, "", ""),
    ("", True, "", ""),
    ("half a mark </thi", True, "half a mark </thi", ""),
]


@pytest.mark.parametrize(("text", "is_inside", "reasoning", "answer"), CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 1000])
def test_reasoning_and_answer_whatever_the_pieces(
    text: str, is_inside: bool, reasoning: str, answer: str, size: int
) -> None:
    parser = ReasoningParser(is_inside, None)
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    fed = [parser.feed(piece, [1], last=False) for piece in pieces] + [parser.feed("", [], last=True)]
    assert "".join(part for part, _ in fed) == reasoning
    assert "".join(part for _, part in fed) == answer
    whole = ReasoningParser(is_inside, None)
    assert whole.feed(text, [], last=True) == (reasoning, answer)


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_tokens_are_counted_to_the_end_mark(size: int) -> None:
    pieces = [("<think>", 7), ("a", 1), (" b", 2), ("</think>", 8), ("\n\n", 3), ("c", 4)]
    parser = ReasoningParser(False, 8)
    for at in range(0, len(pieces), size):
        part = pieces[at : at + size]
        parser.feed("".join(text for text, _ in part), [token for _, token in part], last=at + size >= len(pieces))
    assert parser.num_tokens == 4
    none = ReasoningParser(False, 8)
    none.feed("c", [4], last=True)
    assert none.num_tokens == 0
