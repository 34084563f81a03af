"""A real model, SmolLM2-135M-Instruct, in every mode: the tokens and log-probabilities of transformers in float32."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hbserve import LLM, SamplingParams
from hbserve.semi_pd import SMAllocation
from hbserve.tokenizer import Tokenizer
from tests.support.engines import assert_no_leaks, needs_mooncake
from tests.support.real_models import smollm2_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_TOKENS = 10
DEADLINE_S = 300.0
NUM_TOP = 5
TOLERANCE = 2e-3
LONG = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. "
TEXTS = [
    "a",
    "The capital of France is",
    "Die Hauptstadt von Deutschland ist",
    "La capitale de l'Italie est",
    "Столица России — это",
    "日本の首都は",
    "法国的首都是",
    "عاصمة مصر هي",
    "한국의 수도는",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "SELECT name, COUNT(*) FROM users WHERE",
    '{"name": "Ada", "age": 36, "tags": ["math", "',
    "🙂🙃 emoji 👩‍👩‍👧‍👦 and flags 🇫🇷",
    "1234567890 + 987654321 = ",
    "    \t  indented\n\n\n  lines\r\n",
    "<|endoftext|> is a special token, and <|im_start|> too",
    "naïve café — “quotes” … ﬁne ½ m²",
    LONG * 4,
    LONG * 60,
]
CHATS = [
    [{"role": "user", "content": "What is the capital of Spain?"}],
    [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "Which colour is the sky?"},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "And grass?"},
    ],
]
SYSTEMS: dict[str, dict[str, Any]] = {
    "unified": {"mode": "unified"},
    "shm": {"mode": "disaggregated", "kv_transfer_backend": "shm"},
    "gloo": {"mode": "disaggregated", "kv_transfer_backend": "nccl"},
    "mooncake": {"mode": "disaggregated", "kv_transfer_backend": "mooncake"},
    "semi_pd": {"mode": "semi_pd", "prefill_percentage": 80, "decode_percentage": 100},
}


@dataclass
class Reference:
    """What transformers makes of one prompt: greedy tokens, and the log-probabilities that they are drawn from."""

    prompt: list[int]
    tokens: list[int]
    logprobs: torch.Tensor
    """``[NUM_TOKENS, vocab]``"""


@pytest.fixture(scope="module")
def folder() -> str:
    return str(smollm2_folder())


@pytest.fixture(scope="module")
def model(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def references(folder: str, model: Any) -> list[Reference]:
    tokenizer = Tokenizer(folder)
    prompts = [tokenizer.encode(text) for text in TEXTS] + [tokenizer.encode_chat(chat) for chat in CHATS]
    assert min(map(len, prompts)) == 1
    assert max(map(len, prompts)) > 1000
    made = []
    for prompt in prompts:
        inputs = torch.tensor([prompt])
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logprobs = torch.cat(output.logits).float().log_softmax(-1)
        made.append(Reference(prompt, output.sequences[0, len(prompt) :].tolist(), logprobs))
    return made


def check(output: Any, reference: Reference) -> None:
    assert output["token_ids"] == reference.tokens
    for position, entry in enumerate(output["logprobs"]):
        expected = reference.logprobs[position].topk(NUM_TOP)
        values = dict(zip(expected.indices.tolist(), expected.values.tolist(), strict=True))
        assert set(entry) == set(values) | {reference.tokens[position]}
        assert all(abs(entry[token_id] - value) < TOLERANCE for token_id, value in values.items())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[needs_mooncake] if name == "mooncake" else []) for name in SYSTEMS]
)
def test_every_mode_gives_the_tokens_and_logprobs_of_transformers(
    name: str, folder: str, references: list[Reference]
) -> None:
    settings = {"device": "cpu", "dtype": "float32", "max_model_len": 2048, "num_blocks": 400, "chunk_size": 256}
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=NUM_TOP, ignore_eos=True)
    with LLM(folder, log_level="WARNING", **settings, **SYSTEMS[name]) as llm:
        with ThreadPoolExecutor(1) as pool:
            generating = pool.submit(llm.generate, [reference.prompt for reference in references], sampling)
            for manager in llm.supervisors.values():
                assert manager.request_sm_reallocation(SMAllocation(60, 40))
                assert manager.wait_until_settled(DEADLINE_S)
            outputs = generating.result(DEADLINE_S)
        for output, reference in zip(outputs, references, strict=True):
            check(output, reference)
        assert_no_leaks(llm)
