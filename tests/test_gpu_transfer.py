"""KV transfer between two GPUs: every backend gives the tokens of one GPU, and says what it moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hbserve import LLM, SamplingParams
from tests.engines import assert_no_leaks, greedy_reference, needs_mooncake, random_prompt
from tests.model_zoo import save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
BACKENDS = ["shm", "nccl", pytest.param("mooncake", marks=needs_mooncake)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = tmp_path_factory.mktemp("qwen3")
    return str(folder), save_model(Path(folder), "qwen3")


@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verified"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_gpus_give_the_tokens_of_transformers(model: tuple[str, Any], backend: str, verify: bool) -> None:
    prompts = [random_prompt(length, seed=length) for length in (1, 17, 100, 180, 300)]
    settings: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "num_blocks": 256, "chunk_size": 64}
    settings |= {"log_level": "ERROR", "kv_transfer_backend": backend, "kv_verify": verify}
    with LLM(model[0], mode="disaggregated", device="cuda", **settings) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert_no_leaks(llm)
        (link,) = llm.get_system_stats()["kv_transfer"]["links"].values()
    assert [o["token_ids"] for o in outputs] == [greedy_reference(model[1], p, NUM_TOKENS) for p in prompts]
    assert link["bytes"] > 0
    assert not link["failures"]


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=["2-1", "1-2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_are_split_anew_between_gpus(model: tuple[str, Any], backend: str, sizes: tuple[int, int]) -> None:
    """One rank goes to the other GPU and one to its own, where NCCL cannot join the two."""
    prompts = [random_prompt(length, seed=length) for length in (1, 17, 100, 180)]
    instances = [
        {"instance_id": role, "instance_type": role, "gpu_id": 0, "tensor_parallel_size": size}
        for role, size in zip(("prefill", "decode"), sizes, strict=True)
    ]
    settings: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "num_blocks": 256, "chunk_size": 64}
    settings |= {"log_level": "ERROR", "kv_transfer_backend": backend, "kv_verify": True, "gpu_instances": instances}
    with LLM(model[0], mode="disaggregated", device="cuda", **settings) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert_no_leaks(llm)
        (link,) = llm.get_system_stats()["kv_transfer"]["links"].values()
    assert [o["token_ids"] for o in outputs] == [greedy_reference(model[1], p, NUM_TOKENS) for p in prompts]
    assert not link["failures"]
