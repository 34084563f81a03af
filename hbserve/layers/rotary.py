"""Rotary position embedding (Su et al. 2021, RoFormer), in the half-rotation form of GPT-NeoX."""

from __future__ import annotations

import math

import torch

from hbserve.model_spec import RopeSpec


class RotaryEmbedding:
    """Cosines and sines of positions, in float32 whatever the model's dtype.

    They are computed once a step, not looked up: a table would be a second arena to share.
    """

    def __init__(self, rope: RopeSpec, head_dim: int, device: torch.device) -> None:
        self.inverse_frequencies = inverse_frequencies(rope, head_dim).to(device)
        self.magnitude = rope.magnitude

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, float32 ``[tokens, 1, head_dim / 2]``, of integer positions ``[tokens]``."""
        angles = (positions.float()[:, None] * self.inverse_frequencies)[:, None]
        return angles.cos() * self.magnitude, angles.sin() * self.magnitude


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads ``[tokens, heads, head_dim]`` turned by the angles of `RotaryEmbedding.angles`; same dtype."""
    first, second = heads.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """Radians per position, float32 ``[head_dim / 2]`` on the CPU, rounded as transformers rounds them."""
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _stretch_low(rope, frequencies)
    if rope.kind == "yarn":
        return _stretch_slow(rope, frequencies)
    return frequencies


def _stretch_low(rope: RopeSpec, frequencies: torch.Tensor) -> torch.Tensor:
    context, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / frequencies
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    stretched = torch.where(wavelength > context / low, frequencies / rope.factor, between)
    return torch.where(wavelength < context / high, frequencies, stretched)


def _stretch_slow(rope: RopeSpec, frequencies: torch.Tensor) -> torch.Tensor:
    num_pairs, context = len(frequencies), rope.original_max_position_embeddings

    def pair_that_turns(times: float) -> float:
        return num_pairs * math.log(context / (times * 2 * math.pi)) / math.log(rope.theta)

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * num_pairs - 1)
    pairs = torch.arange(num_pairs, dtype=torch.float)
    kept = 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
    return frequencies / rope.factor * (1 - kept) + frequencies * kept
