"""Log-probabilities of prompt tokens, computed beside the prompt's KV. Runs in the worker's main thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hbserve.engine.sampler import most_likely
from hbserve.messages.base import TokenLogprobs

_MAX_LOGITS = 1 << 23
"""Logits at a time: 32 MiB in float32. A chunk's rows are reduced in pieces, so a long prompt needs no more memory."""


@dataclass(frozen=True)
class ScoredTokens:
    """The S places of a step whose next tokens' log-probabilities are reported.

    Attributes:
        places: int64 ``[S]``, in the flat batch. next_token_ids: int64 ``[S]``, the tokens after them.
        rows: on the host, for each row of the plan that reports any: how many places it has, and how many most likely
            tokens are reported at each.
    """

    places: torch.Tensor
    next_token_ids: torch.Tensor
    rows: list[tuple[int, int]]


@dataclass(frozen=True)
class PromptScores:
    """Natural log-probabilities at S places.

    Attributes:
        token: float32 ``[S]``, of the next token; rank: int64 ``[S]``, its place among all tokens, from 1.
        top_ids, top: int64 and float32 ``[S, k]``, the most likely, best first.
        rows: as in `ScoredTokens`.
    """

    token: torch.Tensor
    rank: torch.Tensor
    top_ids: torch.Tensor
    top: torch.Tensor
    rows: list[tuple[int, int]]

    def map(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> PromptScores:
        """Return the same with every tensor copied."""
        return PromptScores(copy(self.token), copy(self.rank), copy(self.top_ids), copy(self.top), self.rows)

    def to_lists(self) -> list[list[TokenLogprobs]]:
        """Return the entries of each row; the tensors are on the host."""
        lists, begin = [], 0
        for length, num_top in self.rows:
            part = slice(begin, begin + length)
            begin += length
            values = zip(
                self.token[part].tolist(),
                self.rank[part].tolist(),
                self.top_ids[part, :num_top].tolist(),
                self.top[part, :num_top].tolist(),
                strict=True,
            )
            lists.append([TokenLogprobs(token=t, rank=r, top_ids=ids, top=top) for t, r, ids, top in values])
        return lists


def score(
    hidden: torch.Tensor, scored: ScoredTokens, logits_of: Callable[[torch.Tensor], torch.Tensor], vocab_size: int
) -> PromptScores:
    """Reduce the logits of a step's scored places to what is reported.

    Args:
        hidden: ``[tokens, hidden size]``, of the whole step.
        logits_of: computes logits ``[rows, vocab]``; all ranks call it for the same pieces.
    """
    num_top = max(number for _, number in scored.rows)
    piece = max(1, _MAX_LOGITS // vocab_size)
    parts = [
        _score(logits_of(hidden[places]), token_ids, num_top)
        for places, token_ids in zip(_split(scored.places, piece), _split(scored.next_token_ids, piece), strict=True)
    ]
    token, rank, top_ids, top = (torch.cat(values) for values in zip(*parts, strict=True))
    return PromptScores(token, rank, top_ids, top, scored.rows)


def _split(x: torch.Tensor, size: int) -> list[torch.Tensor]:
    return [x[begin : begin + size] for begin in range(0, len(x), size)]


def _score(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> tuple[torch.Tensor, ...]:
    logprobs = logits.float().log_softmax(-1)
    token = logprobs.gather(1, token_ids[:, None])
    rank = (logprobs > token).sum(-1) + 1
    top_ids, top = most_likely(logprobs, num_top)
    return token[:, 0], rank, top_ids, top
