"""Activations of the feed-forward layer in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hbserve.model_families.declaration import Activation

Activate = Callable[[Tensor, Tensor | None], Tensor]
"""Function of the first product ``[tokens, gate | up]``, or ``[tokens, up]`` without gate, and of memory for the result
or None."""

_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "xielu": lambda x: x,  # `xielu` has parameters of each layer
}


_CLAMP, _SWIGLU_ALPHA = 7.0, 1.702
"""Bound of the values, and factor in the sigmoid, of gpt-oss."""


def silu_and_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``silu(gate) * up`` (Shazeer 2020) of ``[tokens, gate | up]``, half as wide; in ``out`` if given."""
    return _gate(F.silu, gate_up, out)


def _clamped_swiglu(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``gate * sigmoid(1.702 * gate) * (up + 1)`` of clamped values, as gpt-oss has it (OpenAI 2025)."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=_CLAMP), up.clamp(-_CLAMP, _CLAMP)
    return torch.mul(up + 1, gate * torch.sigmoid(gate * _SWIGLU_ALPHA), out=out)


def xielu(up: Tensor, curve: Tensor, out: Tensor | None = None) -> Tensor:
    """Return xIELU of ``up``, in ``out`` if given (Huang and Schlag 2024): a parabola above 0, an exponential below.

    Args:
        curve: ``[4]``: two parameters that a softplus makes the slopes of, the linear part, and the bound of exponents.
    """
    above, below, slope, bound = curve.unbind()
    positive = F.softplus(above) * up * up + slope * up
    negative = (torch.expm1(torch.minimum(up, bound)) - up) * (slope + F.softplus(below)) + slope * up
    activated = torch.where(up > 0, positive, negative)
    return activated if out is None else out.copy_(activated)


def make_activation(name: Activation, is_gated: bool) -> Activate:
    """Return the activation with or without a gate."""
    if name == "clamped_swiglu":
        assert is_gated, "it has a gate"
        return _clamped_swiglu
    return partial(_gate if is_gated else _apply, _FUNCTIONS[name])


def _gate(function: Callable[[Tensor], Tensor], gate_up: Tensor, out: Tensor | None) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.mul(function(gate), up, out=out)


def _apply(function: Callable[[Tensor], Tensor], up: Tensor, out: Tensor | None) -> Tensor:
    activated = function(up)
    return activated if out is None else out.copy_(activated)
