"""Biases and allowed tokens on a GPU: the sampler agrees with the CPU, and requests get them with CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from hbserve.engine.sampler import AllowedTokens, Biases, RandomRows, SamplingBatch, sample
from hbserve.pd_disagg import LLM
from hbserve.sampling_params import SamplingParams
from tests.support.paths import ROOT

pytestmark = pytest.mark.gpu

DEMO_MODEL = ROOT / "examples" / "models" / "hbserve-demo"
VOCAB_SIZE = 1000  # not a multiple of 32


def test_sampler_agrees_with_the_cpu() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, VOCAB_SIZE, generator=generator)
    words = torch.randint(-(2**31), 2**31, (3, -(-VOCAB_SIZE // 32)), generator=generator).to(torch.int32)
    chosen = {}
    for device in ("cpu", "cuda"):
        rows = torch.tensor([0, 2, 5], device=device)
        batch = SamplingBatch(
            random=RandomRows(
                rows=torch.tensor([2, 3, 5], device=device),
                seeds=torch.tensor([1, 2, 3], device=device),
                positions=torch.tensor([4, 5, 6], device=device),
                temperature=torch.full((3,), 0.8, device=device),
                min_p=torch.zeros(3, device=device),
            ),
            biases=Biases(
                torch.tensor([1, 4], device=device),
                torch.tensor([77, 999], device=device),
                torch.tensor([100.0, 100.0], device=device),
            ),
            allowed=AllowedTokens(rows, words.to(device)),
        )
        chosen[device] = sample(logits.to(device), batch).token_ids.tolist()
    assert chosen["cpu"] == chosen["cuda"]
    assert (chosen["cuda"][1], chosen["cuda"][4]) == (77, 999)
    for row, number in ((0, 0), (2, 1), (5, 2)):
        token = chosen["cuda"][row]
        assert (int(words[number, token // 32]) >> (token % 32)) & 1


def test_steered_and_plain_requests_share_a_batch() -> None:
    with LLM(str(DEMO_MODEL), mode="unified", device="cuda", num_blocks=512, log_level="WARNING") as llm:
        prompt = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
        plain = SamplingParams(temperature=0, max_tokens=12)
        [alone] = llm.generate(prompt, plain, use_tqdm=False)
        forced = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logit_bias={50: 100})
        outputs = llm.generate([prompt] * 4, [plain, forced, plain, forced], use_tqdm=False)
        assert [output["token_ids"] for output in outputs[1::2]] == [[50] * 12] * 2
        assert [output["text"] for output in outputs[::2]] == [alone["text"]] * 2
        try:
            import llguidance  # noqa: F401
        except ImportError:
            return
        grammar = SamplingParams(temperature=1, seed=3, max_tokens=60, grammar="start: /[a-c]{3,9}x/")
        outputs = llm.generate([prompt] * 3, [grammar, plain, grammar], use_tqdm=False)
        assert outputs[0]["text"] == outputs[2]["text"]
        assert outputs[0]["text"].strip("abc") == "x"
        assert outputs[1]["text"] == alone["text"]
