"""The sampler against straightforward references, row by row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from hbserve.engine.noise import gumbel_noise
from hbserve.engine.penalties import Penalties, TokenCounts
from hbserve.engine.sampler import RandomRows, Sampled, SamplingBatch, sample

torch.set_num_threads(1)  # on busy cores, more of them wait for each other

Array = npt.NDArray[np.float64]


def random_batch(num_rows: int, vocab_size: int, device: str = "cpu", **options: Any) -> SamplingBatch:
    """All rows random, with seeds 0.. and the same options."""

    def full(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((num_rows,), value, dtype=dtype, device=device)

    rows = torch.arange(num_rows, device=device)
    return SamplingBatch(
        random=RandomRows(
            rows=rows,
            seeds=rows,
            positions=full(options.get("position", 5), torch.int64),
            temperature=full(options.get("temperature", 1.0)),
            min_p=full(options.get("min_p", 0.0)),
            truncated=rows,
            top_k=full(options.get("top_k", vocab_size), torch.int64),
            top_p=full(options.get("top_p", 1.0)),
        )
    )


def reference_distribution(
    logits: Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Array:
    """Probabilities of one row, the way `SamplingParams` describes them."""
    weights = np.exp((logits - logits.max()) / temperature)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = order[:top_k] if top_k else order
    total, mass, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if mass >= top_p * total:
            break
        nucleus.append(token)
        mass += weights[token]
    kept = [token for token in nucleus if weights[token] >= min_p * weights.max()]
    probabilities: Array = np.zeros_like(weights)
    probabilities[kept] = weights[kept] / weights[kept].sum()
    return probabilities


LOGITS = np.array([1.5, 0.3, -0.2, 2.0, 0.9, -1.0, 1.4999, 0.0, -3.0, 0.7, 1.1, -0.5])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 4},
        {"top_p": 0.5},
        {"top_p": 1e-6},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"temperature": 1.7, "top_k": 8, "top_p": 0.85, "min_p": 0.1},
    ],
)
def test_samples_follow_the_distribution(options: dict[str, Any]) -> None:
    """Pearson's chi-square over as many seeds as samples; six standard deviations are allowed."""
    count = 40_000
    logits = torch.tensor(LOGITS, dtype=torch.float32).expand(count, -1)
    token_ids = sample(logits, random_batch(count, len(LOGITS), **options)).token_ids
    observed = np.bincount(token_ids.numpy(), minlength=len(LOGITS))
    expected = reference_distribution(LOGITS, **options) * count
    assert not observed[expected == 0].any(), "a token was sampled that is cut off"
    possible = expected > 0
    chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    assert chi_square <= freedom + 6 * math.sqrt(2 * freedom)


def test_successive_positions_of_one_seed_are_independent() -> None:
    """The pair of tokens at two positions follows the product of their distributions."""
    count = 40_000
    logits = torch.zeros(count, 4)
    first, second = (sample(logits, random_batch(count, 4, position=at)).token_ids for at in (7, 8))
    observed = np.bincount((first * 4 + second).numpy(), minlength=16)
    chi_square = ((observed - count / 16) ** 2 / (count / 16)).sum()
    assert chi_square <= 15 + 6 * math.sqrt(2 * 15)


def test_ties_go_to_the_lowest_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    assert sample(logits, SamplingBatch()).token_ids.tolist() == [1, 0]
    assert sample(logits, random_batch(2, 4, top_k=1)).token_ids.tolist() == [1, 0]


def test_a_nucleus_ends_where_it_reaches_its_mass() -> None:
    """Of four equal tokens two make up one half; with the cut in between, no more."""
    token_ids = sample(torch.zeros(4000, 4), random_batch(4000, 4, top_p=0.5)).token_ids
    assert set(token_ids.tolist()) == {0, 1}


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e-3])
def test_the_lowest_temperatures_are_greedy(temperature: float) -> None:
    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(0)) * 100
    assert torch.equal(sample(logits, random_batch(50, 100, temperature=temperature)).token_ids, logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_left_alone(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 10).to(dtype)
    before = logits.clone()
    counts = torch.ones(3, 10, dtype=torch.int32)
    ones = torch.ones(3)
    rows = torch.arange(3)
    batch = SamplingBatch(
        random=random_batch(3, 10).random,
        penalties=Penalties(rows, rows, counts, ones * 2, ones, ones),
        suppressed=(rows, rows),
    )
    sample(logits, batch)
    assert torch.equal(logits, before)


# --- noise ---


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel_noise(torch.arange(200), torch.full((200,), 3), 5000).double()
    assert noise.isfinite().all()
    uniform = torch.exp(-torch.exp(-noise)).flatten().sort().values
    expected = (torch.arange(uniform.numel()) + 0.5) / uniform.numel()
    # Kolmogorov-Smirnov: beyond 2 / sqrt(n) with a probability of 0.0007
    assert (uniform - expected).abs().max() < 2 / math.sqrt(uniform.numel())


def test_noise_depends_on_seed_position_and_token_alone() -> None:
    seeds = torch.tensor([1, 1, 2, 1 + (1 << 32), -1, -(2**63), 2**63 - 1, 1])
    positions = torch.tensor([1, 2, 1, 1, 1, 1, 1, 1])
    noise = gumbel_noise(seeds, positions, 300)
    assert torch.equal(noise[0], noise[7])
    assert len({tuple(row.tolist()) for row in noise}) == 7
    for i in range(len(seeds)):
        assert torch.equal(gumbel_noise(seeds[i : i + 1], positions[i : i + 1], 300)[0], noise[i])
    assert torch.equal(gumbel_noise(seeds, positions, 1000)[:, :300], noise)
    correlation = torch.corrcoef(gumbel_noise(torch.arange(20), torch.arange(20), 20_000))
    assert (correlation - torch.eye(20)).abs().max() < 6 / math.sqrt(20_000)


def test_noise_is_finite_where_float32_rounds_to_one() -> None:
    """Token 41's bits there are among the highest 25 of all, which float32 cannot tell from 2^32."""
    assert gumbel_noise(torch.tensor([362]), torch.tensor([1]), 50).isfinite().all()


# --- penalties ---


def test_penalties_equal_their_definition() -> None:
    generator = torch.Generator().manual_seed(5)
    vocab_size = 40
    histories = [(torch.randint(vocab_size, (30,), generator=generator).tolist(), 12), ([3, 3, 3, 7], 0), ([3, 9], 2)]
    settings = [(1.3, 0.5, 0.25), (0.8, 0.0, -1.0), (2.0, 1.0, 0.0)]
    logits = torch.randn(4, vocab_size, generator=generator) * 3
    counts = TokenCounts(8, vocab_size, torch.device("cpu"))
    for slot, (history, num_prompt_tokens) in enumerate(histories):
        counts.install(slot + 2, history[:-1], min(num_prompt_tokens, len(history) - 1))
        if num_prompt_tokens < len(history):  # the last token is counted as sampled
            counts.add(torch.from_numpy(counts.row_of_slot[[slot + 2]]), torch.tensor(history[-1:]))
        else:
            counts.install(slot + 2, history, num_prompt_tokens)
    count_rows = torch.from_numpy(counts.row_of_slot[2:5])
    repetition, presence, frequency = torch.tensor(settings).unbind(1)
    rows = torch.tensor([3, 0, 1])
    scores = logits.clone()
    Penalties(rows, count_rows, counts.of(count_rows), repetition, presence, frequency).apply_(scores)

    expected = logits.double().clone()
    for row, (history, num_prompt_tokens), (repetition_, presence_, frequency_) in zip(
        (3, 0, 1), histories, settings, strict=True
    ):
        for token in range(vocab_size):
            if token in history:
                expected[row, token] *= 1 / repetition_ if expected[row, token] > 0 else repetition_
            times = history[num_prompt_tokens:].count(token)
            expected[row, token] -= frequency_ * times + presence_ * (times > 0)
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(scores[2], logits[2])


def test_token_counts_grow_and_are_reused() -> None:
    counts = TokenCounts(64, 10, torch.device("cpu"))
    for slot in range(40):
        counts.install(slot, [slot % 10], 0)
    for slot in range(0, 40, 2):
        counts.forget(slot)
        counts.forget(slot)
    for slot in range(40, 60):
        counts.install(slot, [slot % 10, slot % 10], 0)
    assert len(set(counts.row_of_slot[counts.row_of_slot >= 0])) == 40
    for slot in [*range(1, 40, 2), *range(40, 60)]:
        table_row = counts.of(torch.from_numpy(counts.row_of_slot[[slot]]))[0]
        assert table_row.nonzero().flatten().tolist() == [slot % 10]
        assert table_row[slot % 10] == (2 if slot >= 40 else 1)


def test_suppressed_tokens_are_never_sampled() -> None:
    logits = torch.zeros(4000, 5)
    logits[:, 2] = 10
    rows = torch.arange(2000)
    batch = SamplingBatch(random=random_batch(4000, 5).random, suppressed=(rows, torch.full((2000,), 2)))
    token_ids = sample(logits, batch).token_ids
    assert not (token_ids[:2000] == 2).any()
    assert set(token_ids[:2000].tolist()) == {0, 1, 3, 4}
    assert (token_ids[2000:] == 2).float().mean() > 0.99


# --- log-probabilities ---


def sample_with_logprobs(logits: torch.Tensor, rows: list[int], num_top: int) -> Sampled:
    batch = random_batch(len(logits), logits.shape[1], temperature=2.0)
    return sample(logits, SamplingBatch(random=batch.random, logprob_rows=torch.tensor(rows), num_top_logprobs=num_top))


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    sampled = sample_with_logprobs(logits, [1, 4], 7)
    assert sampled.logprobs is not None
    expected = logits.double().log_softmax(-1)[[1, 4]]
    torch.testing.assert_close(sampled.logprobs.top.double(), expected.topk(7).values, atol=1e-5, rtol=0)
    chosen = expected.gather(1, sampled.token_ids[[1, 4], None])[:, 0]
    torch.testing.assert_close(sampled.logprobs.token.double(), chosen, atol=1e-5, rtol=0)
    torch.testing.assert_close(expected.gather(1, sampled.logprobs.top_ids), expected.topk(7).values)


def test_equal_logprobs_are_ordered_by_token() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0, 5.0, 5.0, 1.0]])
    sampled = sample_with_logprobs(logits, [0], 5)
    assert sampled.logprobs is not None
    assert sampled.logprobs.top_ids.tolist() == [[1, 3, 4, 2, 5]]


# --- on a GPU ---


@pytest.mark.gpu
def test_noise_and_samples_are_the_same_on_cuda() -> None:
    """The bits are; the logarithms may round differently, so a sample may too where two scores nearly tie."""
    seeds, positions = torch.arange(-50, 50) * 7919, torch.arange(100)
    here = gumbel_noise(seeds, positions, 5000)
    there = gumbel_noise(seeds.cuda(), positions.cuda(), 5000).cpu()
    torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-5)
    logits = torch.randn(100, 5000, generator=torch.Generator().manual_seed(2)) * 3
    options: dict[str, Any] = {"temperature": 0.8, "top_k": 500, "top_p": 0.9, "min_p": 0.001}
    on_cpu = sample(logits, random_batch(100, 5000, **options)).token_ids
    on_gpu = sample(logits.cuda(), random_batch(100, 5000, device="cuda", **options)).token_ids.cpu()
    assert (on_cpu == on_gpu).sum() >= 99
