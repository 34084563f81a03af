"""The profiler and the SLO controller on real processes: what is measured, and what moves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from hbserve import LLM, PdDisaggConfig, SamplingParams
from hbserve.errors import ConfigError
from hbserve.policy.profile_file import load_profile, profiled_predictor
from hbserve.policy.step_time_predictor import StepWork
from hbserve.profile import __main__ as profile
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager
from tests.support.engines import assert_no_leaks, random_prompt
from tests.support.model_zoo import save_model
from tests.support.paths import ROOT

DEADLINE_S = 90.0
DEMO_MODEL = ROOT / "examples" / "models" / "hbserve-demo"


def test_a_profile_of_the_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, picture = tmp_path / "profile.json", tmp_path / "profile.svg"
    arguments = ["--model", str(DEMO_MODEL), "--device", "cpu", "--seconds", "0.02", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["profile", *arguments, "--plot", str(picture)])
    assert profile.main() == 0
    measured = load_profile(out)
    assert measured.model == "hbserve-demo"
    assert {point.percentage for point in measured.prefill} == {100, 50}
    assert {(point.decode_rows, point.decode_context) for point in measured.decode} == {
        (1, 64),
        (1, 128),
        (8, 64),
        (8, 128),
    }
    assert {(p.prefill_percentage, p.decode_percentage) for p in measured.pairs} == {(50, 50), (100, 100)}
    assert all(point.priority for point in measured.pairs)
    assert measured.mixed
    assert profiled_predictor(measured).at(75).seconds(StepWork(0, 0, 100, 5000.0)) > 0
    assert picture.stat().st_size > 1000


def test_a_profile_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["profile", "--model", str(DEMO_MODEL), "--out", str(tmp_path / "no" / "p.json")])
    assert profile.main() == 1
    assert "there is no folder" in capsys.readouterr().err


def settings(model: Path, **slo: Any) -> dict[str, Any]:
    return {
        "model_path": str(model),
        "mode": "semi_pd",
        "device": "cpu",
        "dtype": "float32",
        "num_blocks": 400,
        "max_model_len": 640,
        "max_num_seqs": 32,
        "log_level": "WARNING",
        "prefill_percentage": 50,
        "decode_percentage": 50,
        "ladder": {"prefill": [100], "decode": [100], "unified": []},
        "slo": slo,
    }


def test_the_controller_moves_the_split_under_load(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    # No prompt can be that fast: the least harm is to give prefill more.
    slo = {"ttft_target_ms": 0.5, "tpot_target_ms": 20.0, "monitoring_interval_s": 0.3, "window_s": 2.0}
    slo["holds_back_decode"] = False  # with it the split would matter less
    prompts = [random_prompt(200, seed=seed) for seed in range(12)]
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    arguments = settings(tmp_path, cooldown_s=0.5, **slo)
    with LLM(arguments.pop("model_path"), **arguments) as llm:
        [manager] = llm.supervisors.values()
        assert isinstance(manager, ProcessRotationManager)
        first = [output["token_ids"] for output in llm.generate(prompts, sampling, use_tqdm=False)]
        deadline = time.monotonic() + DEADLINE_S
        while manager.get_status()["current_sm_allocation"]["prefill_percentage"] <= 50:
            assert time.monotonic() < deadline, manager.get_status()["slo"]
            again = [output["token_ids"] for output in llm.generate(prompts, sampling, use_tqdm=False)]
            assert again == first
        assert manager.wait_until_settled(DEADLINE_S)
        assert [output["token_ids"] for output in llm.generate(prompts, sampling, use_tqdm=False)] == first
        status = manager.get_status()["slo"]
        assert status["running"]
        assert status["statistics"]["total_adjustments"] >= 1
        moves = [decision for decision in status["decisions"] if decision["chosen"] != decision["current"]]
        assert moves[0]["current"] == [50, 50]
        assert moves[0]["chosen"][0] > 50
        assert moves[0]["violations"]["ttft"] > 1
        assert moves[0]["arrival_rate"] > 0
        assert_no_leaks(llm)


def test_decode_in_turns_gives_the_same_tokens(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    arguments = settings(tmp_path, ttft_target_ms=10_000, tpot_target_ms=30.0, monitoring_interval_s=60.0)
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompts = [random_prompt(300, seed=seed) for seed in range(10)]
    arguments |= {"chunk_size": 32, "max_chunk_prefill_tokens": 32, "scheduler": "tests.support.dawdler:Dawdler"}
    with LLM(arguments.pop("model_path"), **arguments) as llm:
        alone = [llm.generate([prompt], sampling, use_tqdm=False)[0]["token_ids"] for prompt in prompts]
        assert [output["token_ids"] for output in llm.generate(prompts, sampling, use_tqdm=False)] == alone
        assert_no_leaks(llm)


@pytest.mark.parametrize(
    ("slo", "key"),
    [
        ({"ttft_target_ms": 100}, "tpot_target_ms"),
        ({"ttft_target_ms": 100, "tpot_target_ms": -1}, "semi_pd.slo.tpot_target_ms"),
        (
            {"ttft_target_ms": 100, "tpot_target_ms": 50, "monitoring_interval_s": 0},
            "semi_pd.slo.monitoring_interval_s",
        ),
        ({"ttft_target_ms": 100, "tpot_target_ms": 50, "colour": 1}, "colour"),
    ],
)
def test_targets_that_cannot_be_are_refused_by_name(tmp_path: Path, slo: dict[str, Any], key: str) -> None:
    save_model(tmp_path, "qwen3")
    with pytest.raises(ConfigError, match=key):
        PdDisaggConfig(**settings(tmp_path, **slo)).freeze()


@pytest.mark.parametrize(
    ("key", "value", "complaint"), [("profile", "/no/ne.json", "ne.json"), ("window_s", 60, "1..30")]
)
def test_what_a_controller_cannot_do_is_refused_before_anything_starts(
    tmp_path: Path, key: str, value: Any, complaint: str
) -> None:
    save_model(tmp_path, "qwen3")
    slo = {"ttft_target_ms": 100, "tpot_target_ms": 50, key: value}
    with pytest.raises(ConfigError, match=complaint):
        ProcessRotationManager(PdDisaggConfig(**settings(tmp_path, **slo)))
