"""Norms in plain torch, over the last dimension. With m the mean of the squares of x, and w the weight::

    rms        w * round(x / sqrt(m + eps))              Zhang and Sennrich 2019, rounded as Llama's code does
    olmo_rms   round(w * x / sqrt(m + eps))
    gemma_rms  round((1 + w) * x / sqrt(m + eps))
    layer      w * (x - mean) / sqrt(variance + eps) + b    Ba et al. 2016; the parameters are ``w | b`` in one vector
    layer_1p   the same with 1 + w
    plain_layer  round(w * (x - mean) / sqrt(variance + eps)), without b; w may differ by head

``round`` is to the dtype of x; all else is computed in float32. In bfloat16 the order of both changes the result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from hbserve.model_families.declaration import NormKind

Norm = Callable[[Tensor, Tensor, float], Tensor]
"""Function of x, the parameters and epsilon."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``x / rms(x) * weight``; the quotient is rounded to the dtype of ``x`` first."""
    return weight * F.rms_norm(x, weight.shape, None, eps)


def _olmo_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (weight.float() * F.rms_norm(x.float(), weight.shape, None, eps)).to(x.dtype)


def _gemma_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return ((1 + weight.float()) * F.rms_norm(x.float(), weight.shape, None, eps)).to(x.dtype)


def _layer_norm(x: Tensor, parameters: Tensor, eps: float) -> Tensor:
    weight, bias = parameters.chunk(2)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _layer_norm_1p(x: Tensor, parameters: Tensor, eps: float) -> Tensor:
    weight, bias = parameters.chunk(2)
    return F.layer_norm(x, weight.shape, weight + 1, bias, eps)


def _plain_layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (F.layer_norm(x.float(), weight.shape[-1:], None, None, eps) * weight.float()).to(x.dtype)


NORMS: dict[NormKind, Norm] = {
    "rms": rms_norm,
    "olmo_rms": _olmo_rms_norm,
    "gemma_rms": _gemma_rms_norm,
    "layer": _layer_norm,
    "layer_1p": _layer_norm_1p,
    "plain_layer": _plain_layer_norm,
}
