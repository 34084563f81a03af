"""Activations of the feed-forward layer in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Activate = Callable[[Tensor, Tensor | None], Tensor]
"""Function of the first product ``[tokens, gate | up]``, or ``[tokens, up]`` without gate, and of memory for the result
or None."""


def silu_and_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``silu(gate) * up`` (Shazeer 2020) of ``[tokens, gate | up]``, half as wide; in ``out`` if given."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.mul(F.silu(gate), up, out=out)


def _gelu_and_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.mul(F.gelu(gate, approximate="tanh"), up, out=out)


def _gelu(up: Tensor, out: Tensor | None = None) -> Tensor:
    activated = F.gelu(up, approximate="tanh")
    return activated if out is None else out.copy_(activated)


ACTIVATIONS: dict[tuple[str, bool], Activate] = {
    ("silu", True): silu_and_mul,
    ("gelu_tanh", True): _gelu_and_mul,
    ("gelu_tanh", False): _gelu,
}
"""By name and whether there is a gate."""
