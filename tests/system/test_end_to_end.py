"""The demo model through every mode: answers that prove that the KV cache arrived intact."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest

from hbserve import LLM, SamplingParams
from hbserve.semi_pd.process_rotation_manager import SMAllocation
from tests.support.engines import assert_no_leaks
from tests.support.paths import ROOT

DEMO = str(ROOT / "examples" / "models" / "hbserve-demo")
sys.path.insert(0, str(ROOT / "examples"))

import demo_language as language  # noqa: E402

GREEDY = SamplingParams(temperature=0, max_tokens=64)
NUM_PAIRS = 60
DEADLINE_S = 120.0
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "num_blocks": 2048,
    "chunk_size": 64,
    "max_model_len": 1024,
    "log_level": "WARNING",
}
FP8: dict[str, Any] = {"quantization": "fp8", "kv_cache_dtype": "fp8"}


def recall_questions(count: int, position: int | None = None) -> list[language.Question]:
    rng = random.Random(5)
    return [language.recall_question(rng, NUM_PAIRS, position=position) for _ in range(count)]


def share_right(llm: LLM, questions: list[language.Question]) -> float:
    outputs = llm.chat([question.messages for question in questions], GREEDY, use_tqdm=False)
    return sum(o["text"] == q.answer for o, q in zip(outputs, questions, strict=True)) / len(questions)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("unified", {"dtype": "float32"}),
        ("disaggregated", {"dtype": "float32"}),
        ("disaggregated", {"dtype": "bfloat16", "kv_transfer_backend": "shm", **FP8}),
    ],
    ids=["unified", "disaggregated", "disaggregated-fp8"],
)
def test_recall_of_held_out_pairs_in_every_mode(mode: str, options: dict[str, Any]) -> None:
    with LLM(DEMO, mode=mode, **SETTINGS, **options) as llm:
        assert share_right(llm, recall_questions(20)) >= 0.95
        assert share_right(llm, recall_questions(20, position=10)) >= 0.95
        assert_no_leaks(llm)


def test_fp8_behind_a_rotation_and_from_the_prefix_cache() -> None:
    """Weights and KV, which workers attach to; tests/unit/engine/test_fp8.py has the other conditions."""
    rng = random.Random(5)
    questions = [language.recall_question(rng, num_pairs) for num_pairs in (3, 12, 20, 30)]
    semi_pd = {"prefill_percentage": 60, "ladder": {"prefill": [], "decode": []}, "num_sleepers": 1}
    with LLM(DEMO, mode="semi_pd", **SETTINGS, **semi_pd, **FP8) as llm:
        assert share_right(llm, questions) == 1
        (manager,) = llm.supervisors.values()
        assert manager.request_sm_reallocation(SMAllocation(80, 100))
        assert manager.wait_until_settled(DEADLINE_S)
        assert share_right(llm, questions) == 1
        assert llm.get_system_stats()["cpu_scheduler"]["cached_prompt_tokens"] > 0
        assert_no_leaks(llm)


def test_a_corrupted_block_shows_in_the_answers() -> None:
    # About the tenth pair stands in the third block of 16 tokens.
    questions = recall_questions(20, position=10)  # which an intact system answers, see above
    backend = "tests.support.faulty_transfers:WipesThirdBlock"
    with LLM(DEMO, mode="disaggregated", dtype="float32", kv_transfer_backend=backend, **SETTINGS) as llm:
        corrupted = share_right(llm, questions)
    assert corrupted <= 0.5
