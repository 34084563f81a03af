"""Evaluation of the demo model: held-out questions of every kind, and the share of right answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from demo_model_text import TURN_END, TURN_START, language, render
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM


@dataclass(frozen=True)
class Score:
    """Share of right answers to one kind of held-out question, for one range of prompt lengths."""

    kind: str
    shortest: int
    longest: int
    right: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.right / self.total


def evaluation_sets(seed: int, count: int) -> dict[str, list[language.Question]]:
    """Return ``count`` held-out questions of every kind; recall comes in several prompt lengths."""
    rng = Random(f"evaluation/{seed}")
    sets: dict[str, list[language.Question]] = {}

    for low, high in ((1, 6), (7, 20), (21, 45), (46, 80), (81, 120), (121, 170)):
        sets[f"recall, {low}-{high} pairs"] = [
            language.recall_question(rng, rng.randint(low, high)) for _ in range(count)
        ]
    sets["recall, first of 100 pairs"] = [language.recall_question(rng, 100, position=0) for _ in range(count)]
    sets["recall, last of 100 pairs"] = [language.recall_question(rng, 100, position=99) for _ in range(count)]
    sets["recall, 2-6 turns"] = [
        language.recall_question(rng, rng.randint(12, 100), turns=rng.randint(2, 6)) for _ in range(count)
    ]
    sets["unknown value"] = [language.unknown_question(rng, rng.randint(1, 80)) for _ in range(count)]
    sets["copy words"] = [language.copy_question(rng, rng.randint(1, 24)) for _ in range(count)]
    sets["copy numbers"] = [language.copy_question(rng, rng.randint(1, 8), numbers=True) for _ in range(count)]
    sets["count"] = [language.count_question(rng) for _ in range(count)]
    sets["sum"] = [language.sum_question(rng) for _ in range(count)]
    sets["facts (as trained)"] = language.fact_questions()
    return sets


@torch.no_grad()
def evaluate(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, sets: dict[str, list[language.Question]]
) -> list[Score]:
    """Count the answers that greedy decoding would get right to the last character.

    One forward pass over prompt and right answer is enough: greedy decoding gives exactly that answer if and
    only if each of its tokens is the likeliest one after the tokens before it.
    """
    device = next(model.parameters()).device
    bpe: Tokenizer = tokenizer.backend_tokenizer
    scores = []
    for kind, questions in sets.items():
        examples = []
        for question in questions:
            prompt = bpe.encode(f"{render(question.messages)}{TURN_START}assistant\n").ids
            examples.append((prompt, bpe.encode(f"{question.answer}{TURN_END}").ids))
        # Rows of similar length go together: less padding.
        examples.sort(key=lambda example: len(example[0]) + len(example[1]))
        right = 0
        for begin in range(0, len(examples), 50):
            batch = examples[begin : begin + 50]
            width = max(len(prompt) + len(answer) for prompt, answer in batch)
            ids = torch.zeros((len(batch), width), dtype=torch.long)
            for row, (prompt, answer) in enumerate(batch):
                ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            guesses = model(input_ids=ids.to(device), use_cache=False).logits.argmax(-1).cpu()
            for row, (prompt, answer) in enumerate(batch):
                guessed = guesses[row, len(prompt) - 1 : len(prompt) + len(answer) - 1]
                right += guessed.tolist() == answer
        lengths = [len(prompt) for prompt, _ in examples]
        scores.append(Score(kind, min(lengths), max(lengths), right, len(examples)))
    return scores


def format_scores(scores: Sequence[Score]) -> str:
    """Return the scores as a Markdown table."""
    lines = ["| Question | Prompt tokens | Right | Of | Accuracy |", "|---|---|---|---|---|"]
    for score in scores:
        lines.append(
            f"| {score.kind} | {score.shortest}-{score.longest} | {score.right} | {score.total} "
            f"| {score.accuracy:.1%} |"
        )
    return "\n".join(lines)
