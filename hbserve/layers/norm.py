"""Root mean square normalisation (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x) * weight`` over the last dimension.

    The mean is taken in float32 and the quotient rounded to ``x``'s dtype before the weight, which
    is where transformers rounds: in bf16 the order shows.
    """
    return weight * F.rms_norm(x, weight.shape, None, eps)
