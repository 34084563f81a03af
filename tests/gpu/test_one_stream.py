"""The kernels of a step of one stream against plain torch, at shapes that no model here has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hbserve.config import from_dict
from hbserve.engine.model_runner import ModelRunner
from hbserve.platform import make_platform
from tests.support.model_zoo import VOCAB_SIZE, save_model
from tests.support.plan_driver import Driver

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

TOLERANCE = 2**-7
"""Relative tolerance: two roundings of bfloat16. Both sides sum in float32, but in different orders."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(torch.bfloat16)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    spread = expected.float().abs().max().item()
    torch.testing.assert_close(actual.float(), expected.float(), atol=TOLERANCE * spread, rtol=TOLERANCE)


@pytest.mark.parametrize("in_clusters", [True, False])
@pytest.mark.parametrize("length", [1, 2, 65, 640, 4096, 9000])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page", "rotated_dim", "is_interleaved", "has_norm"),
    [
        (32, 8, 128, 16, None, False, True),
        (6, 2, 96, 8, 48, False, True),
        (8, 1, 64, 256, 32, True, False),
        (40, 2, 256, 16, None, False, False),
        (10, 2, 256, 16, None, False, False),
        (9, 3, 64, 16, None, False, False),
        (8, 8, 80, 32, None, False, True),
    ],
)
def test_attention_with_the_transform_of_heads(
    in_clusters: bool,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page: int,
    rotated_dim: int | None,
    is_interleaved: bool,
    has_norm: bool,
) -> None:
    from hbserve.attention.base import HeadTransform
    from hbserve.attention.row_cluster import RowCluster
    from hbserve.attention.row_decode import RowDecode
    from hbserve.layers.norms import rms_norm
    from hbserve.layers.rotary import RotaryEmbedding
    from hbserve.rope_spec import RopeSpec

    rope = RopeSpec(theta=10000.0, magnitude=1.25, rotated_dim=rotated_dim, is_interleaved=is_interleaved)
    rotary = RotaryEmbedding(rope, head_dim, torch.device("cuda"))
    norms = (random(head_dim), random(head_dim)) if has_norm else None
    transform = HeadTransform(
        norms, 1e-6, rotary.inverse_frequencies, rotary.magnitude, rotary.rotated_dim, rotary.is_interleaved
    )
    num_pages, last = -(-length // page), length - 1
    cache = random(num_pages + 2, 2, 2, page, kv_heads, head_dim)
    pages = torch.randperm(num_pages + 2, device="cuda")[:num_pages].to(torch.int32)
    block, offset = int(pages[-1]), last % page
    cache.view(torch.uint8)[block, :, :, offset:] = 0xFF  # what was never written is no number
    counters = torch.zeros(kv_heads, dtype=torch.int32, device="cuda")
    if in_clusters and not RowCluster.supports(cache, heads):
        pytest.skip("there is no such kernel for this cache or on this GPU")
    kernel = RowCluster(cache, heads, counters) if in_clusters else RowDecode(cache, heads, counters)
    qkv = random(1, (heads + 2 * kv_heads) * head_dim)
    position = torch.tensor([last], device="cuda")
    out = torch.empty(1, heads, head_dim, dtype=torch.bfloat16, device="cuda")
    before = cache.clone()

    kernel.attend(1, qkv, transform, position, torch.tensor([-1], device="cuda"), pages, out)
    assert torch.equal(cache.view(torch.uint8), before.view(torch.uint8))  # a padded row is not stored
    for _ in range(2):  # the first call must leave the counters at zero
        out.fill_(torch.nan)
        kernel.attend(1, qkv, transform, position, torch.tensor([block * page + offset], device="cuda"), pages, out)

    q, k, v = qkv.view(1, -1, head_dim).tensor_split([heads, heads + kv_heads], dim=1)
    if norms is not None:
        q, k = rms_norm(q, norms[0], 1e-6), rms_norm(k, norms[1], 1e-6)
    q, k = (rotary.rotate(x, *rotary.angles(position)) for x in (q, k))
    stored = cache[block, 1, :, offset]
    assert_close(stored, torch.stack([k[0], v[0]]))
    before[block, 1, :, offset] = stored
    assert torch.equal(cache.view(torch.uint8), before.view(torch.uint8))  # nothing else was written
    keys, values = (cache.float()[pages.long(), 1, part].flatten(0, 1)[:length].transpose(0, 1) for part in (0, 1))
    expected = F.scaled_dot_product_attention(q[0].view(kv_heads, -1, head_dim).float(), keys, values)
    assert_close(out[0], expected.reshape(heads, head_dim))


@pytest.mark.parametrize("num_rows", [1, 33])
@pytest.mark.parametrize("vocab_size", [97, 50000])
def test_sampling_in_one_kernel(num_rows: int, vocab_size: int) -> None:
    from hbserve.engine.fast_sampler import fast_sample
    from hbserve.engine.sampler import RandomRows, SamplingBatch, sample
    from hbserve.layers.parallel import TensorParallel

    logits = random(num_rows, vocab_size)  # in bfloat16 several tokens often have the highest logit
    temperatures = torch.arange(num_rows, device="cuda") * 0.1
    seeds = torch.randint(-(1 << 62), 1 << 62, (num_rows,), device="cuda")
    positions = torch.randint(5000, (num_rows,), device="cuda")
    slots = torch.randperm(num_rows + 1, device="cuda")[:num_rows]
    last = torch.full((num_rows + 1,), -7, device="cuda")
    counters = torch.zeros(num_rows, dtype=torch.int32, device="cuda")
    rows = torch.arange(1, num_rows, device="cuda")
    random_rows = RandomRows(
        rows, seeds[1:], positions[1:] + 1, temperatures[1:], torch.zeros(len(rows), device="cuda")
    )
    expected = sample(logits, SamplingBatch(random=random_rows if num_rows > 1 else None)).token_ids
    for _ in range(2):  # the first call must leave the counters at zero
        sampled = fast_sample(
            logits, temperatures, seeds, positions, slots, last, counters, vocab_size, TensorParallel()
        )
        assert (sampled == expected).sum() >= num_rows - 1  # the logarithms may differ in their last bit
        assert torch.equal(last[slots], sampled)
    assert (last == -7).sum() == 1


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_embeddings_of_tokens_that_are_fed_back(scale: float) -> None:
    from hbserve.layers import fused

    embedding, last = random(50, 1500), torch.tensor([10, 11, 1 << 40, 13], device="cuda")
    given, slots = torch.tensor([-1, 5, -1, 49, -1], device="cuda"), torch.tensor([3, 0, 1, 0, 2], device="cuda")
    expected = embedding[torch.tensor([13, 5, 11, 49, 0], device="cuda")]  # nothing was sampled in slot 2
    assert torch.equal(fused.embed(given, last, slots, embedding, scale), expected * scale)


@pytest.mark.parametrize("max_short_tokens", [None, 310])
@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen3_moe"])
def test_tokens_of_one_stream_are_the_most_likely(name: str, max_short_tokens: int | None, tmp_path: Path) -> None:
    """A lone greedy sequence, whose steps are replays of graphs of one row; transformers computes in float32.

    At ``max_short_tokens`` the other kernel for attention takes over.
    """
    model = save_model(tmp_path, name).cuda()
    section = {"path": str(tmp_path), "device": "cuda", "dtype": "bfloat16"}
    config = from_dict({"model": section, "performance": {"num_blocks": 200, "max_num_seqs": 2}})
    platform = make_platform("cuda", gpu_id=0, num_threads=None, num_instances=1)
    platform.activate()
    runner = ModelRunner(config, config.gpu_instances[0], platform)
    runner.kv_blocks.fill_(0xFF)
    assert runner._graphs is not None
    if max_short_tokens is not None:
        runner._graphs._attention.max_short_tokens = max_short_tokens
    driver = Driver(runner)
    for slot, length in enumerate((1, 300)):
        prompt = torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        (output,) = driver.run(driver.add(prompt, 40, slot))
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output], device="cuda")).logits[0, length - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(output, device="cuda")[:, None])[:, 0]
        behind = (logits.amax(1) - chosen) / logits.std(1)
        assert (behind < 0.25).float().mean() >= 0.9, behind  # rounding may choose another expert
        assert len({*output}) > 5, "the model repeats itself"


@pytest.mark.parametrize("in_clusters", [True, False])
@pytest.mark.parametrize(("hidden", "heads", "inner"), [(1024, 16, 3072), (576, 6, 1536), (4096, 32, 12288)])
@pytest.mark.parametrize("kind", ["bfloat16", "channel", "block"])
def test_kernels_that_begin_early_read_nothing_too_early(
    kind: str, hidden: int, heads: int, inner: int, in_clusters: bool
) -> None:
    """Layers in one captured graph, where kernels overlap, against the same kernels one after the other."""
    from hbserve.attention.base import HeadTransform
    from hbserve.attention.row_cluster import RowCluster
    from hbserve.attention.row_decode import RowDecode
    from hbserve.layers.fp8 import Fp8Linear, quantise_weight
    from hbserve.layers.linear import PlainLinear
    from hbserve.layers.one_row import one_row
    from hbserve.layers.rotary import RotaryEmbedding
    from hbserve.rope_spec import RopeSpec

    def linear(num_outputs: int, size: int) -> PlainLinear | Fp8Linear:
        weight = random(num_outputs, size) * 0.02
        if kind == "bfloat16":
            return PlainLinear(weight)
        rows = quantise_weight(weight)
        blocks = torch.full((num_outputs // 64, -(-size // 128)), 2e-3, device="cuda")
        scale = rows.scales[:, 0] if kind == "channel" else blocks
        return Fp8Linear(rows.values, scale, None, None, torch.bfloat16)

    num_layers, kv_heads, head_dim = 6, max(2, heads // 8), 128
    layers = [
        (
            linear((heads + 2 * kv_heads) * head_dim, hidden),
            linear(hidden, heads * head_dim),
            linear(2 * inner, hidden),
            linear(hidden, inner),
        )
        for _ in range(num_layers)
    ]
    norm, head_norm = random(hidden), random(head_dim)
    rotary = RotaryEmbedding(RopeSpec(theta=10000.0), head_dim, torch.device("cuda"))
    heads_of = HeadTransform(
        (head_norm, head_norm), 1e-6, rotary.inverse_frequencies, rotary.magnitude, rotary.rotated_dim, False
    )
    cache = random(60, num_layers, 2, 16, kv_heads, head_dim)
    counters = torch.zeros(kv_heads, dtype=torch.int32, device="cuda")
    if in_clusters and not RowCluster.supports(cache, heads):
        pytest.skip("there is no such kernel for this cache or on this GPU")
    attention = RowCluster(cache, heads, counters) if in_clusters else RowDecode(cache, heads, counters)
    pages = torch.randperm(60, device="cuda").to(torch.int32)
    position = torch.tensor([700], device="cuda")
    slot = pages[700 // 16].long()[None] * 16 + 700 % 16
    first, stream = random(1, hidden), torch.empty(1, hidden, dtype=torch.bfloat16, device="cuda")

    def run(after_each: Callable[[], None]) -> None:
        stream.copy_(first)
        for index, (qkv, o, up, down) in enumerate(layers):
            projected = one_row(qkv, stream, norm=norm, eps=1e-6)
            after_each()
            attended = torch.empty(1, heads, head_dim, dtype=torch.bfloat16, device="cuda")
            attention.attend(index, projected, heads_of, position, slot, pages, attended)
            after_each()
            one_row(o, attended.flatten(1), residual=stream)
            after_each()
            activated = one_row(up, stream, norm=norm, eps=1e-6, is_gated=True)
            after_each()
            one_row(down, activated, residual=stream)
            after_each()

    run(torch.cuda.synchronize)
    expected = stream.clone()
    assert not expected.isnan().any()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(lambda: None)
    for _ in range(20):
        graph.replay()
        assert torch.equal(stream, expected)
