"""Benchmarks: the workload is nano-vllm's, the floor is right, and a run reports all that it did."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hbserve.bench.arguments import find_model
from hbserve.bench.floor import ModelCost, compute_floor
from hbserve.bench.offline import OfflineOptions, add_arguments
from hbserve.bench.request_batch import PRESETS, LengthRange, RequestBatch
from hbserve.errors import ConfigError, InvalidRequestError
from hbserve.model_source import SHAPES
from hbserve.model_spec import ModelSpec
from hbserve.models.weights import WeightTable
from hbserve.rope_spec import RopeSpec
from hbserve.weight_format import Fp8KV, on_load
from tests.support.model_zoo import VOCAB_SIZE, save_model

PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "glm-4.5-air": 106_852_245_504 + 45 * 128,  # biases of routers, which are not counted
    "gemma-3-12b": 11_766_034_176,
    "phi-4": 14_659_507_200,
}
"""As their publishers count them."""


def options(*arguments: str) -> OfflineOptions:
    """What the command line makes of the arguments."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return OfflineOptions.from_arguments(parser.parse_args(arguments))


def tiny_spec(window: int | None = None) -> ModelSpec:
    """Two layers, the second one with the window, in numbers for mental arithmetic."""
    return ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=10,
        hidden_size=4,
        intermediate_size=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        norm_eps=1e-6,
        max_position_embeddings=64,
        ropes=(RopeSpec(theta=1e4, kind="default"),) * 2,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        tied_embeddings=True,
        sliding_windows=(None, window),
        dtype=torch.bfloat16,
    )


def test_the_nano_workload_is_nano_vllms() -> None:
    # Its bench.py: seed(0); 256 times randint(100, 1024) and as many times randint(0, 10000); then 256 times
    # randint(100, 1024). The numbers below are what those lines draw.
    workload = RequestBatch.draw(PRESETS["nano"], seed=0, vocab_size=151_936)
    assert len(workload.prompts) == len(workload.output_lens) == 256
    assert workload.input_lens[:5] == [964, 724, 484, 508, 316]
    assert workload.prompts[0][:5] == [6311, 6890, 663, 4242, 8376]
    assert workload.output_lens[:5] == [845, 312, 607, 843, 500]
    assert (workload.num_prompt_tokens, workload.num_output_tokens) == (142_827, 133_966)


def test_a_small_vocabulary_changes_no_length() -> None:
    large, small = (RequestBatch.draw(PRESETS["nano"], 0, vocab_size) for vocab_size in (151_936, VOCAB_SIZE))
    assert (small.input_lens, small.output_lens) == (large.input_lens, large.output_lens)
    assert small.prompts[0] == [token % VOCAB_SIZE for token in large.prompts[0]]


def test_fresh_tokens_keep_the_lengths() -> None:
    workload = RequestBatch.draw(PRESETS["nano"], 0, VOCAB_SIZE)
    fresh = workload.with_fresh_tokens("1")
    assert (fresh.input_lens, fresh.output_lens) == (workload.input_lens, workload.output_lens)
    assert all(new[:16] != old[:16] for new, old in zip(fresh.prompts, workload.prompts, strict=True))
    assert all(0 <= token < VOCAB_SIZE for prompt in fresh.prompts for token in prompt)
    assert fresh == workload.with_fresh_tokens("1")
    assert fresh != workload.with_fresh_tokens("2")


def test_length_ranges() -> None:
    assert LengthRange.parse("100:1024") == LengthRange(100, 1024)
    assert LengthRange.parse("7") == LengthRange(7, 7)
    for text in ("", "0:3", "5:4", "a:b", "-1:4", "1:2:3", "1.5"):
        with pytest.raises(ValueError, match="no range of lengths"):
            LengthRange.parse(text)


@pytest.mark.parametrize(("name", "num_parameters"), PARAMETERS.items())
def test_shapes_have_the_published_sizes(name: str, num_parameters: int) -> None:
    spec = ModelSpec.load(find_model(name))
    table = WeightTable.build(spec, spec.dtype)
    sizes = {entry.offset: math.prod(entry.shape) for entry in table.entries.values()}  # a tied matrix lies once
    assert sum(sizes.values()) == num_parameters
    assert spec.dtype == torch.bfloat16
    # a step reads all of it but norms, and of an embedding of its own only rows
    embedding = 0 if spec.tied_embeddings else spec.vocab_size * spec.hidden_size
    read = ModelCost(spec, itemsize=2).weight_bytes(num_tokens=10_000) / 2
    assert 0.9997 < read / (num_parameters - embedding) < 1


def test_all_shapes_are_tested() -> None:
    assert {path.name for path in SHAPES.iterdir()} == set(PARAMETERS)


def test_a_step_reads_the_experts_that_its_tokens_need() -> None:
    spec = ModelSpec.load(find_model("qwen3-30b-a3b"))
    expert = 3 * 2048 * 768 * 2 * 48
    cost, skewed = ModelCost(spec, itemsize=2), ModelCost(spec, itemsize=2, expert_skew=1.0)
    assert cost.weight_bytes(1) - cost.weight_bytes(0) == 8 * expert
    assert cost.weight_bytes(2) - cost.weight_bytes(0) == round((16 - 8 * 8 / 128) * expert)
    assert cost.weight_bytes(1000) - cost.weight_bytes(0) == pytest.approx(128 * expert)
    in_fp8 = ModelCost(ModelSpec.load(find_model("qwen3-30b-a3b"), "fp8"), itemsize=2)
    assert in_fp8.weight_bytes(1) - in_fp8.weight_bytes(0) == 4 * expert
    assert skewed.weight_bytes(1) == pytest.approx(cost.weight_bytes(1))
    assert skewed.weight_bytes(32) < 0.9 * cost.weight_bytes(32)


def test_floor_by_hand() -> None:
    # A layer: q and o 4x4 each, k and v 4x2 each, three 4x8: 48 + 96 = 144 parameters; two: 288; LM head: 40.
    cost = ModelCost(tiny_spec(), itemsize=2)
    assert cost.weight_bytes(1) == cost.weight_bytes(9) == 2 * (288 + 40)
    assert cost.token_flops + cost.head_flops == 2 * (288 + 40)
    # A key: k and v of 2 elements of 2 bytes; scores and sums of 2 heads of 2 elements, 2 FLOPs each. Two layers.
    assert cost.kv_bytes(5) == 2 * 5 * 8
    assert cost.attention_flops(5) == 2 * 5 * 16
    # A prompt of 3 has 1 + 2 + 3 pairs of query and key in each layer.
    assert cost.prompt_flops(3) == 3 * 576 + 2 * 6 * 16 + 80 == 2000
    assert cost.prompt_flops(1) == 576 + 2 * 1 * 16 + 80 == 688

    # Prompts of 3 and 1, outputs of 3 and 2: step 1 has contexts 4 and 2, step 2 has 5.
    def floor(copy_bytes_per_s: float, matmul_flops_per_s: float) -> Any:
        return compute_floor(cost, [3, 1], [3, 2], copy_bytes_per_s, matmul_flops_per_s)

    by_compute = floor(1e6, 1e3)
    assert by_compute.prefill_s == pytest.approx(2.688)
    assert by_compute.decode_s == pytest.approx((2 * 656 + 6 * 32 + 656 + 5 * 32) / 1e3)
    by_memory = floor(1e3, 1e6)
    assert by_memory.prefill_s == pytest.approx(0.656)
    assert by_memory.decode_s == pytest.approx((656 + 6 * 16 + 656 + 5 * 16) / 1e3)
    assert by_memory.seconds == by_memory.prefill_s + by_memory.decode_s
    # the first step is bound by compute (1504 > 752 + 100), the second by memory
    assert floor(1e3, 1.9e3).decode_s == pytest.approx(1504 / 1.9e3 + 736 / 1e3)
    assert (by_memory.decode_steps, by_memory.weight_bytes, by_memory.kv_bytes) == (2, 1312, 176)
    assert by_memory.flops == 2688 + 1504 + 816
    assert compute_floor(cost, [3], [1], 1e3, 1e3).decode_s == 0


def test_floor_counts_the_bytes_that_fp8_has() -> None:
    cost = ModelCost(replace(tiny_spec(), weight_format=on_load(), kv_format=Fp8KV()), itemsize=2)
    assert cost.weight_bytes(1) == 288 + 2 * 40  # the LM head stays as it is
    assert cost.kv_bytes(5) == 2 * 5 * 4
    mlp = on_load("model.layers.1.mlp")  # stays in bfloat16
    assert ModelCost(replace(tiny_spec(), weight_format=mlp), itemsize=2).weight_bytes(1) == 288 + 2 * 40 + 96


def test_floor_with_a_sliding_window() -> None:
    cost = ModelCost(tiny_spec(window=2), itemsize=2)
    assert cost.kv_bytes(1) == (1 + 1) * 8
    assert cost.kv_bytes(5) == (5 + 2) * 8
    assert cost.prompt_flops(4) == 4 * 576 + (10 + 1 + 2 + 2 + 2) * 16 + 80


def test_floor_of_the_nano_workload() -> None:
    spec = ModelSpec.load(find_model("qwen3-0.6b"))
    workload = RequestBatch.draw(PRESETS["nano"], 0, spec.vocab_size)
    floor = compute_floor(ModelCost(spec, 2), workload.input_lens, workload.output_lens, 4.28e12, 780e12)
    assert floor.decode_steps == max(workload.output_lens) - 1
    assert floor.kv_bytes == sum(  # a KV entry of 28 layers, 8 heads of 128 elements takes 114688 bytes
        114_688 * (p * (n - 1) + n * (n - 1) // 2)
        for p, n in zip(workload.input_lens, workload.output_lens, strict=True)
    )
    assert floor.decode_s == pytest.approx((floor.kv_bytes + floor.weight_bytes) / 4.28e12)
    assert 3 < floor.seconds < 4


def test_arguments_are_honoured_or_refused(tmp_path: Path) -> None:
    given = options("--preset", "prefill", "--num-seqs", "2", "--chunk-size", "64", "--no-cuda-graph")
    assert (given.shape.num_seqs, str(given.shape.input_len), str(given.shape.output_len)) == (2, "4096:4096", "1:1")
    config = given.engine_config()
    assert (config.mode, config.model.load_format) == ("unified", "dummy")
    assert (config.chunked_prefill.chunk_size, config.cuda_graph.enabled) == (64, False)
    assert options("--engine-arg", "seed=3").engine_config().model.seed == 3
    with pytest.raises(ConfigError, match=r"qwen3-99b.*qwen3-0\.6b"):
        options("--model", "qwen3-99b")
    with pytest.raises(ConfigError, match="did you mean 'num_blocks'"):
        options("--engine-arg", "num_block=3").engine_config()
    with pytest.raises(ConfigError, match="mode is given twice"):
        options("--mode", "unified", "--engine-arg", "mode=disaggregated")
    with pytest.raises(InvalidRequestError, match="temperature"):
        options("--temperature", "-1")
    with pytest.raises(ConfigError, match="no folder"):
        options("--json", str(tmp_path / "missing" / "out.json"))


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path) -> None:
    model, results = tmp_path / "tiny", tmp_path / "results.json"
    save_model(model, "qwen3")
    (model / "model.safetensors").unlink()
    command = f"""-m hbserve.bench offline --model {model} --mode disaggregated --device cpu --dtype float32
        --num-seqs 5 --input-len 20:40 --output-len 3:9 --repeats 2 --warmup --num-blocks 64 --max-num-seqs 4
        --engine-arg max_model_len=64 --json {results}"""
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert "median" in done.stdout

    document = json.loads(results.read_text())
    spec = ModelSpec.load(model)
    workload = RequestBatch.draw(
        options("--num-seqs", "5", "--input-len", "20:40", "--output-len", "3:9").shape, 0, 320
    )
    device = document["device"]
    assert (device["device"], device["dtype"]) == ("cpu", "float32")
    assert device["copy_gb_s"] > 0
    assert device["matmul_tflop_s"] > 0
    assert {"hbserve", "python", "torch"} <= set(document["versions"])
    assert document["workload"]["num_output_tokens"] == workload.num_output_tokens
    assert document["engine"]["model"]["load_format"] == "dummy"
    assert document["engine"]["model"]["max_model_len"] == 64
    assert document["engine"]["performance"]["max_num_seqs"] == 4
    floor = compute_floor(
        ModelCost(spec, 4),
        workload.input_lens,
        workload.output_lens,
        device["copy_gb_s"] * 1e9,
        device["matmul_tflop_s"] * 1e12,
    )
    assert document["floor"]["seconds"] == pytest.approx(floor.seconds)

    assert len(document["runs"]) == 2
    for run in document["runs"]:
        assert (run["num_prompt_tokens"], run["num_output_tokens"]) == (
            workload.num_prompt_tokens,
            workload.num_output_tokens,
        )
        assert (run["cached_prompt_tokens"], run["preemptions"]) == (0, 0)
        assert run["kv_transfer_bytes"] > 0
        assert run["output_tok_s"] == pytest.approx(workload.num_output_tokens / run["seconds"])
        assert run["total_tok_s"] == pytest.approx(run["prompt_tok_s"] + run["output_tok_s"])
        assert run["floor_share"] == pytest.approx(floor.seconds / run["seconds"])
        assert [work["role"] for work in run["instances"].values()] == ["prefill", "decode"]
        for work in run["instances"].values():
            assert work["steps"] > 0
            assert 0 < work["busy_s"] == pytest.approx(work["busy_share"] * run["seconds"])
            assert work["host_ms_per_step"] > 0  # on the CPU the step itself
    seconds = [run["seconds"] for run in document["runs"]]
    assert document["median"]["seconds"] == pytest.approx(sum(seconds) / 2)
