"""The kernels of experts against plain torch, at odd sizes and skewed loads; also suitable for compute-sanitizer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

from hbserve.layers.activations import make_activation, silu_and_mul  # noqa: E402
from hbserve.layers.fp8 import quantise  # noqa: E402
from hbserve.layers.mixture.grouped import GroupedExperts  # noqa: E402
from hbserve.layers.mixture.plain import ExpertWeights, choose_experts, mix_experts, router_logits  # noqa: E402
from hbserve.layers.norms import rms_norm  # noqa: E402
from hbserve.model_families.declaration import Experts  # noqa: E402

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
HIDDEN, INNER = 176, 88
"""Multiples of no tile; one pair of sizes for all tests, since a kernel is compiled for each."""


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(DTYPE)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mixture(num_experts: int, num_chosen: int, router: str = "softmax") -> Experts:
    softmax = Experts(num_experts, num_chosen, INNER, True, (False, True))
    if router == "softmax groups":  # whose weights are scores of all experts
        return dataclasses.replace(softmax, is_renormalised=False, num_groups=4, num_chosen_groups=1)
    if router == "sigmoid groups":
        softmax = dataclasses.replace(softmax, num_groups=5, num_chosen_groups=3)
    return softmax if router == "softmax" else dataclasses.replace(softmax, scoring="sigmoid", has_bias=True, scale=2.5)


def parameters(experts: Experts, skew: float, hidden: int = HIDDEN) -> ExpertWeights:
    """Make weights; with ``skew`` the router prefers some experts by far."""
    scales = torch.logspace(0, -skew, experts.num_experts, device=DEVICE)
    router = random(experts.num_experts, hidden) * scales[:, None]
    has_bias = experts.has_bias
    return ExpertWeights(
        router=router.float() * 0.05 if has_bias else router.to(DTYPE),
        up=random(experts.num_experts * 2 * experts.inner_size, hidden, scale=hidden**-0.5),
        down=random(experts.num_experts * hidden, experts.inner_size, scale=experts.inner_size**-0.5),
        router_bias=torch.randn(experts.num_experts, device=DEVICE) if has_bias else None,
    )


def quantised(weights: ExpertWeights, has_blocks: bool, block_rows: int = 8) -> ExpertWeights:
    """Return the same parameters in FP8, with scales of rows or of blocks of ``block_rows`` x 128."""
    parts: dict[str, Any] = {}
    for name in ("up", "down"):
        matrix = getattr(weights, name).float()
        if has_blocks:
            scale = torch.rand(matrix.shape[0] // block_rows, -(-matrix.shape[1] // 128), device=DEVICE)
            scale = scale * 0.01 + 0.001
            wide = scale.repeat_interleave(block_rows, 0).repeat_interleave(128, 1)[:, : matrix.shape[1]]
        else:
            scale = matrix.abs().amax(1) / 448
            wide = scale[:, None]
        parts |= {name: (matrix / wide).clamp(-448, 448).to(torch.float8_e4m3fn), f"{name}_scale": scale}
    return dataclasses.replace(weights, **parts)


def totals_of(experts: Experts) -> torch.Tensor:
    return torch.zeros(2, experts.num_experts, dtype=torch.int64, device=DEVICE)


def wide(matrix: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Return a matrix in float32."""
    if scale is None:
        return matrix.float()
    columns = 1 if scale.dim() == 1 else scale.shape[1]
    scales = scale.view(-1, columns).repeat_interleave(matrix.shape[0] // scale.shape[0], 0)
    return (
        matrix.float()
        * scales.repeat_interleave(-(-matrix.shape[1] // columns) if columns == 1 else 128, 1)[:, : matrix.shape[1]]
    )


def expected(
    x: torch.Tensor, weights: ExpertWeights, experts: Experts, fp8_inputs: Literal["tokens", "groups"] | None = None
) -> torch.Tensor:
    """Compute the mixture in float32, with the experts that the router chooses in its own dtype.

    Args:
        fp8_inputs: inputs of both products are rounded to FP8, with a scale for each token, or for each 128 inputs.
    """
    token_weights, chosen = choose_experts(router_logits(x, weights, experts), weights.router_bias, experts)
    ups = wide(weights.up, weights.up_scale).view(experts.num_experts, -1, x.shape[1])
    downs = wide(weights.down, weights.down_scale).view(experts.num_experts, x.shape[1], -1)
    out = torch.zeros(x.shape, device=DEVICE)
    if fp8_inputs is not None:
        x = quantise(x, is_grouped=fp8_inputs == "groups").dequantised()
    for expert in range(experts.num_experts):
        inner = silu_and_mul(F.linear(x.float(), ups[expert]))
        if fp8_inputs is not None:
            inner = quantise(inner.to(DTYPE), is_grouped=fp8_inputs == "groups").dequantised()
        share = token_weights.float().where(chosen == expert, 0).sum(-1, keepdim=True)
        out += F.linear(inner, downs[expert]) * share
    return out


def assert_close(actual: torch.Tensor, target: torch.Tensor) -> None:
    """Compare rows: gate and up are rounded to the dtype, so an element may be off by a rounding of the largest."""
    tolerance = 2 * torch.finfo(DTYPE).eps if DTYPE.itemsize == 2 else 1e-5
    torch.testing.assert_close(actual.float(), target, atol=tolerance * target.abs().max().item(), rtol=tolerance)


def assert_close_in_fp8(actual: torch.Tensor, target: torch.Tensor) -> None:
    """Compare what is computed from values in FP8: one between two of them may become either, by other roundings."""
    error = (actual.float() - target).norm() / target.norm()
    assert error < 0.02, f"relative error {error:.4f}"


@pytest.mark.parametrize(
    ("num_experts", "num_chosen", "router"),
    [(128, 8, "softmax"), (61, 4, "sigmoid"), (8, 2, "softmax"), (60, 6, "sigmoid groups"), (16, 3, "softmax groups")],
)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 37, 300])
@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_experts(num_experts: int, num_chosen: int, router: str, num_tokens: int, skew: float) -> None:
    experts = mixture(num_experts, num_chosen, router)
    weights = parameters(experts, skew)
    totals = totals_of(experts)
    grouped = GroupedExperts(experts, (0, num_experts), totals)
    x = random(num_tokens, HIDDEN)
    slots = torch.arange(num_tokens, device=DEVICE)
    slots[num_tokens - 1 :: 5] = -1  # padded rows; the last one is, and so none is left of a single token
    for given in (None, slots):
        target = expected(x, weights, experts)
        if given is not None:
            target[given < 0] = 0
        out = torch.full_like(x, math.nan)
        grouped.mix(1, x, weights, given, out)
        assert_close(out, target)
    if num_tokens == 1:
        residual = random(num_tokens, HIDDEN)
        total = residual + expected(x, weights, experts)
        grouped.mix(1, x, weights, None, residual, is_added=True)
        assert_close(residual, total)
    if num_tokens == 1:
        residual, norm = random(num_tokens, HIDDEN), random(HIDDEN)
        total = residual + expected(rms_norm(residual, norm, 1e-6), weights, experts)
        grouped.mix(1, residual, weights, None, residual, is_added=True, norm=(norm, 1e-6))
        assert_close(residual, total)
    assert not totals[0].any()
    num_calls = 4 if num_tokens == 1 else 2
    counted = num_calls * num_tokens - int((slots < 0).sum())
    assert totals[1].sum().item() == counted * num_chosen
    plain = mix_experts(x, weights, experts, silu_and_mul, totals[0])
    assert totals[0].sum().item() == num_tokens * num_chosen
    assert_close(plain, expected(x, weights, experts))


@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 3, 37, 300, 1000])
def test_experts_with_biases(num_tokens: int, is_fp8: bool) -> None:
    """Those of gpt-oss, with its activation; plain torch rounds where the kernels round."""
    experts = mixture(32, 4)
    plain = parameters(experts, 1.0)
    plain = dataclasses.replace(plain, up=plain.up * 4)  # the activation clamps some values
    weights = dataclasses.replace(
        quantised(plain, has_blocks=False) if is_fp8 else plain,
        logit_bias=random(32),
        up_bias=random(len(plain.up)),
        down_bias=random(len(plain.down)),
    )
    totals = totals_of(experts)
    grouped = GroupedExperts(experts, (0, 32), totals, "clamped_swiglu")
    x, out = random(num_tokens, HIDDEN), random(num_tokens, HIDDEN)
    slots = torch.arange(num_tokens, device=DEVICE)
    slots[2::5] = -1
    target = mix_experts(x, weights, experts, make_activation("clamped_swiglu", True), totals[0]).float()
    target[slots < 0] = 0
    grouped.mix(1, x, weights, slots, out)
    torch.testing.assert_close(out.float(), target, atol=0.02 * target.abs().max().item(), rtol=0.02)


@pytest.mark.parametrize("has_blocks", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 3, 50, 150, 200, 600])
def test_experts_in_fp8(has_blocks: bool, num_tokens: int) -> None:
    experts = mixture(16, 4)
    weights = quantised(parameters(experts, 1.0), has_blocks)
    x = random(num_tokens, HIDDEN)
    slots = torch.arange(num_tokens, device=DEVICE)
    slots[2::5] = -1
    out = torch.full_like(x, math.nan)
    GroupedExperts(experts, (0, 16), totals_of(experts)).mix(1, x, weights, slots, out)
    if num_tokens == 1:  # its inputs stay as they are
        assert_close(out, expected(x, weights, experts))
    else:
        target = expected(x, weights, experts, "groups" if has_blocks or num_tokens < 600 else "tokens")
        target[slots < 0] = 0
        assert_close_in_fp8(out, target)
    assert_close(mix_experts(x, weights, experts, silu_and_mul, totals_of(experts)[0]), expected(x, weights, experts))


@pytest.mark.parametrize("has_blocks", [False, True])
@pytest.mark.parametrize("num_tokens", [10, 40, 300, 1300])
def test_experts_in_blocks_of_128(num_tokens: int, has_blocks: bool) -> None:
    experts = dataclasses.replace(mixture(8, 2), inner_size=256)
    weights = quantised(parameters(experts, 0.0, hidden=384), has_blocks, block_rows=128)
    x = random(num_tokens, 384)
    out = torch.full_like(x, math.nan)
    GroupedExperts(experts, (0, 8), totals_of(experts)).mix(1, x, weights, None, out)
    inputs: Literal["tokens", "groups"] = "groups" if has_blocks or num_tokens < 1300 else "tokens"
    assert_close_in_fp8(out, expected(x, weights, experts, inputs))


def test_ranks_have_whole_experts_in_fp8() -> None:
    experts = mixture(12, 4)
    weights = quantised(parameters(experts, 0.0), has_blocks=False)
    assert weights.up_scale is not None
    assert weights.down_scale is not None
    x = random(24, HIDDEN)
    total = torch.zeros(x.shape, device=DEVICE)
    for first, count in ((0, 4), (4, 8)):
        ups, downs = (slice(first * rows, (first + count) * rows) for rows in (2 * INNER, HIDDEN))
        share = dataclasses.replace(
            weights,
            up=weights.up[ups],
            down=weights.down[downs],
            up_scale=weights.up_scale[ups],
            down_scale=weights.down_scale[downs],
        )
        part = torch.full_like(x, math.nan)
        GroupedExperts(experts, (first, count), totals_of(experts)).mix(1, x, share, None, part)
        total += part
    assert_close_in_fp8(total, expected(x, weights, experts, "groups"))


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_ranks_have_whole_experts(num_tokens: int) -> None:
    experts = mixture(12, 4)
    weights = parameters(experts, 0.0)
    x = random(num_tokens, HIDDEN)
    total = torch.zeros(x.shape, device=DEVICE)
    for first, count in ((0, 4), (4, 8)):
        ups = weights.up[first * 2 * INNER : (first + count) * 2 * INNER]
        downs = weights.down[first * HIDDEN : (first + count) * HIDDEN]
        part = torch.full_like(x, math.nan)
        grouped = GroupedExperts(experts, (first, count), totals_of(experts))
        grouped.mix(1, x, dataclasses.replace(weights, up=ups, down=downs), None, part)
        total += part
    assert_close(total, expected(x, weights, experts))


def test_all_tokens_choose_one_expert() -> None:
    experts = mixture(16, 1)
    weights = parameters(experts, 0.0)
    weights.router.copy_(torch.eye(16, HIDDEN) * 100)
    x = random(700, HIDDEN)
    x[:, 3] = 10
    totals = totals_of(experts)
    grouped = GroupedExperts(experts, (0, 16), totals)
    out = torch.full_like(x, math.nan)
    grouped.mix(0, x, weights, None, out)
    assert totals[0].argmax() == 3
    assert_close(out, expected(x, weights, experts))


def test_a_captured_graph_chooses_anew() -> None:
    """A replay with other inputs takes other experts: nothing of the choice is left on the host."""
    experts = mixture(32, 4)
    weights = parameters(experts, 0.0)
    grouped = GroupedExperts(experts, (0, 32), totals_of(experts))
    x = random(24, HIDDEN)
    out = torch.empty_like(x)
    for _ in range(2):
        grouped.mix(0, x, weights, None, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grouped.mix(0, x, weights, None, out)
    for _ in range(3):
        x.copy_(random(24, HIDDEN))
        graph.replay()
        assert_close(out, expected(x, weights, experts))
