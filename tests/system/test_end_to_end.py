"""The demo model through every mode: answers that prove that the KV cache arrived intact."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest

from hbserve import LLM, SamplingParams
from tests.support.engines import assert_no_leaks
from tests.support.paths import ROOT

DEMO = str(ROOT / "examples" / "models" / "hbserve-demo")
sys.path.insert(0, str(ROOT / "examples"))

import demo_language as language  # noqa: E402

GREEDY = SamplingParams(temperature=0, max_tokens=64)
NUM_PAIRS = 60
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "num_blocks": 2048,
    "chunk_size": 64,
    "max_model_len": 1024,
    "log_level": "WARNING",
}


def recall_questions(count: int, position: int | None = None) -> list[language.Question]:
    rng = random.Random(5)
    return [language.recall_question(rng, NUM_PAIRS, position=position) for _ in range(count)]


def share_right(llm: LLM, questions: list[language.Question]) -> float:
    outputs = llm.chat([question.messages for question in questions], GREEDY, use_tqdm=False)
    return sum(o["text"] == q.answer for o, q in zip(outputs, questions, strict=True)) / len(questions)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["unified", "disaggregated"])
def test_recall_of_held_out_pairs_in_every_mode(mode: str, dtype: str) -> None:
    with LLM(DEMO, mode=mode, dtype=dtype, **SETTINGS) as llm:
        assert share_right(llm, recall_questions(20)) >= 0.95
        assert share_right(llm, recall_questions(20, position=10)) >= 0.95
        assert_no_leaks(llm)


def test_a_corrupted_block_shows_in_the_answers() -> None:
    # About the tenth pair stands in the third block of 16 tokens.
    questions = recall_questions(20, position=10)  # which an intact system answers, see above
    backend = "tests.support.faulty_transfers:WipesThirdBlock"
    with LLM(DEMO, mode="disaggregated", dtype="float32", kv_transfer_backend=backend, **SETTINGS) as llm:
        corrupted = share_right(llm, questions)
    assert corrupted <= 0.5
