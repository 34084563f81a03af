"""Loads of experts: the tokens of a step that each expert computes, and random routers that give such loads.

Trained routers prefer some experts. The load of the expert of rank r is modelled by Zipf's law, proportional to
``r ** -skew``. With 128 experts and a skew of 0.5 the first one has six times the mean load, with 0 all are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from hbserve.model_families.declaration import Experts

_MAX_SHARE = 0.45
"""Bound of an expert's share: a normal variable exceeds a positive threshold with a probability of less than 0.5."""


def expert_shares(experts: Experts, skew: float) -> list[float]:
    """Return the share of tokens that each expert computes, the most loaded one first; the sum is ``num_chosen``."""
    if skew == 0 or experts.num_chosen > _MAX_SHARE * experts.num_experts:
        return [experts.num_chosen / experts.num_experts] * experts.num_experts
    weights = [rank**-skew for rank in range(1, experts.num_experts + 1)]
    num_bounded = 0
    while True:
        factor = (experts.num_chosen - num_bounded * _MAX_SHARE) / sum(weights[num_bounded:])
        if weights[num_bounded] * factor <= _MAX_SHARE:
            return [_MAX_SHARE] * num_bounded + [weight * factor for weight in weights[num_bounded:]]
        num_bounded += 1


def touched_experts(shares: Sequence[float], num_tokens: int) -> float:
    """Return the expected number of experts that ``num_tokens`` tokens need, if they choose independently."""
    return sum(1 - (1 - share) ** num_tokens for share in shares)


def skew_router(router: Tensor, shares: Sequence[float], generator: torch.Generator) -> None:
    """Scale the rows of a random router ``[experts, hidden]`` so that experts, in a random order, get these shares.

    With normal outputs of standard deviations s, the expert e is above a threshold t with the probability
    ``P(z > t / s[e])``. So s is proportional to ``1 / q`` for the quantile q with ``P(z > q) = share``. Its mean is 1.
    """
    scales = torch.tensor([1 / NormalDist().inv_cdf(1 - share) for share in shares])
    order = torch.randperm(len(shares), generator=generator)
    router.mul_((scales / scales.mean())[order].to(router.device, router.dtype)[:, None])
