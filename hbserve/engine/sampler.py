"""The sampler: from logits to tokens. No result of a row depends on the other rows of its batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hbserve.engine.noise import gumbel_noise
from hbserve.engine.penalties import Penalties

_MIN_TEMPERATURE = 1e-6
"""The least temperature that float32 divides by. The most likely token is certain at far higher ones."""


@dataclass(frozen=True)
class RandomRows:
    """The R rows that are not greedy.

    Attributes:
        rows: int64 ``[R]``, rows of the logits.
        seeds, positions: int64 ``[R]``: of the request, and of the token that is sampled.
        temperature, min_p: float32 ``[R]``.
        truncated: int64 ``[T]``, those of the R that have top-k or top-p; None if there are none.
        top_k: int64 ``[T]``, the vocabulary size where off. top_p: float32 ``[T]``.
    """

    rows: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    temperature: torch.Tensor
    min_p: torch.Tensor
    truncated: torch.Tensor | None = None
    top_k: torch.Tensor | None = None
    top_p: torch.Tensor | None = None


@dataclass(frozen=True)
class Biases:
    """Logit biases, pairwise ``[B]``: float32 ``values`` to add to the scores of int64 rows and token ids."""

    rows: torch.Tensor
    token_ids: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class AllowedTokens:
    """The tokens that may be sampled in the int64 rows ``[C]``.

    Attributes:
        words: int32 ``[C, ceil(vocab / 32)]``; bit i of word w is token ``32 * w + i``.
    """

    rows: torch.Tensor
    words: torch.Tensor

    def apply_(self, scores: torch.Tensor) -> None:
        """Set the scores of all other tokens of these rows to minus infinity, in place."""
        bits = torch.arange(32, dtype=torch.int32, device=scores.device)
        allowed = ((self.words[:, :, None] >> bits) & 1).flatten(1)[:, : scores.shape[1]]
        scores[self.rows] = scores[self.rows].masked_fill(allowed == 0, -torch.inf)


@dataclass(frozen=True)
class SamplingBatch:
    """Sampling of N rows of logits. A part is None if no row asks for it. All tensors are on the logits' device.

    Attributes:
        suppressed: tokens that must not be sampled: rows and token ids, int64, pairwise.
        logprob_rows: int64, rows whose log-probabilities are reported.
        num_top_logprobs: how many most likely tokens are reported with them.
    """

    random: RandomRows | None = None
    penalties: Penalties | None = None
    biases: Biases | None = None
    suppressed: tuple[torch.Tensor, torch.Tensor] | None = None
    allowed: AllowedTokens | None = None
    logprob_rows: torch.Tensor | None = None
    num_top_logprobs: int = 0


@dataclass(frozen=True)
class SampledLogprobs:
    """Natural log-probabilities of the rows that asked, before penalties and temperature.

    Attributes:
        token: float32 ``[L]``, of the sampled token.
        top_ids, top: int64 and float32 ``[L, num_top_logprobs]``, the most likely, best first.
    """

    token: torch.Tensor
    top_ids: torch.Tensor
    top: torch.Tensor


@dataclass(frozen=True)
class Sampled:
    """Sampled tokens. Attributes: token_ids: int64 ``[N]``."""

    token_ids: torch.Tensor
    logprobs: SampledLogprobs | None


def sample(logits: torch.Tensor, batch: SamplingBatch) -> Sampled:
    """Choose a token for each row of ``logits [N, vocab]``, which are not changed.

    Greedy rows take the highest score; other rows draw by the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014). The
    lowest token id wins among equal scores.
    """
    scores = logits
    if any(change is not None for change in (batch.penalties, batch.biases, batch.suppressed, batch.allowed)):
        scores = logits.to(torch.float32, copy=True)
        if batch.penalties is not None:
            batch.penalties.apply_(scores)
        if batch.biases is not None:
            scores[batch.biases.rows, batch.biases.token_ids] += batch.biases.values
        if batch.suppressed is not None:
            scores[batch.suppressed] = -torch.inf
        if batch.allowed is not None:
            batch.allowed.apply_(scores)
    token_ids = scores.argmax(-1)
    if batch.random is not None:
        token_ids[batch.random.rows] = _draw(scores[batch.random.rows].float(), batch.random)
    logprobs = None
    if batch.logprob_rows is not None:
        rows = batch.logprob_rows
        logprobs = _logprobs(logits[rows], token_ids[rows], batch.num_top_logprobs)
    return Sampled(token_ids, logprobs)


def _draw(scores: torch.Tensor, random: RandomRows) -> torch.Tensor:
    # with the highest score at 0, no temperature overflows and min-p is one comparison
    scores = scores - scores.amax(-1, keepdim=True)
    scores /= random.temperature.clamp_min(_MIN_TEMPERATURE)[:, None]
    if random.truncated is not None:
        assert random.top_k is not None, "truncated rows need top_k"
        assert random.top_p is not None, "truncated rows need top_p"
        scores[random.truncated] = _truncate(scores[random.truncated], random.top_k, random.top_p)
    scores.masked_fill_(scores < random.min_p.log()[:, None], -torch.inf)
    scores += gumbel_noise(random.seeds, random.positions, scores.shape[1])
    return scores.argmax(-1)


def _truncate(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Set all scores to minus infinity but the top-k, and among these the top-p (Holtzman et al. 2020)."""
    ordered, token_ids = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[1], device=scores.device)
    keep = rank < top_k[:, None]
    probabilities = ordered.masked_fill(~keep, -torch.inf).softmax(-1)
    better = F.pad(probabilities.cumsum(-1)[:, :-1], (1, 0))
    # a sum of float32 probabilities may reach 1 before the last token; top_p = 1 must keep all tokens
    keep &= (better < top_p[:, None]) | (top_p >= 1)[:, None]
    return scores.masked_fill(~torch.empty_like(keep).scatter_(1, token_ids, keep), -torch.inf)


def _logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> SampledLogprobs:
    logprobs = logits.float().log_softmax(-1)
    return SampledLogprobs(logprobs.gather(1, token_ids[:, None])[:, 0], *most_likely(logprobs, num_top))


def most_likely(logprobs: torch.Tensor, num_top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and log-probabilities ``[rows, num_top]`` of the most likely tokens, best first."""
    top, top_ids = logprobs.topk(num_top, dim=-1)
    # topk does not define the order of equal values: put the lowest token id first
    top_ids, order = top_ids.sort(dim=-1)
    top, best_first = top.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return top_ids.gather(1, best_first), top
