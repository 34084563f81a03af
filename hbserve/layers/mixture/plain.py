"""A mixture of experts in plain torch: one product after the other for the experts that a step needs.

It is the reference for `hbserve.layers.mixture.grouped`, which computes the same on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hbserve.layers.activations import Activate
from hbserve.layers.fp8 import Quantised
from hbserve.layers.linear import Linear
from hbserve.model_families.declaration import Experts


@dataclass(frozen=True)
class ExpertWeights:
    """Parameters of the experts of one layer; a rank has some of the experts, or a slice of every expert.

    Attributes:
        router: ``[experts, hidden]``; float32 where there is a bias.
        up: ``[local experts * 2 * inner, hidden]``, the rows ``gate | up`` of one expert after the other.
        down: ``[local experts * hidden, inner]``.
        router_bias: float32 ``[experts]``, added to the scores for the choice.
        logit_bias: ``[experts]``, added to the router's outputs; None: there is none.
        up_bias, down_bias: ``[local experts * 2 * inner]`` and ``[local experts * hidden]``; None: there is none, or
            another rank adds that of the down projections.
        up_scale, down_scale: float32 scales of ``up`` and ``down`` where these are FP8: of each row ``[rows]``, or of
            blocks of r x 128, ``[rows / r, ceil(columns / 128)]``. Inputs stay in the model's dtype.
        shared_up, shared_down: layers ``[2 * inner, hidden]`` and ``[hidden, inner]`` of the expert that computes every
            token, of any weight scheme.
        shared_gate: ``[1, hidden]``, makes the weight of that expert; None: the weight is 1.
    """

    router: Tensor
    up: Tensor
    down: Tensor
    router_bias: Tensor | None = None
    logit_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    up_scale: Tensor | None = None
    down_scale: Tensor | None = None
    shared_up: Linear | None = None
    shared_down: Linear | None = None
    shared_gate: Tensor | None = None


def router_logits(x: Tensor, weights: ExpertWeights, experts: Experts) -> Tensor:
    """Return the router's outputs ``[tokens, experts]``, in float32 if a bias counts in the choice, else as ``x``."""
    return F.linear(x.float() if experts.has_bias else x, weights.router, weights.logit_bias)


def choose_experts(logits: Tensor, bias: Tensor | None, experts: Experts) -> tuple[Tensor, Tensor]:
    """Return weights, in the dtype of ``logits``, and indices of each token's experts, both ``[tokens, chosen]``."""
    scores = logits.softmax(-1, dtype=torch.float32) if experts.scoring == "softmax" else logits.float().sigmoid()
    ranked = scores if bias is None else scores + bias
    if experts.num_groups > 1:
        groups = ranked.view(len(ranked), experts.num_groups, -1)
        best = groups.topk(2, dim=-1).values.sum(-1).topk(experts.num_chosen_groups, dim=-1).indices
        is_open = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
        ranked = groups.masked_fill(~is_open[..., None], float("-inf")).flatten(1)
    chosen = ranked.topk(experts.num_chosen, dim=-1).indices
    weights = scores.gather(1, chosen)
    if experts.is_renormalised:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return (weights * experts.scale).to(logits.dtype), chosen


def mix_experts(
    x: Tensor,
    weights: ExpertWeights,
    experts: Experts,
    activate: Activate,
    totals: Tensor,
    first_expert: int = 0,
) -> Tensor:
    """Compute each token by its experts: ``[tokens, hidden]``, in the order and with the roundings of transformers.

    The expert that computes every token is left out.

    Args:
        x: ``[tokens, hidden]``.
        activate: with a gate.
        totals: int64 ``[experts]``; the tokens of each expert are added.
        first_expert: index of the first expert in ``weights``; the result lacks the experts that are not there.
    """
    logits = router_logits(x, weights, experts)
    token_weights, chosen = choose_experts(logits, weights.router_bias, experts)
    totals += torch.bincount(chosen.flatten(), minlength=experts.num_experts)
    downs = weights.down.view(-1, x.shape[1], weights.down.shape[1])
    ups = weights.up.view(len(downs), -1, x.shape[1])
    out = torch.zeros_like(x)
    for expert in torch.unique(chosen).tolist():
        local = expert - first_expert
        if not 0 <= local < len(downs):
            continue
        tokens, place = (chosen == expert).nonzero(as_tuple=True)
        up_bias, down_bias = (
            None if bias is None else bias.view(len(downs), -1)[local] for bias in (weights.up_bias, weights.down_bias)
        )
        inner = activate(F.linear(x[tokens], _plain(ups, weights.up_scale, local, x.dtype), up_bias), None)
        product = F.linear(inner, _plain(downs, weights.down_scale, local, x.dtype), down_bias)
        out.index_add_(0, tokens, (product * token_weights[tokens, place, None]).to(out.dtype))
    return out


def _plain(matrices: Tensor, scale: Tensor | None, expert: int, dtype: torch.dtype) -> Tensor:
    """Return one of the ``matrices [experts, rows, columns]`` in ``dtype``."""
    if scale is None:
        return matrices[expert]
    num_experts, num_rows, _ = matrices.shape
    scales = scale.view(num_experts, -1, 1 if scale.dim() == 1 else scale.shape[1])[expert]
    scales = scales.repeat_interleave(num_rows // len(scales), dim=0)
    return Quantised(matrices[expert], scales).dequantised().to(dtype)
