"""A mixture of experts in plain torch: one product after the other for the experts that a step needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hbserve.layers.activations import Activate
from hbserve.model_families.declaration import Experts


def mix_experts(x: Tensor, router: Tensor, up: Tensor, down: Tensor, experts: Experts, activate: Activate) -> Tensor:
    """Compute each token by its experts: ``[tokens, hidden]``, in the order and with the roundings of transformers.

    Args:
        x: ``[tokens, hidden]``.
        router: ``[experts, hidden]``.
        up: ``[experts * 2 * inner, hidden]``, the rows ``gate | up`` of one expert after the other.
        down: ``[experts * hidden, inner]``.
        activate: one of `ACTIVATIONS`.
    """
    scores = F.linear(x, router).softmax(-1, dtype=torch.float32)
    weights, chosen = scores.topk(experts.num_chosen, dim=-1)
    if experts.is_renormalised:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights.to(x.dtype)
    ups, downs = up.view(experts.num_experts, -1, up.shape[1]), down.view(experts.num_experts, -1, down.shape[1])
    out = torch.zeros_like(x)
    for expert in torch.unique(chosen).tolist():
        tokens, place = (chosen == expert).nonzero(as_tuple=True)
        inner = activate(F.linear(x[tokens], ups[expert]), None)
        out.index_add_(0, tokens, F.linear(inner, downs[expert]) * weights[tokens, place, None])
    return out
