"""FP8 on a GPU: each kernel against its reference at odd sizes, and the engine through the public API."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hbserve.attention.base import AttentionBatch
from hbserve.attention.sdpa import SdpaBackend
from hbserve.attention.triton_paged import TritonBackend
from hbserve.float8 import FP8
from hbserve.kv_cache.layout import KVLayout
from hbserve.layers.fp8 import Fp8Linear, Quantised
from hbserve.model_spec import ModelSpec
from hbserve.platform import make_platform
from tests.support.model_zoo import save_model
from tests.support.paths import ROOT
from tests.unit.models.test_models import cpu, our_logits, random_tokens

pytest.importorskip("triton")
sys.path.insert(0, str(ROOT / "examples"))

import demo_language as language

pytestmark = pytest.mark.gpu
DEMO = str(ROOT / "examples" / "models" / "hbserve-demo")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(torch.bfloat16)


def make_layer(num_outputs: int, size: int, kind: str) -> Fp8Linear:
    """A layer with a scale per row or per block of 64 x 128, and dynamic, static or bounded scales of inputs."""
    weight = torch.randn(num_outputs, size, device="cuda") * 0.05
    if kind == "block":
        scale = torch.rand(num_outputs // 64, -(-size // 128), device="cuda") * 1e-3 + 1e-4
        spread = scale.repeat_interleave(64, 0).repeat_interleave(128, 1)[:, :size]
    else:
        scale = weight.abs().amax(1) / 448
        spread = scale[:, None]
    values = (weight / spread).clamp(-448, 448).to(FP8)
    input_scales = torch.tensor([0.01, 0.02], device="cuda") if kind == "static" else None
    max_input = 2.0 if kind == "bounded" else None
    return Fp8Linear(values, scale, random_rows(num_outputs), input_scales, torch.bfloat16, max_input)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2**-7) -> None:
    """Compare by the root mean square: a value between two of FP8's may fall to either."""
    error = (actual.float() - expected.float()).square().mean().sqrt().item()
    spread = expected.float().square().mean().sqrt().item()
    assert error <= tolerance * spread, f"root mean square error {error:.2e} of {spread:.2e}"
    assert not actual.isnan().any()


@pytest.mark.parametrize(
    ("num_outputs", "size", "kind"),
    [
        (192, 320, "channel"),
        (192, 320, "block"),
        (4096, 4096, "channel"),
        (640, 12288, "block"),
        (1024, 11008, "channel"),
        (4096, 14336, "block"),
        (5120, 17408, "channel"),
        (5120, 25600, "channel"),
        (6144, 1152, "static"),
        (1024, 1152, "bounded"),
        (40_064, 256, "channel"),  # several tiles of rows for each program of the kernel for one row
        (40_064, 256, "block"),
    ],
)
def test_linear_kernels_equal_the_reference(num_outputs: int, size: int, kind: str) -> None:
    from hbserve.layers.fp8_kernels import Fp8Kernels

    layer, kernels = make_layer(num_outputs, size, kind), Fp8Kernels()
    norm = random_rows(size)
    x = random_rows(1, size)
    assert_close(kernels.one_row(layer, x), layer(x))
    residual = random_rows(1, num_outputs)
    expected = residual + layer(x)
    assert_close(kernels.one_row(layer, x, residual=residual), expected)
    normed = F.rms_norm(x, (size,), None, 1e-6) * norm
    gate, up = layer(normed).chunk(2, dim=-1)
    assert_close(kernels.one_row(layer, x, norm=norm, eps=1e-6, is_gated=True), F.silu(gate) * up, 2**-6)
    for num_rows in (2, 3, 17, 64, 65, 200, 600):
        x = random_rows(num_rows, size)
        for _ in range(2):  # the first launch must leave the counters at zero
            assert_close(kernels.many_rows(layer, x), layer(x))
    out = torch.empty(600, num_outputs, device="cuda", dtype=torch.bfloat16)
    assert kernels.many_rows(layer, x, out, has_bias=False) is out
    assert_close(out, layer(x, has_bias=False))


@pytest.mark.parametrize("kind", ["channel", "block", "bounded"])
@pytest.mark.parametrize("size", [320, 12288, 25600])
def test_rows_are_quantised_after_norm_and_gate(size: int, kind: str) -> None:
    from hbserve.layers.fp8_kernels import Fp8Kernels

    layer, kernels = make_layer(64, size, kind), Fp8Kernels()
    for num_rows in (2, 130):
        total, pending, norm = random_rows(num_rows, size), random_rows(num_rows, size), random_rows(size)
        expected_total = total + pending
        expected = layer.quantise_input(F.rms_norm(expected_total, (size,), None, 1e-6) * norm)
        rows = kernels.norm(layer, pending, total, norm, 1e-6)
        assert torch.equal(total, expected_total)
        assert_close(rows.dequantised(), expected.dequantised())
        gate_up = random_rows(num_rows, 2 * size)
        gate, up = gate_up.chunk(2, dim=-1)
        out = kernels.memory(layer, num_rows, size)
        inner = kernels.gate(layer, gate_up, out[:num_rows])
        assert isinstance(inner, Quantised)
        assert_close(inner.dequantised(), layer.quantise_input(F.silu(gate) * up).dequantised())


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page"), [(16, 8, 128, 16), (6, 2, 96, 32), (8, 1, 64, 8)])
@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [90, 300])  # long chunks over FP8 have other kernels
@pytest.mark.parametrize("model", ["llama", "gpt_oss", "gemma2", "mistral"])  # usual; sinks; a cap, a factor; windows
def test_triton_attention_equals_the_reference(
    model: str, chunk: int, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, page: int, tmp_path: Path
) -> None:
    """Decodes and chunks in one step, over blocks that lie anywhere; unwritten memory holds NaN."""
    windows: dict[str, Any] = {"layer_types": ["full_attention", "sliding_attention"]}
    if model in ("llama", "mistral"):
        windows = {"sliding_window": 700} if model == "mistral" else {}
    save_model(
        tmp_path,
        model,
        **windows,
        head_dim=head_dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=2,
        hidden_size=heads * 8,
    )
    spec = ModelSpec.load(tmp_path)
    layout = KVLayout(2, page, kv_heads, head_dim, dtype)
    lens, contexts = np.array([1, 1, 1, 37, chunk, 130]), np.array([3000, 1, 71, 37, 811, 2100], np.int32)
    starts = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
    num_pages = -(-contexts // page)
    num_blocks = int(num_pages.sum())
    order = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
    tables = np.zeros((len(lens), num_pages.max()), np.int32)
    old_slots, slots = [], []
    for row, (length, context) in enumerate(zip(lens, contexts, strict=True)):
        tables[row, : num_pages[row]] = order[num_pages[:row].sum() :][: num_pages[row]]
        places = tables[row, np.arange(context) // page].astype(np.int64) * page + np.arange(context) % page
        old_slots.append(places[:-length])
        slots.append(places[-length:])
    arena = torch.full((num_blocks * layout.block_bytes,), 0xFF, dtype=torch.uint8, device="cuda")
    scales = torch.rand(2, 2, kv_heads, device="cuda") * 0.02 + 0.01 if dtype == FP8 else None
    platform = make_platform("cuda", gpu_id=0, num_threads=1, num_instances=1)
    sinks = torch.randn(2 * heads, device="cuda") if spec.family.has_sinks else None
    ours, reference = (
        backend(spec, layout, layout.view(arena, num_blocks), platform, kv_scales=scales, sinks=sinks)
        for backend in (TritonBackend, SdpaBackend)
    )
    for chosen, is_begun in ((np.concatenate(old_slots), False), (np.concatenate(slots), True)):
        batch = AttentionBatch(3, starts, contexts, tables, torch.from_numpy(chosen).cuda())
        ours.slot_mapping = batch.slot_mapping
        if is_begun:
            ours.begin(batch)
            reference.begin(batch)
        for layer in (0, 1):
            k, v = (random_rows(len(chosen), kv_heads, head_dim) for _ in range(2))
            ours.store(layer, k, v)
    q = random_rows(int(lens.sum()), heads, head_dim)
    out, expected = torch.empty_like(q), torch.empty_like(q)
    for layer in (0, 1, 1):  # each call must leave the counters at zero
        reference.attend(layer, q, expected)
        ours.attend(layer, q, out)
        assert_close(out, expected)


@pytest.mark.parametrize("num_tokens", [1, 70])
def test_an_expert_of_every_token_is_quantised(num_tokens: int, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"hidden_size": 256, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    save_model(tmp_path, "qwen2_moe", **shape, num_hidden_layers=1, mlp_only_layers=[])
    token_ids = random_tokens(num_tokens)
    platform = make_platform("cuda", gpu_id=0, num_threads=1, num_instances=1)
    actual = our_logits(tmp_path, token_ids, torch.bfloat16, platform, "fp8").cpu().float()
    expected = our_logits(tmp_path, token_ids, torch.bfloat16, cpu(), "fp8").float()
    errors = (actual - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.median() < 0.12  # rounding moves a random model's logits by that, and may choose other experts


@pytest.mark.parametrize(
    "options",
    [
        {"quantization": "fp8", "kv_cache_dtype": "fp8"},
        {"quantization": "fp8", "kv_cache_dtype": "fp8", "cuda_graph_enabled": False, "chunk_size": 48},
        {"quantization": "fp8"},
        {"kv_cache_dtype": "fp8"},
        {"attention_backend": "triton", "chunk_size": 48},
    ],
    ids=["both", "both-eager", "weights", "kv", "triton"],
)
def test_recall_is_right_in_fp8(options: dict[str, Any]) -> None:
    from hbserve import LLM, SamplingParams

    rng = random.Random(7)
    questions = [language.recall_question(rng, rng.randint(3, 150)) for _ in range(100)]
    greedy = SamplingParams(temperature=0, max_tokens=64)
    settings = {"device": "cuda", "dtype": "bfloat16", "num_blocks": 4096, "log_level": "WARNING"}
    with LLM(DEMO, mode="unified", **settings, **options) as llm:
        for _ in range(2):  # the second round comes from the prefix cache
            outputs = llm.chat([question.messages for question in questions], greedy, use_tqdm=False)
            right = sum(o["text"] == question.answer for o, question in zip(outputs, questions, strict=True))
            assert right >= 95
        one = llm.chat([questions[0].messages], greedy, use_tqdm=False)[0]  # a single row has kernels of its own
        assert one["text"] == questions[0].answer


@pytest.mark.parametrize(
    "options",
    [{"quantization": "fp8", "kv_cache_dtype": "fp8"}, {"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}],
    ids=["both", "weights", "kv"],
)
def test_layers_of_a_32b_model_compute_numbers(options: dict[str, Any], tmp_path: Path) -> None:
    """The widest rows and largest groups of query heads that were served; the engine refuses logits that are none."""
    from hbserve import LLM, SamplingParams
    from hbserve.model_source import SHAPES

    config = json.loads((SHAPES / "qwen3-32b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    rng = random.Random(0)
    prompts = [[rng.randrange(1000) for _ in range(length)] for length in (16, 1, 101, 577, 1023, 333, 640)]
    sampling = SamplingParams(temperature=0.6, seed=1, max_tokens=8, ignore_eos=True)
    settings = {"load_format": "dummy", "device": "cuda", "num_blocks": 512, "log_level": "ERROR"}
    with LLM(str(tmp_path), mode="unified", **settings, **options) as llm:
        for batch in (prompts[:1], prompts, prompts[:3]):
            outputs = llm.generate(batch, sampling, use_tqdm=False)
            assert [len(output["token_ids"]) for output in outputs] == [8] * len(batch)
