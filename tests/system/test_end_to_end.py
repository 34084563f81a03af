"""The demo model through every mode: answers that prove that the KV cache arrived intact."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest

from hbserve import LLM, SamplingParams
from hbserve.semi_pd.process_rotation_manager import SMAllocation
from tests.support.engines import assert_no_leaks, needs_mooncake
from tests.support.paths import ROOT

DEMO = str(ROOT / "examples" / "models" / "hbserve-demo")
sys.path.insert(0, str(ROOT / "examples"))

import demo_language as language  # noqa: E402

GREEDY = SamplingParams(temperature=0, max_tokens=64)
NUM_PAIRS = 60
DEADLINE_S = 120.0
MAX_ROUNDS = 8
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


def test_recall_of_held_out_pairs_behind_a_transfer() -> None:
    with LLM(DEMO, mode="disaggregated", dtype="float32", **SETTINGS) as llm:
        assert share_right(llm, recall_questions(20)) >= 0.95
        assert share_right(llm, recall_questions(20, position=10)) >= 0.95
        assert_no_leaks(llm)


SEMI_PD: dict[str, Any] = {"prefill_percentage": 60, "ladder": {"prefill": [], "decode": []}, "num_sleepers": 1}
FP8: dict[str, dict[str, Any]] = {
    "weights": {"quantization": "fp8"},
    "kv": {"kv_cache_dtype": "fp8"},
    "both": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
}
SYSTEMS: dict[str, dict[str, Any]] = {
    "unified": {"mode": "unified"},
    "shm": {"mode": "disaggregated", "kv_transfer_backend": "shm", "dtype": "bfloat16"},
    "gloo": {"mode": "disaggregated", "kv_transfer_backend": "nccl"},
    "mooncake": {"mode": "disaggregated", "kv_transfer_backend": "mooncake"},
    "semi_pd": {"mode": "semi_pd", **SEMI_PD},
}


@pytest.mark.parametrize("in_fp8", FP8)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[needs_mooncake] if name == "mooncake" else []) for name in SYSTEMS]
)
def test_fp8_answers_are_right_in_every_mode(name: str, in_fp8: str) -> None:
    """Chunks, transfers, preemption, then a prefix from the cache, with semi-PD behind a rotation.

    There is one right answer to a question, so all modes have the same tokens.
    """
    rng = random.Random(5)
    questions = [language.copy_question(rng, 14) for _ in range(6)]
    questions += [language.recall_question(rng, num_pairs) for num_pairs in (3, 20, 30)]
    settings = SETTINGS | {"num_blocks": 18, "max_model_len": 256, "decode_headroom_tokens": 0}
    with LLM(DEMO, **settings, **SYSTEMS[name], **FP8[in_fp8]) as llm:
        assert share_right(llm, questions) == 1
        for manager in llm.supervisors.values():
            assert manager.request_sm_reallocation(SMAllocation(80, 100))
            assert manager.wait_until_settled(DEADLINE_S)
        for _ in range(MAX_ROUNDS):  # which requests are there at the same time depends on the host
            assert share_right(llm, questions[-2:] * 2) == 1
            stats = llm.get_system_stats()
            counts = stats["cpu_scheduler"]
            if counts["preemptions"] and counts["cached_prompt_tokens"]:
                break
            assert share_right(llm, questions) == 1
        assert counts["preemptions"] > 0
        assert counts["cached_prompt_tokens"] > 0
        for instance in stats["gpu_instances"].values():
            formats = instance["formats"]
            assert (formats["weights"] == "fp8-channel") == ("quantization" in FP8[in_fp8])
            assert (formats["kv_cache_dtype"] == "float8_e4m3fn") == ("kv_cache_dtype" in FP8[in_fp8])
        assert_no_leaks(llm)


@pytest.mark.parametrize("mode", ["unified", "shm", "semi_pd"])
def test_fp8_answers_are_right_with_tiers_and_drafts(mode: str) -> None:
    """A pool of one sequence, so what comes again comes from the tier; the copies are drafted with success."""
    rng = random.Random(5)
    questions = [language.copy_question(rng, 14) for _ in range(4)]
    questions += [language.recall_question(rng, 30) for _ in range(3)]
    options = {
        "num_blocks": 16,
        "max_model_len": 256,
        "host_bytes": 4 << 20,
        "scheduler": "tests.support.always_loads:AlwaysLoads",
        "speculation_method": "ngram",
    }
    with LLM(DEMO, **SETTINGS | options, **SYSTEMS[mode], **FP8["both"]) as llm:
        for _ in range(2):
            for question in questions:  # one after the other, so that each takes the pool of the one before
                assert share_right(llm, [question]) == 1
        stats = llm.get_system_stats()
        assert stats["kv_tiers"]["host"]["loaded_blocks"] > 0
        assert sum(counts["accepted_tokens"] for counts in stats["cpu_scheduler"]["speculation"].values()) > 0
        assert_no_leaks(llm)


def test_a_corrupted_block_shows_in_the_answers() -> None:
    # About the tenth pair stands in the third block of 16 tokens.
    questions = recall_questions(20, position=10)  # which an intact system answers, see above
    backend = "tests.support.faulty_transfers:WipesThirdBlock"
    with LLM(DEMO, mode="disaggregated", dtype="float32", kv_transfer_backend=backend, **SETTINGS) as llm:
        corrupted = share_right(llm, questions)
    assert corrupted <= 0.5
