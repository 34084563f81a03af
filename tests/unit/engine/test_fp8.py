"""FP8 weights and FP8 KV through step plans: the same answers in chunks, in batches, behind a prefix, handed over.

The demo model answers questions, and is sure of its tokens: products whose sums differ in their last bits may round a
value to another one of FP8's, which would decide between the tokens of a random model.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from hbserve.attention import AttentionBatch
from hbserve.attention.sdpa import SdpaBackend
from hbserve.engine.model_runner import ModelRunner
from hbserve.errors import ConfigError
from hbserve.float8 import FP8, widened
from hbserve.kv_cache.layout import KVLayout
from hbserve.layers.rotary import RotaryEmbedding
from hbserve.model_spec import ModelSpec
from tests.support.model_zoo import save_model
from tests.support.paths import ROOT
from tests.support.plan_driver import Driver, Sequence
from tests.unit.engine.test_model_runner import make_prompt, make_runner
from tests.unit.models.test_models import cpu, one_sequence

sys.path.insert(0, str(ROOT / "examples"))

import demo_language as language

DEMO = ROOT / "examples" / "models" / "hbserve-demo"
KINDS: dict[str, dict[str, Any]] = {
    "weights": {"quantization": "fp8"},
    "kv": {"kv_dtype": "fp8"},
    "both": {"quantization": "fp8", "kv_dtype": "fp8"},
}


@pytest.fixture(scope="module")
def questions() -> list[tuple[list[int], list[int]]]:
    """Prompts and right answers."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    rng = random.Random(5)
    found = [language.recall_question(rng, num_pairs) for num_pairs in (4, 9, 14, 25)]
    return [
        (
            tokenizer.apply_chat_template(question.messages, add_generation_prompt=True)["input_ids"],
            tokenizer.encode(question.answer),
        )
        for question in found
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_same_however_they_are_computed(
    kind: str, questions: list[tuple[list[int], list[int]]]
) -> None:
    runner = make_runner(DEMO, dtype="float32", num_blocks=200, **KINDS[kind])
    assert runner.layout.dtype == (torch.float32 if kind == "weights" else FP8)
    prompts = [prompt for prompt, _ in questions]
    expected = [answer for _, answer in questions]
    lens = [len(answer) for answer in expected]

    def driver(**options: Any) -> Driver:
        runner.kv_blocks.fill_(0xFF)  # NaN in FP8, too
        return Driver(runner, **options)

    alone = driver(feedback=False)
    (prompt, answer), *_ = questions
    assert alone.run(alone.add(prompt, len(answer))) == [answer]
    preempted = alone.add(prompt + answer[:2], len(answer) - 2)  # whose tokens are all computed again
    assert alone.run(preempted) == [answer[2:]]
    chunked = driver(chunk=16)
    sequences = [
        chunked.add(prompt, count, slot) for slot, (prompt, count) in enumerate(zip(prompts, lens, strict=True))
    ]
    assert chunked.run(*sequences) == expected
    # a prefix of whole blocks that another sequence has computed, and a sequence that goes on in other blocks
    shared = len(prompts[3]) // 16 - 1
    behind = chunked.add(prompts[3], lens[3], slot=6, computed=16 * shared)
    behind.block_ids = sequences[3].block_ids[:shared] + behind.block_ids
    moved = [chunked.free.pop() for _ in sequences[2].block_ids]
    runner.kv_blocks[moved] = runner.kv_blocks[sequences[2].block_ids]
    goes_on = Sequence(
        prompts[2], lens[2], slot=7, block_ids=moved, computed=len(prompts[2]), output=sequences[2].output[:1]
    )
    chunked.feedback, chunked.depth = False, 1
    assert chunked.run(behind, goes_on) == [expected[3], expected[2]]


def test_kv_takes_a_quarter_of_float32_and_half_of_bfloat16(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    short, full = (make_runner(tmp_path, kv_dtype=dtype).layout for dtype in ("fp8", "auto"))
    assert full.block_bytes == 4 * short.block_bytes
    assert make_runner(tmp_path, dtype="bfloat16").layout.block_bytes == 2 * short.block_bytes


@pytest.mark.parametrize("names", [("k_scale", "v_scale"), ("k_proj.output_scale", "v_proj.output_scale")])
def test_kv_is_scaled_as_the_checkpoint_says(names: tuple[str, str], tmp_path: Path) -> None:
    """The first layer's keys and values do not depend on the cache: they are those of float32, rounded."""
    save_model(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    scales = torch.tensor([0.04, 0.3]), torch.tensor(0.02)  # per head, and one for all
    added = {
        f"model.layers.{layer}.self_attn.{name}": scale.clone()
        for layer in range(3)
        for name, scale in zip(names, scales, strict=True)
    }
    save_file(load_file(path) | added, path)
    caches = []
    for kv_dtype in ("fp8", "auto"):  # without FP8 the scales mean nothing
        runner = make_runner(tmp_path, dtype="float32", num_blocks=4, kv_dtype=kv_dtype)
        driver = Driver(runner)
        driver.free = [0, 1, 2, 3]
        driver.run(driver.add(make_prompt(40), 1))
        caches.append(cache_of(runner)[:, 0, :, :, :])
    short, exact = caches
    written = ~exact[:, 0, :, :1, :1].isnan().expand_as(exact[:, 0])
    rope = runner.spec.ropes[0]
    assert rope is not None
    mixed = RotaryEmbedding(rope, runner.spec.head_dim, torch.device("cpu")).mix(exact[:, 0])
    key_scales = scales[0][:, None] * (runner.spec.head_dim / 2) ** 0.5  # mixed numbers may be larger
    for index, (scale, wanted) in enumerate(((key_scales, mixed), (scales[1], exact[:, 1]))):
        values = widened(short[:, index]) * scale
        error, bound = (values - wanted).abs(), wanted.abs() / 16 + scale * 2**-10
        assert (error <= bound)[written].all()
        assert written.sum() > 1000


def cache_of(runner: ModelRunner) -> torch.Tensor:
    return runner.layout.view(runner.kv_blocks.view(-1), runner.num_blocks)


def test_attention_reads_what_the_cache_holds(tmp_path: Path) -> None:
    """As attention of float32 over a cache with the same numbers."""
    save_model(tmp_path, "qwen2_window")
    spec = ModelSpec.load(tmp_path, kv_dtype="fp8")
    exact = one_sequence(spec, torch.float32, cpu(), 70)
    layout = KVLayout(spec.num_layers, 16, spec.num_kv_heads, spec.head_dim, FP8)
    scales = torch.rand(spec.num_layers, 2, spec.num_kv_heads) * 0.1
    cache = torch.full((5, *layout.block_shape), torch.nan).to(FP8)
    short = SdpaBackend(spec, layout, cache, cpu(), kv_scales=scales)
    short.slot_mapping = exact.slot_mapping
    k, v = (torch.randn(70, spec.num_kv_heads, spec.head_dim) for _ in range(2))
    for layer in range(2):  # the first has no window
        short._plans, short._slot_rows = exact._plans, exact._slot_rows  # type: ignore[attr-defined]
        short.store(layer, k, v)
        exact.kv_cache.copy_(widened(cache) * scales[None, :, :, None, :, None])
        q = torch.randn(70, spec.num_heads, spec.head_dim)
        outs = [torch.empty_like(q) for _ in range(2)]
        for attention, out in zip((short, exact), outs, strict=True):
            attention.attend(layer, q, out)
        torch.testing.assert_close(*outs)


@pytest.mark.parametrize("backend", ["flashinfer", "flash_attn", "triton"])
def test_backends_without_kv_in_fp8_are_refused_by_name(backend: str, tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    with pytest.raises(ConfigError, match=f"{backend} needs a CUDA device"):
        make_runner(tmp_path, kv_dtype="fp8", attention_backend=backend)


def test_a_needle_among_16k_random_keys_is_found(tmp_path: Path) -> None:
    """A query that is a multiple of one key reads that key's value, as the next tokens of a long context do."""
    save_model(tmp_path, "qwen3", head_dim=128, max_position_embeddings=1 << 14)
    spec = ModelSpec.load(tmp_path, kv_dtype="fp8")
    layout = KVLayout(1, 1 << 14, spec.num_kv_heads, spec.head_dim, FP8)
    attention = SdpaBackend(spec, layout, torch.zeros(1, *layout.block_shape).to(FP8), cpu())
    k, v = (torch.randn(1 << 14, spec.num_kv_heads, spec.head_dim) for _ in range(2))
    attention.slot_mapping = torch.arange(1 << 14)
    attention._slot_rows = attention._row_of(attention.slot_mapping)
    attention.store(0, k, v)
    needles = torch.randint(1 << 14, (3,), generator=torch.Generator().manual_seed(3))
    contexts = np.full(3, 1 << 14, np.int32)
    tables, starts = np.zeros((3, 1), np.int32), np.arange(4, dtype=np.int32)
    attention.begin(AttentionBatch(3, starts, contexts, tables, torch.zeros(3, dtype=torch.int64)))
    q = k[needles].repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=1) * 4
    out = torch.empty_like(q)
    attention.attend(0, q, out)
    wanted = v[needles].repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=1)
    assert torch.cosine_similarity(out, wanted, dim=-1).min() > 0.99
