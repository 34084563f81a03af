"""The experiments in `benchmarks/`: they run on a CPU, and their results say what was measured."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import compare, fp8_engine, handover, kv_tier_steps, scheduler, scheduler_kills, transfer
from benchmarks.compared import ComparedSystem, can_share_instances, loads_of
from benchmarks.stream_load import StreamLoad
from hbserve.bench.request_record import RequestTargets
from hbserve.errors import ConfigError
from tests.support.model_zoo import save_model
from tests.support.paths import ROOT

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:48.6805900,12,0
2023-11-16 18:15:52.6805900,12,3
"""


@pytest.mark.slow
def test_the_hand_over_is_measured_in_whole_systems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path, "qwen3", max_position_embeddings=2048)
    parser = argparse.ArgumentParser()
    transfer.add_arguments(parser)
    command = f"""--model {tmp_path} --device cpu --backend no.such:Backend,shm --prompt-lens 33,80 --repeats 1
        --streams 2 --seconds 0.2 --engine-arg num_blocks=256 --engine-arg max_restarts=0 --json {tmp_path / "out"}"""
    handover.run(handover.options_from(parser.parse_args(command.split())))
    shown = capsys.readouterr().out
    assert "no.such:Backend: " in shown, "one that cannot start leaves the others"
    unified, shm = json.loads((tmp_path / "out").read_text())["systems"]
    assert (unified["name"], shm["name"]) == ("unified", "shm")
    block_bytes = 3 * 2 * 16 * 2 * 32 * 4  # layers, k and v, tokens, KV heads, head size, float32
    assert [alone["moved_bytes"] for alone in shm["alone"]] == [3 * block_bytes, 5 * block_bytes]
    for alone in shm["alone"]:
        assert alone["gb_per_s"] > 0
        assert 0 <= alone["exposed_ms"] < alone["ttft_ms"] + alone["second_ms"]
    assert shm["beside"]["num_prompts"] > 0
    assert min(shm["beside"][name] for name in ("alone_ms", "joined_ms", "beside_ms")) > 0


def test_steps_are_measured_beside_copies_of_a_tier(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3", max_position_embeddings=2048)
    parser = argparse.ArgumentParser()
    kv_tier_steps.add_arguments(parser)
    command = f"""--model {tmp_path} --device cpu --streams 2 --context 40 --chunk 16 --rate 0.05 --seconds 0.05
        --json {tmp_path / "out"}"""
    kv_tier_steps.run(parser.parse_args(command.split()))
    rows = json.loads((tmp_path / "out").read_text())
    assert {row["kind"] for row in rows} == {"off", "store", "load"}
    assert all((row["gb_s"] > 0) == (row["kind"] != "off") and row["steps"] > 0 for row in rows)


@pytest.mark.slow
def test_transfers_are_measured_beside_their_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    transfer.add_arguments(parser)
    command = f"""--device cpu --backend shm --block-bytes 4096 --transfer-blocks 1,8 --total-mib 1 --scatter
        --repeats 1 --json {tmp_path / "out"}"""
    transfer.run(parser.parse_args(command.split()))
    assert "shm on cpu, blocks of 4096 bytes, scattered" in capsys.readouterr().out
    lines = json.loads((tmp_path / "out").read_text())["lines"]
    assert [(line["transfer_bytes"], line["count"]) for line in lines] == [(4096, 256), (32768, 32)]
    assert min(min(line["gb_per_s"], line["library_gb_per_s"], line["one_transfer_s"]) for line in lines) > 0


@pytest.mark.parametrize(("option", "value"), [("--backend", "tape"), ("--transfer-blocks", "1,x"), ("--repeats", "0")])
def test_transfers_that_cannot_be(option: str, value: str) -> None:
    parser = argparse.ArgumentParser()
    transfer.add_arguments(parser)
    with pytest.raises(ConfigError, match=option):
        transfer.run(parser.parse_args([option, value]))


@pytest.mark.slow
def test_front_benchmark_measures_what_it_says(tmp_path: Path) -> None:
    model = ROOT / "examples" / "models" / "hbserve-demo"
    command = [sys.executable, "-m", "benchmarks", "front", "--model", str(model), "--open-streams", "0"]
    command += ["--streams", "8", "--tokens", "6", "--step-ms", "1", "--requests", "20"]
    command += ["--json", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "out").read_text())
    assert numbers["streamed_tokens_per_s"] > 0
    assert numbers["requests_per_s"] > 0
    assert 0 < numbers["ttft_p50_ms"] <= numbers["ttft_p95_ms"]
    assert "requests_per_s" in done.stdout


@pytest.mark.slow
def test_the_death_of_the_scheduler_is_measured(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    parser = argparse.ArgumentParser()
    scheduler_kills.add_arguments(parser)
    command = f"--model {tmp_path} --modes unified --kills 1 --streams 2 --tokens 40 --json {tmp_path / 'out'}"
    scheduler_kills.run(parser.parse_args(command.split()))
    result = json.loads((tmp_path / "out").read_text())["unified"]
    assert (result["kills"], result["problems"]) == (1, {})
    parts = {name: values[0] for name, values in result["seconds"].items()}
    assert min(parts.values()) > 0
    assert parts["whole_s"] == pytest.approx(parts["process_s"] + parts["hello_s"] + parts["recompute_s"])


def test_gaps_of_streams_in_a_window() -> None:
    load = StreamLoad(SimpleNamespace(engine=SimpleNamespace(max_model_len=64)), 3, context=8)  # type: ignore[arg-type]
    load.token_times = {0: [[1.0, 3.0, 4.0, 4.5], [5.0, 9.0]], 1: [[0.5, 1.0, 2.0]], 2: [[]]}
    window = load.window(2.0, 7.0)
    assert window.tokens_per_s == 1.0
    assert window.starting.sorted_ms.tolist() == [2000.0, 2000.0]  # to 3.0, and from 5.0 to the end at least
    assert window.running.sorted_ms.tolist() == [500.0, 1000.0, 1000.0, 5000.0]


def comparison(folder: Path, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    trace = folder / "azure.csv"
    trace.write_text(AZURE)
    fixed = ["--model", "qwen3-8b", "--trace", str(trace), "--slo-scale", "7.5:10", "--json", str(folder / "c.json")]
    return parser.parse_args([*fixed, *arguments])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--system", "slo@80-50"], "the first one is measured for the targets"),
        (["--system", "unified", "--json", "/nowhere/at/all.json"], "there is no folder"),
        (["--system", "unified", "--rates", "1", "--rates", "2,3"], "once for each --trace"),
        (["--system", "unified,chunk_size"], "'chunk_size' in .* is not KEY=VALUE"),
    ],
)
def test_comparisons_that_cannot_be(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        compare.run(comparison(tmp_path, *arguments))


def test_no_two_loads_have_prompts_that_begin_alike(tmp_path: Path) -> None:
    arguments = comparison(tmp_path, "--system", "unified", "--trace", "code", "--duration", "2", "--rates", "2")
    loads = loads_of(arguments, 1000)
    firsts = [load.source.workload(2.0, load.seed) for load in loads]
    assert len({tuple(run.prompt(run.requests[0])[:8]) for run in firsts}) == len(loads) == 2


def test_compared_systems_become_configurations(tmp_path: Path) -> None:
    arguments = comparison(tmp_path, "--system", "unified@1536", "--rungs", '{"prefill":[100,60],"decode":[100]}')
    systems = {
        text: ComparedSystem.parse(text) for text in ("unified@1536", "semi_pd@60-100", "no_ladder@60-40", "slo@80-100")
    }
    both = compare.Comparison(arguments, list(systems.values()))
    targets = RequestTargets(ttft_ms=172.0, tpot_ms=43.0)
    configs = {name: both.config_of(system, targets).freeze() for name, system in systems.items()}
    assert configs["unified@1536"].chunked_prefill.max_chunk_prefill_tokens == 1536
    assert configs["unified@1536"].performance.max_num_batched_tokens >= 1536 + 256
    assert configs["semi_pd@60-100"].semi_pd.ladder.prefill == (100,)
    assert configs["no_ladder@60-40"].semi_pd.ladder.prefill == ()
    slo = configs["slo@80-100"].semi_pd
    assert slo.ladder.prefill == (100, 60)
    assert slo.slo is not None
    assert slo.slo.ttft_target_ms == 172.0
    assert slo.slo.tpot_percentile == pytest.approx(90.0)
    for name, roles in (
        ("1p1d", ["prefill", "decode"]),
        ("unified*2", ["unified"] * 2),
        ("slo@80-100*2", ["semi_pd"] * 2),
    ):
        instances = both.config_of(ComparedSystem.parse(name), targets).freeze().gpu_instances
        assert [(i.instance_type.value, i.gpu_id) for i in instances] == list(zip(roles, (0, 1), strict=True))
    plain, first_come = (
        both.config_of(ComparedSystem.parse(text), None).freeze()
        for text in ("unified", "unified@2048,scheduling_policy=fcfs,max_num_batched_tokens=2048")
    )
    assert (first_come.scheduler.policy, first_come.performance.max_num_batched_tokens) == ("fcfs", 2048)
    assert can_share_instances(plain, first_come)
    assert not can_share_instances(first_come, plain)  # its instances are ready for steps of 2048 tokens only
    assert not can_share_instances(plain, configs["semi_pd@60-100"])
    with pytest.raises(ConfigError, match="the first system has failed"):
        both.config_of(systems["slo@80-100"], None)


def test_the_cost_of_the_schedulers_core_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    scheduler.add_arguments(parser)
    model = str(ROOT / "examples" / "models" / "hbserve-demo")
    scheduler.run(parser.parse_args(["--model", model, "--batch", "1", "3", "--steps", "3", "--rounds", "2"]))
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["batch", "step", "plan", "result"]
    for line, batch in zip(lines, (1, 3), strict=True):
        size, step, plan, result = map(float, line.split())
        assert size == batch
        assert 0 < plan + result < step


@pytest.mark.slow
def test_fp8_engines_are_measured_beside_their_floor(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3", max_position_embeddings=2048)
    parser = argparse.ArgumentParser()
    fp8_engine.add_arguments(parser)
    command = f"""--model {tmp_path} --device cpu --engines fp8 --batches one-stream --repeats 1 --num-blocks 100
        --json {tmp_path / "out"}"""
    fp8_engine.run(parser.parse_args(command.split()))
    found = json.loads((tmp_path / "out").read_text())["engines"]["fp8"]
    assert found["kv_tokens"] == 1600
    batch = found["batches"]["one-stream"]
    assert (batch["runs"][0]["num_prompt_tokens"], batch["runs"][0]["num_output_tokens"]) == (512, 256)
    assert 0 < batch["median"]["floor_share"] < 1
