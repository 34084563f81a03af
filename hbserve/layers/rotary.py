"""Rotary position embedding (Su et al. 2021, RoFormer), in the half-rotation form of GPT-NeoX."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class RopeSpec:
    """Frequencies of a rotary embedding.

    Attributes:
        kind: ``default``; ``linear``, all frequencies divided by ``factor``; ``llama3``, only the
            low ones divided, with a smooth passage between (Llama 3.1); ``yarn``, likewise, with a
            passage that is linear in the pair of dimensions (Peng et al. 2023, YaRN, section 3.2).
        theta: base of the frequencies.
        factor: by how much the context is stretched.
        low_freq_factor, high_freq_factor, original_max_position_embeddings: of ``llama3``: waves
            longer than ``original / low`` positions are stretched, shorter than ``original / high`` not.
        beta_fast, beta_slow: of ``yarn``: pairs that turn more often than ``beta_fast`` within the original context
            are not stretched, those that turn less often than ``beta_slow`` are.
        truncate: of ``yarn``: the passage begins and ends at whole pairs.
        magnitude: cosines and sines are multiplied by it (YaRN, section 3.3).
    """

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """Radians per position, float32 ``[head_dim / 2]`` on the CPU, rounded as transformers rounds them."""
        frequencies = 1.0 / (self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
        if self.kind == "linear":
            return frequencies / self.factor
        if self.kind == "llama3":
            return self._stretch_low(frequencies)
        if self.kind == "yarn":
            return self._stretch_slow(frequencies)
        return frequencies

    def _stretch_low(self, frequencies: torch.Tensor) -> torch.Tensor:
        context, low, high = self.original_max_position_embeddings, self.low_freq_factor, self.high_freq_factor
        wavelength = 2 * math.pi / frequencies
        smooth = (context / wavelength - low) / (high - low)
        between = (1 - smooth) * frequencies / self.factor + smooth * frequencies
        stretched = torch.where(wavelength > context / low, frequencies / self.factor, between)
        return torch.where(wavelength < context / high, frequencies, stretched)

    def _stretch_slow(self, frequencies: torch.Tensor) -> torch.Tensor:
        num_pairs, context = len(frequencies), self.original_max_position_embeddings

        def pair_that_turns(times: float) -> float:
            return num_pairs * math.log(context / (times * 2 * math.pi)) / math.log(self.theta)

        first, last = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * num_pairs - 1)
        pairs = torch.arange(num_pairs, dtype=torch.float)
        kept = 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
        return frequencies / self.factor * (1 - kept) + frequencies * kept


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
