"""Mode `auto`: what it chooses on a machine, with which targets, and how it says why."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from hbserve import PdDisaggConfig
from hbserve.config import Config, from_dict
from hbserve.config.flat import PdDisaggConfig as Flat
from hbserve.errors import ConfigError
from hbserve.messages.prediction import CandidatePrediction, PredictionOrders
from hbserve.model_source import SHAPES
from hbserve.policy.learnt_points import SOURCE
from hbserve.policy.profile_file import BUILT_IN, load_profile, profiled_predictor, save_profile
from hbserve.policy.profile_store import BUILT_IN_SHAPE, FoundProfile, ModelShape, ProfileKey, find_profile
from hbserve.policy.step_time_predictor import StepWork
from hbserve.simulate.prediction import predict
from hbserve.simulate.standard_loads import LOADS, MEAN_LENGTHS, standard_load, standard_trace
from hbserve.system.auto_plan import PREDICTION_ERRORS, Plan, PredictionProcess, choose, machine_targets
from tests.support.paths import ROOT

H200 = "NVIDIA H200"


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a machine's answer in the place of nvidia-smi's: memory used of each GPU, in percent."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("HBSERVE_CACHE", str(tmp_path / "cache"))

    def set_gpus(*used: int, name: str = H200) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        names, memory = "\n".join([name] * len(used)), "\n".join(f"{1000 * part}, 100000" for part in used)
        script = f'#!/bin/sh\ncase "$1" in *memory*) echo "{memory}";; *) echo "{names}";; esac\n'
        (folder / "nvidia-smi").write_text(script)
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return set_gpus


def config(model: Path = SHAPES / "qwen3-8b", ranks: int = 1, **sections: object) -> Config:
    return from_dict({"model": {"path": str(model), "tensor_parallel_size": ranks}} | sections)


def found(model: Path, gpu: str, ranks: int = 1, **arguments: object) -> FoundProfile:
    given = config(model, ranks, **arguments)
    return find_profile(ProfileKey.of(given.model, given.kv_cache, gpu))


def test_predictions_are_trusted_as_far_as_measured_runs_say() -> None:
    """`python -m benchmarks agreement --json docs/results/agreement.json` writes the distances."""
    distances = json.loads((ROOT / "docs" / "results" / "agreement.json").read_text())["distances"]
    assert {kind: round(distances[kind], 3) for kind in PREDICTION_ERRORS} == PREDICTION_ERRORS


class Predictions:
    """Predictions of a given mean attainment, and the orders that asked for them."""

    def __init__(self, **means: float) -> None:
        self.means = {name.replace("_x", "*"): mean for name, mean in means.items()}
        self.orders: PredictionOrders | None = None

    def __call__(self, orders: PredictionOrders) -> list[CandidatePrediction]:
        self.orders = orders
        means = {name: self.means.get(name, 0.3) for name in orders.candidates}
        return [CandidatePrediction(system=s, attainment={"chat": m, "code": m}, bound={}) for s, m in means.items()]


def roles(config: Config) -> list[tuple[str, str, int]]:
    return [(i.instance_id, i.instance_type.value, i.gpu_id) for i in config.gpu_instances]


def test_without_a_gpu_one_unified_worker_serves_without_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    chosen, plan = choose(config())
    assert (chosen.mode, roles(chosen)) == ("unified", [("unified-0", "unified", 0)])
    assert chosen.scheduler.ttft_ms is None
    assert "CPU" in plan.why
    assert plan.targets.source == "none: there is no profile of this machine"


def test_one_gpu_gets_one_unified_worker_and_the_targets_of_the_machine(gpus: Callable[..., None]) -> None:
    gpus(0)
    predictions = Predictions(unified=0.9)
    chosen, plan = choose(config(), predictions)
    assert (chosen.mode, roles(chosen)) == ("unified", [("unified-0", "unified", 0)])
    assert plan.runner_up == "slo@80-100+mixed"
    assert "90.0 %" in plan.why
    assert "30.0 %" in plan.why
    steps = profiled_predictor()
    lone_ms = 1000 * steps.seconds(StepWork(1, 1024))
    given = chosen.scheduler
    assert given.tpot_ms == pytest.approx(10 * lone_ms, abs=0.1)
    assert given.ttft_ms == pytest.approx(20 * lone_ms, abs=0.1)
    lone_prompt_ms = 1000 * steps.seconds(StepWork(0, 0, 8192, 8192**2 / 2))
    assert given.ttft_ms_per_1k_tokens == pytest.approx(7.5 * lone_prompt_ms / 8.192, abs=0.1)
    assert predictions.orders is not None
    assert predictions.orders.tpot_ms == given.tpot_ms
    assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(plan)), Plan) == plan


def test_another_system_is_taken_only_if_it_gains_more_than_its_predictions_are_off(
    gpus: Callable[..., None],
) -> None:
    gpus(0, 0)
    error = PREDICTION_ERRORS["disaggregated"] + 0.03
    for gain, mode in ((error - 0.01, "unified"), (error + 0.01, "disaggregated")):
        chosen, plan = choose(config(), Predictions(unified_x2=0.4, **{"1p1d": 0.4 + gain}))
        assert chosen.mode == mode
        assert plan.runner_up == ("1p1d" if mode == "unified" else "unified*2")
        assert [row["system"] for row in plan.predictions] == ["1p1d", "unified*2"]
    assert roles(chosen) == [("prefill-0", "prefill", 0), ("decode-0", "decode", 1)]
    gpus(0)
    chosen, _ = choose(config(), Predictions(unified=0.5, **{"slo@80-100+mixed": 0.6}))
    assert (chosen.mode, roles(chosen)) == ("semi_pd", [("semi-0", "semi_pd", 0)])
    assert chosen.semi_pd.slo is not None
    assert chosen.semi_pd.mixed
    assert chosen.semi_pd.slo.tpot_target_ms == chosen.scheduler.tpot_ms
    assert chosen.semi_pd.slo.ttft_target_ms == chosen.scheduler.ttft_target_ms(2000)


def test_a_guessed_profile_is_no_reason_to_leave_the_default(gpus: Callable[..., None]) -> None:
    gpus(0, 0, name="Another GPU")
    chosen, plan = choose(config(), Predictions(unified_x2=0.1, **{"1p1d": 1.0}))
    assert chosen.mode == "unified"
    assert "there is none" in plan.why


def test_gpus_that_others_use_are_left_alone(gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0, 80, 3, 0)
    chosen, _ = choose(config(), Predictions())
    assert [gpu for _, _, gpu in roles(chosen)] == [0, 2, 3]
    assert chosen.performance.placement == "prefix_aware"
    chosen, _ = choose(config(ranks=2), Predictions())
    assert [gpu for _, _, gpu in roles(chosen)] == [2]
    gpus(50, 50)
    chosen, _ = choose(config(), Predictions())
    assert [gpu for _, _, gpu in roles(chosen)] == [0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    chosen, _ = choose(config(), Predictions())
    assert len(chosen.gpu_instances) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CPU" in choose(config())[1].why
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    places = [{"instance_id": f"unified-{i}", "instance_type": "unified", "gpu_id": i + 4} for i in range(2)]
    chosen, _ = choose(config(mode="auto", gpu_instances=places), Predictions(**{"1p1d": 0.9}))
    assert roles(chosen) == [("prefill-0", "prefill", 4), ("decode-0", "decode", 5)]


def test_a_large_model_gets_as_many_gpus_as_its_weights_need(gpus: Callable[..., None]) -> None:
    gpus(0, 0, 0, 0)  # of 105 GB each
    large = {"model": {"path": str(SHAPES / "llama-3.1-70b"), "load_format": "dummy"}}  # 141 GB in bfloat16
    chosen, _ = choose(from_dict(large), Predictions())
    assert [(i.gpu_id, i.tensor_parallel_size) for i in chosen.gpu_instances] == [(0, 2), (2, 2)]
    gpus(0)
    with pytest.raises(ConfigError, match=r"take 141\.1 GB.* need 2 GPUs, and there are 1"):
        choose(from_dict(large), Predictions())
    fp8 = {"model": large["model"] | {"quantization": "fp8"}}
    assert choose(from_dict(fp8), Predictions())[0].model.tensor_parallel_size == 1
    assert choose(from_dict(large | {"mode": "unified"}))[0].gpu_instances[0].tensor_parallel_size == 1


def test_configured_modes_and_targets_stay(gpus: Callable[..., None]) -> None:
    gpus(0, 0)
    given = config(mode="unified", scheduler={"ttft_ms": 300})
    chosen, plan = choose(given)
    assert chosen == given
    assert plan.targets.source == "the configuration"
    chosen, _ = choose(config(mode="unified"))
    assert chosen.scheduler.tpot_ms is not None  # nobody gave one
    chosen, plan = choose(config(scheduler={"targets_by_default": False}), Predictions())
    assert (chosen.scheduler.ttft_ms, chosen.scheduler.tpot_ms) == (None, None)
    slo = {"slo": {"ttft_target_ms": 500, "tpot_target_ms": 50}}
    chosen, plan = choose(given := config(mode="semi_pd", semi_pd=slo))
    assert chosen == given
    assert (plan.targets.ttft_ms, plan.targets.tpot_ms) == (500, 50)
    gpus(0)
    _, plan = choose(config(scheduler={"targets_by_default": False}), Predictions())
    assert plan.runner_up is None  # the controller cannot do without targets
    in_python = Flat.from_arguments(str(SHAPES / "qwen3-8b"), mode="unified").freeze()
    assert choose(in_python)[0] == in_python
    in_python = PdDisaggConfig(str(SHAPES / "qwen3-8b"), mode="auto").freeze()
    assert choose(in_python, Predictions())[0].scheduler.tpot_ms is not None


@pytest.mark.parametrize("mode", ["unified", "disaggregated", "semi_pd"])
def test_predictions_start_from_the_profile_of_model_and_gpu(gpus: Callable[..., None], mode: str) -> None:
    gpus(0)
    assert choose(config(mode=mode), Predictions())[1].profile_path == str(BUILT_IN)
    gpus(0, name="another GPU")
    _, plan = choose(config(mode=mode), Predictions())
    assert plan.profile_path is None, "a guess: step times are learnt"
    assert plan.profile is not None
    shape = ModelShape.read(SHAPES / "qwen3-8b")
    assert shape is not None
    own = ProfileKey(shape, "another GPU", "bfloat16").path
    own.parent.mkdir(parents=True)
    own.write_bytes(BUILT_IN.read_bytes())
    assert choose(config(mode=mode), Predictions())[1].profile_path == str(own)


def test_a_start_that_is_given_up_waits_for_no_predictions(gpus: Callable[..., None]) -> None:
    gpus(0)
    prediction = PredictionProcess()
    prediction.stop()
    _, plan = choose(config(), prediction)
    assert plan.predictions == []


def test_a_child_process_predicts(gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hbserve.system.auto_plan._NUM_REQUESTS", 4)
    gpus(0)
    _, plan = choose(config())
    assert {row["system"] for row in plan.predictions} == {"unified", "slo@80-100+mixed"}
    assert all(set(row["attainment"]) == set(row["bound"]) == set(LOADS) for row in plan.predictions)


def test_without_predictions_the_first_candidate_is_taken(gpus: Callable[..., None]) -> None:
    gpus(0, 0)
    chosen, plan = choose(config(), lambda _: [])
    assert len(chosen.gpu_instances) == 2
    assert "no predictions" in plan.why


def test_fp8_has_profiles_of_its_own_and_until_then_one_derived_from_bfloat16(gpus: Callable[..., None]) -> None:
    gpus(0)
    eight = SHAPES / "qwen3-8b"
    fp8 = {"model": {"path": str(eight), "quantization": "fp8"}, "kv_cache": {"dtype": "fp8"}}
    given = from_dict(fp8 | {"mode": "unified"})
    key = ProfileKey.of(given.model, given.kv_cache, H200)
    assert key is not None
    assert key.path.name.endswith("_bfloat16_fp8-channel_kv-fp8_tp1_format2.json")
    derived = find_profile(key)
    assert (derived.origin, derived.is_measured) == ("derived", False)
    assert "shipped" in derived.source
    plain, steps = profiled_predictor(), profiled_predictor(derived.profile)
    for work, low, high in (
        (StepWork(1, 1024), 0.62, 0.72),  # the LM head is not quantised
        (StepWork(0, 0, 2048, 2048**2 / 2), 0.58, 0.66),
        (StepWork(64, 64 * 8192), 0.5, 0.65),  # mostly KV
    ):
        assert low < steps.seconds(work) / plain.seconds(work) < high
    _, plan = choose(from_dict(fp8), Predictions())
    assert plan.profile_origin == "derived"
    assert plan.learnt_profile is not None
    assert plan.learnt_profile.path == str(key.path)
    assert plan.profile_path is None, "the scheduler starts from no guess"
    key.path.parent.mkdir(parents=True)
    plan.learnt_profile.keep(msgspec.structs.replace(derived.profile, source=SOURCE))
    _, plan = choose(from_dict(fp8), Predictions())
    assert (plan.profile_origin, plan.profile_path, plan.learnt_profile) == ("learnt", str(key.path), None)
    assert found(eight, H200).origin == "shipped", "a profile of FP8 is none of bfloat16"
    assert choose(from_dict(fp8 | {"mode": "unified"}))[1].learnt_profile is None


def test_the_profile_is_the_users_own_a_shipped_or_a_scaled_one(
    gpus: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpus(0)
    eight, small = SHAPES / "qwen3-8b", SHAPES / "qwen3-0.6b"
    assert ModelShape.read(eight) == BUILT_IN_SHAPE
    assert found(eight, H200, 1).profile == load_profile(None)
    assert "shipped" in found(SHAPES / "llama-3.1-8b", H200, 1).source
    shipped = ROOT / "hbserve" / "policy" / "llama_3_1_8b_h200.json"
    assert load_profile(shipped) == load_profile(ROOT / "docs" / "results" / "profile_llama_3_1_8b_h200.json")
    scaled = found(small, H200, 1)
    assert not scaled.is_measured
    shape = ModelShape.read(small)
    assert shape is not None
    ratio = shape.num_parameters / BUILT_IN_SHAPE.num_parameters
    assert scaled.profile.steps[0].ms == pytest.approx(ratio * load_profile(None).steps[0].ms + (1 - ratio) * 0.7)
    targets = machine_targets(found(ROOT / "examples" / "models" / "hbserve-demo", H200, 1))
    assert targets.tpot_ms is not None
    assert targets.tpot_ms >= 7  # however small the model, a step has its host's part
    assert not found(eight, H200, 2).is_measured
    path = ProfileKey(shape, "Some GPU/2", "bfloat16").path
    path.parent.mkdir(parents=True)
    save_profile(load_profile(shipped), path)
    own = found(small, "Some GPU/2", 1)
    assert (own.path, own.is_measured, own.origin, own.learnt) == (path, True, "cache", None)
    path.write_text("{}")
    assert not found(small, "Some GPU/2", 1).is_measured  # and the log says why
    assert "ignored" in caplog.text
    save_profile(msgspec.structs.replace(load_profile(shipped), subject="another model on Some GPU/2"), path)
    assert not found(small, "Some GPU/2").is_measured
    assert "it is of another model" in caplog.text
    (tmp_path / "other").mkdir()
    assert "not known" in found(tmp_path / "other", H200, 1).source
    shutil.rmtree(tmp_path / "cache")


def test_the_simulator_predicts_what_candidates_serve() -> None:
    orders = PredictionOrders(
        profile=msgspec.to_builtins(load_profile(None)),
        candidates=["unified"],
        num_requests=12,
        ttft_ms=90.0,
        ttft_ms_per_1k_tokens=220.0,
        tpot_ms=43.0,
        max_num_seqs=256,
    )
    [found] = predict(orders)
    assert set(found.attainment) == set(LOADS)
    assert all(0.3 < share <= found.bound[load] for load, share in found.attainment.items())


@pytest.mark.parametrize("name", LOADS)
def test_standard_loads_have_the_lengths_and_rates_that_they_state(name: str) -> None:
    requests = standard_load(name, 5.0, 3000, seed=1)
    prompt, output = MEAN_LENGTHS[name]
    assert sum(r.prompt_tokens for r in requests) / 3000 == pytest.approx(prompt, rel=0.1)
    assert sum(r.output_tokens for r in requests) / 3000 == pytest.approx(output, rel=0.15)
    assert 3000 / requests[-1].arrival == pytest.approx(5.0, rel=0.1)
    seen: set[int] = set()
    shared = 0
    for request in requests:
        shared += 512 * sum(block in seen for block in request.prefix_blocks)
        seen.update(request.prefix_blocks)
    entries = standard_trace(name)
    assert all(not entry.block_ids or len(entry.block_ids) == -(-entry.input_len // 512) for entry in entries)
    share = shared / sum(request.prompt_tokens for request in requests)
    assert share == pytest.approx({"agents": 0.64}.get(name, 0.0), abs=0.04)
