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
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def silu_and_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``silu(gate) * up`` (Shazeer 2020) of ``[tokens, gate | up]``, half as wide; in ``out`` if given."""
    return _gate(F.silu, gate_up, out)


def make_activation(name: Activation, is_gated: bool) -> Activate:
    """Return the activation with or without a gate."""
    return partial(_gate if is_gated else _apply, _FUNCTIONS[name])


def _gate(function: Callable[[Tensor], Tensor], gate_up: Tensor, out: Tensor | None) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.mul(function(gate), up, out=out)


def _apply(function: Callable[[Tensor], Tensor], up: Tensor, out: Tensor | None) -> Tensor:
    activated = function(up)
    return activated if out is None else out.copy_(activated)
