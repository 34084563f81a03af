"""Log-probabilities in bfloat16 through the public API, against transformers: every backend, captured and eager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hbserve import LLM, SamplingParams
from tests.support.engines import random_prompt
from tests.support.model_zoo import make_model, save_model

NUM_TOKENS = 12
NUM_TOP = 20
SAMPLING = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=NUM_TOP)
SHAPE = {"head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
ON_GPU: list[dict[str, Any]] = [
    {"attention_backend": backend, "cuda_graph_enabled": captured, "chunk_size": chunk}
    for backend in ("flashinfer", "flash_attn", "sdpa")
    for captured in (True, False)
    for chunk in (48, 512)
]
ON_RANKS = [
    pytest.param(
        {"device": "cuda", "tensor_parallel_size": size},
        marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < size, reason=f"needs {size} GPUs")],
    )
    for size in (2, 4, 8)
]


@pytest.mark.parametrize(
    "options",
    [
        {"device": "cpu", "chunk_size": 48, "num_blocks": 200},
        *(pytest.param({"device": "cuda"} | options, marks=pytest.mark.gpu) for options in ON_GPU),
        *ON_RANKS,
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
def test_logprobs_are_as_close_to_float32_as_those_of_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    """Prompts of several lengths at once, so that chunks and decodes share steps; then again, from the prefix cache.

    In a short dtype every order of roundings gives other logits: what counts is how far off they are. The yardstick is
    the root mean square of transformers' own error against its float32 logits, for the same tokens of the same
    sequences. Ours round as often and no more, in another order, so the two errors differ by chance alone.
    """
    shape = SHAPE | {"num_attention_heads": max(4, options.get("tensor_parallel_size", 1))}
    _compare(tmp_path, "qwen3", shape, options)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [True, False], ids=["captured", "eager"])
@pytest.mark.parametrize(
    "name",
    ["gpt_oss", "gemma2", "gemma3", "mistral", "olmo2", "cohere2", "granite_swa", "qwen2_window", "smollm3", "mellum"],
)
def test_logprobs_of_families_with_other_attention_or_norms(name: str, captured: bool, tmp_path: Path) -> None:
    """Sliding windows, sinks, soft caps, factors of scores, and layers of plain torch operations.

    Roundings are larger in some of these random models, and may choose other experts.
    """
    options = {"device": "cuda", "cuda_graph_enabled": captured, "chunk_size": 48}
    _compare(tmp_path, name, {}, options, max_ratio=1.5, max_reference_error=0.4)


def _compare(
    folder: Path,
    name: str,
    shape: dict[str, Any],
    options: dict[str, Any],
    max_ratio: float = 1.25,
    max_reference_error: float = 0.1,
) -> None:
    save_model(folder, name, dtype=torch.bfloat16, **shape)
    prompts = [random_prompt(length, seed=length) for length in (1, 17, 48, 100, 300)]  # pages have up to 256 tokens
    with LLM(str(folder), mode="unified", dtype="bfloat16", max_model_len=512, log_level="ERROR", **options) as llm:
        outputs = llm.generate(prompts, SAMPLING, use_tqdm=False)
        outputs += llm.generate(prompts, SAMPLING, use_tqdm=False)
        assert llm.get_system_stats()["cpu_scheduler"]["cached_prompt_tokens"] > 0
    reference = make_model(name, dtype=torch.bfloat16, **shape).to(options["device"])
    rounded = [_logprobs(reference, p, o) for p, o in zip(prompts * 2, outputs, strict=True)]
    reference.float()
    exact = [_logprobs(reference, p, o) for p, o in zip(prompts * 2, outputs, strict=True)]
    ours, theirs = [], []
    for output, short, full in zip(outputs, rounded, exact, strict=True):
        for position, top in enumerate(output["logprobs"] or []):
            assert len(top) >= NUM_TOP
            for token, logprob in top.items():
                ours.append(logprob - full[position, int(token)].item())
                theirs.append((short[position, int(token)] - full[position, int(token)]).item())
    our_error, their_error = (torch.tensor(errors).square().mean().sqrt().item() for errors in (ours, theirs))
    print(f"root mean square error {our_error:.5f}, transformers' {their_error:.5f}")
    assert our_error < max_ratio * their_error
    assert their_error < max_reference_error * torch.cat(exact).std().item(), "the yardstick itself is off"


@torch.inference_mode()
def _logprobs(model: Any, prompt: list[int], output: Any) -> torch.Tensor:
    """Of every token after each one of the output's: ``[output tokens, vocabulary]``, float32."""
    tokens = torch.tensor([prompt + output["token_ids"][:-1]], device=model.device)
    logprobs: torch.Tensor = model(tokens).logits[0, len(prompt) - 1 :].float().log_softmax(-1)
    return logprobs.cpu()
