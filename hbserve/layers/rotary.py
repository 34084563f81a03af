"""Rotary position embedding (Su et al. 2021, RoFormer), in the half-rotation form of GPT-NeoX."""

from __future__ import annotations

import torch

from hbserve.model_spec import RopeSpec


class RotaryEmbedding:
    """Cosines and sines of positions, in float32 whatever the model's dtype.

    They are computed once a step, not looked up: a table would be a second arena to share.
    """

    def __init__(self, rope: RopeSpec, head_dim: int, device: torch.device) -> None:
        self.inverse_frequencies = rope.inverse_frequencies(head_dim).to(device)
        self.magnitude = rope.magnitude

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, float32 ``[tokens, 1, head_dim / 2]``, of integer positions ``[tokens]``."""
        angles = (positions.float()[:, None] * self.inverse_frequencies)[:, None]
        return angles.cos() * self.magnitude, angles.sin() * self.magnitude


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads ``[tokens, heads, head_dim]`` turned by the angles of `RotaryEmbedding.angles`; same dtype."""
    first, second = heads.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)
