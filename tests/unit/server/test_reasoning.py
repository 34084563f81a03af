"""Reasoning apart from the answer, in the form of each family, however the text arrives."""

from __future__ import annotations

import pytest

from hbserve.server.answers.channels import ChannelParser
from hbserve.server.answers.reasoning import MarkedParser, ReasoningParser

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


ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|start|>assistant<|channel|>final<|message|>"
CHANNELS = [
    (f"{ANALYSIS}I see.<|end|>{FINAL}Yes.", "assistant", "I see.", "Yes."),
    (f"{ANALYSIS}I <|en see.<|end|>{FINAL}Yes.<|return|>", "assistant", "I <|en see.", "Yes."),
    (f"{ANALYSIS}a<|end|><|start|>assistant{ANALYSIS}b<|end|>{FINAL}c", "assistant", "ab", "c"),
    (
        f"{ANALYSIS}a<|end|><|start|>assistant<|channel|>commentary<|message|>First.<|end|>{FINAL}Then.",
        "assistant",
        "a",
        "First.Then.",
    ),
    ("<|channel|>final<|message|>Yes.", "assistant", "", "Yes."),
    ("Yes.", "assistant", "", "Yes."),
    ("t", "assistant", "", "t"),
    ("", "assistant", "", ""),
    (f"{ANALYSIS}half", "assistant", "half", ""),
    (f"{ANALYSIS}half<|end|>", "assistant", "half", ""),
    (f"{ANALYSIS}half<|end|><|start|>assistant<|channel|>fi", "assistant", "half", ""),
    ("<|channel|>anal", "assistant", "", ""),
    ("so far", "assistant<|channel|>analysis<|message|>I think ", "so far", ""),
    ("it is.", "assistant<|channel|>final<|message|>Yes, ", "", "it is."),
    ("Yes.", "", "", "Yes."),
]


def parse(parser: ReasoningParser, text: str, size: int) -> tuple[str, str]:
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    fed = [parser.feed(piece, [1], last=False) for piece in pieces] + [parser.feed("", [], last=True)]
    return "".join(part for part, _ in fed), "".join(part for _, part in fed)


@pytest.mark.parametrize(("text", "is_inside", "reasoning", "answer"), CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 1000])
def test_reasoning_between_marks(text: str, is_inside: bool, reasoning: str, answer: str, size: int) -> None:
    for begin, end in (("<think>", "</think>"), ("[THINK]", "[/THINK]")):
        text, reasoning, answer = (
            part.replace("<think>", begin).replace("</think>", end).replace("<th", begin[:3]).replace("</th", end[:4])
            for part in (text, reasoning, answer)
        )
        assert parse(MarkedParser(begin, end, is_inside, None), text, size) == (reasoning, answer)
        assert MarkedParser(begin, end, is_inside, None).feed(text, [], last=True) == (reasoning, answer)


@pytest.mark.parametrize(("text", "head", "reasoning", "answer"), CHANNELS)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 1000])
def test_reasoning_on_a_channel(text: str, head: str, reasoning: str, answer: str, size: int) -> None:
    tail = f"<|end|><|start|>{head}" if head else "no template"
    assert parse(ChannelParser(tail, None), text, size) == (reasoning, answer)
    assert ChannelParser(tail, None).feed(text, [], last=True) == (reasoning, answer)


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_tokens_are_counted_to_the_end_mark(size: int) -> None:
    def count(parser: ReasoningParser, pieces: list[tuple[str, int]]) -> int:
        for at in range(0, len(pieces), size):
            part = pieces[at : at + size]
            text, tokens = "".join(text for text, _ in part), [token for _, token in part]
            parser.feed(text, tokens, last=at + size >= len(pieces))
        return parser.num_tokens

    pieces = [("<think>", 7), ("a", 1), (" b", 2), ("</think>", 8), ("\n\n", 3), ("c", 4)]
    assert count(MarkedParser("<think>", "</think>", False, 8), pieces) == 4
    assert count(MarkedParser("<think>", "</think>", False, 8), [("c", 4)]) == 0
    analysis = [("<|channel|>", 5), ("analysis", 1), ("<|message|>", 6), ("a", 2), ("<|end|>", 8)]
    final = [("<|start|>", 9), ("assistant", 3), ("<|channel|>", 5), ("final", 4), ("<|message|>", 6), ("c", 4)]
    assert count(ChannelParser("<|start|>assistant", 8), [*analysis, *final]) == 5
    assert count(ChannelParser("<|start|>assistant", 8), [*analysis, *final[:2], *analysis, *final]) == 12
    assert count(ChannelParser("<|start|>assistant", 8), [("<|channel|>", 5), *final[3:]]) == 0
