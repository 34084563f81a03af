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


def recall_questions(count: int, position: int | None = None) -> list[language.Question]:
    rng = random.Random(5)
    return [language.recall_question(rng, NUM_PAIRS, position=position) for _ in range(count)]


def share_right(llm: LLM, questions: list[language.Question]) -> float:
    outputs = llm.chat([question.messages for question in questions], GREEDY, use_tqdm=False)
    return sum(o["text"] == q.answer for o, q in zip(outputs, questions, strict=True)) / len(questions)


@pytest.mark.parametrize(
    ("mode", "dtype"), [("unified", "float32"), ("disaggregated", "float32"), ("disaggregated", "bfloat16")]
)
def test_recall_of_held_out_pairs_in_every_mode(mode: str, dtype: str) -> None:
    with LLM(DEMO, mode=mode, dtype=dtype, **SETTINGS) as llm:
        assert share_right(llm, recall_questions(20)) >= 0.95
        assert share_right(llm, recall_questions(20, position=10)) >= 0.95
        assert_no_leaks(llm)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("disaggregated", {"kv_transfer_backend": "shm"}),
        ("semi_pd", {"prefill_percentage": 60, "ladder": {"prefill": [], "decode": []}, "num_sleepers": 1}),
    ],
    ids=["disaggregated", "semi_pd"],
)
def test_fp8_weights_and_kv_give_right_answers_in_every_mode(mode: str, options: dict[str, Any]) -> None:
    """In chunks, then with prefixes from the cache, in semi-PD behind a rotation; unit/engine/test_fp8.py has the rest.

    Answers that are all right differ in no token.
    """
    rng = random.Random(5)
    questions = [language.recall_question(rng, num_pairs) for num_pairs in (3, 12, 20, 30)]
    settings = SETTINGS | {"quantization": "fp8", "kv_cache_dtype": "fp8", "dtype": "float32"} | options
    with LLM(DEMO, mode=mode, **settings) as llm:
        assert share_right(llm, questions) == 1
        if mode == "semi_pd":
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
