"""KV transfer between two GPUs: with every backend the tokens equal those of one GPU, and the metrics count bytes."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from hbserve import LLM, SamplingParams
from tests.support.engines import assert_no_leaks, greedy_reference, needs_mooncake, random_prompt
from tests.support.model_zoo import save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
Settings = dict[str, Any]
NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
SHM, NCCL, TCP, NVLINK = (
    {"kv_transfer_backend": "shm"},
    {"kv_transfer_backend": "nccl"},
    {"kv_transfer_backend": "mooncake", "kv_mooncake_protocol": "tcp"},
    {"kv_transfer_backend": "mooncake", "kv_mooncake_protocol": "nvlink"},
)
BACKENDS = [
    pytest.param(SHM, id="shm"),
    pytest.param(NCCL, id="nccl"),
    pytest.param(TCP, marks=needs_mooncake, id="mooncake-tcp"),
    pytest.param(NVLINK, marks=needs_mooncake, id="mooncake-nvlink"),
]
MAPPED = [BACKENDS[0], BACKENDS[3]]
IN_GROUPS: Settings = {
    "dtype": "float32",
    "max_model_len": 512,
    "num_blocks": 256,
    "chunk_size": 112,
    "kv_layer_group_bytes": 1 << 12,  # the last chunk of a prompt is sent in groups of layers
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = tmp_path_factory.mktemp("qwen3")
    return str(folder), save_model(Path(folder), "qwen3")


@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verified"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_gpus_give_the_tokens_of_transformers(model: tuple[str, Any], backend: Settings, verify: bool) -> None:
    prompts = [random_prompt(length, seed=length) for length in (1, 17, 100, 180, 300)]
    settings = IN_GROUPS | backend | {"log_level": "ERROR", "kv_verify": verify}
    with LLM(model[0], mode="disaggregated", device="cuda", **settings) as llm:
        outputs = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in prompts]
        outputs += llm.generate(prompts, GREEDY, use_tqdm=False)
        assert_no_leaks(llm)
        (link,) = llm.get_system_stats()["kv_transfer"]["links"].values()
    assert [o["token_ids"] for o in outputs] == [greedy_reference(model[1], p, NUM_TOKENS) for p in prompts] * 2
    assert link["transfers"] >= 16, "the last chunks leave in groups of layers"
    assert not link["failures"]


@pytest.mark.parametrize("backend", MAPPED)
def test_the_memory_of_a_dead_receiver_is_free_for_the_next(model: tuple[str, Any], backend: Settings) -> None:
    prompt = random_prompt(180, seed=1)
    expected = greedy_reference(model[1], prompt, NUM_TOKENS)
    settings: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "memory_fraction": 0.7, "log_level": "ERROR"}
    settings |= backend | {"cuda_graph_enabled": False, "enable_prefix_caching": False}
    with LLM(model[0], mode="disaggregated", device="cuda", **settings) as llm:
        sizes = []
        for _ in range(2):
            (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
            assert output["token_ids"] == expected
            decode = llm.get_system_stats()["gpu_instances"]["decode-0"]
            sizes.append(decode["kv_blocks"]["total"])
            os.kill(decode["pid"], signal.SIGKILL)
        assert sizes[1] > 0.9 * sizes[0]


@pytest.mark.parametrize("backend", MAPPED)
def test_blocks_that_a_stopped_sender_may_write_return_when_it_has_gone_on(
    model: tuple[str, Any], backend: Settings
) -> None:
    prompts = [random_prompt(180, seed=seed) for seed in range(4)]
    settings: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "num_blocks": 256, "log_level": "ERROR"}
    settings |= backend | {"cuda_graph_enabled": False, "enable_prefix_caching": False, "heartbeat_timeout_s": 1.0}
    with LLM(model[0], mode="disaggregated", device="cuda", **settings) as llm:
        llm.generate(prompts[0], GREEDY, use_tqdm=False)
        sender = llm.get_system_stats()["gpu_instances"]["prefill-0"]["pid"]
        going_on = threading.Timer(3.0, os.kill, (sender, signal.SIGCONT))
        going_on.start()
        os.kill(sender, signal.SIGSTOP)
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        going_on.join()
        assert [o["token_ids"] for o in outputs] == [greedy_reference(model[1], p, NUM_TOKENS) for p in prompts]
        assert_no_leaks(llm)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_are_split_anew_between_gpus(model: tuple[str, Any], backend: Settings) -> None:
    """Prefill and decode with one and with two ranks, so that heads move between GPUs and within one."""
    instances = [
        {"instance_id": f"{role}-{size}", "instance_type": role, "gpu_id": 0, "tensor_parallel_size": size}
        for role in ("prefill", "decode")
        for size in (1, 2)
    ]
    settings = IN_GROUPS | backend | {"log_level": "ERROR", "kv_verify": True, "gpu_instances": instances}
    settings["cuda_graph_enabled"] = False  # six ranks on two GPUs would need long to capture graphs
    with LLM(model[0], mode="disaggregated", device="cuda", **settings) as llm:
        for batch in range(20):  # lengths decide which instance prefills, so all links are used
            lengths = Random(batch).sample(range(40, 140), 4)
            prompts = [random_prompt(length, seed=10 * length + batch) for length in lengths]
            outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
            assert [o["token_ids"] for o in outputs] == [greedy_reference(model[1], p, NUM_TOKENS) for p in prompts]
            links = llm.get_system_stats()["kv_transfer"]["links"]
            if all(link["bytes"] for link in links.values()):
                break
        assert_no_leaks(llm)
    moved = {name: (link["bytes"] > 0, link["failures"]) for name, link in links.items()}
    assert moved == {f"prefill-{a}->decode-{b}": (True, {}) for a in (1, 2) for b in (1, 2)}
