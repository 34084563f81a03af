"""Rotary position embedding (Su et al. 2021, RoFormer), in the half-rotation form of GPT-NeoX.

Some models turn only the first dimensions of a head: ``head_dim`` stands for their number here. Some pair dimensions
``2 i`` and ``2 i + 1``. Pair i of a head, dimensions i and ``head_dim / 2 + i``, turns by ``position * f[i]`` radians::

    default   f[i] = theta ** (-2 i / head_dim)
    linear    f[i] / factor
    llama3    f[i] / factor where the wavelength 2 pi / f[i] > context / low_freq_factor,
              f[i] where it is < context / high_freq_factor, between them a blend
    yarn      f[i] / factor where the pair turns < beta_slow times in the context, f[i] where it turns > beta_fast
              times, between them a blend; cosines and sines times ``magnitude``
    longrope  f[i] / factor[i], with a list of factors; cosines and sines times ``magnitude``

``context`` is ``original_max_position_embeddings``, the context length of the training before the stretch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hbserve.rope_spec import RopeSpec


class RotaryEmbedding:
    """Turns heads by positions; cosines and sines are in float32 whatever the model's dtype is.

    They are computed where they are needed and not looked up: a table would be a second arena to share.

    Attributes:
        rotated_dim: number of dimensions of a head that turn, the first ones.
        is_interleaved: pairs are neighbouring dimensions.
        inverse_frequencies: float32 ``[rotated_dim / 2]``. magnitude: factor of cosines and sines.
        mix_stages: log2 of the pairs that `mix` mixes; 0 where they are no power of two, and it does nothing.
        query_growth: see `RopeSpec`.
    """

    def __init__(self, rope: RopeSpec, head_dim: int, device: torch.device) -> None:
        self.rotated_dim = rope.rotated_dim or head_dim
        self._is_partial = self.rotated_dim < head_dim
        self.is_interleaved = rope.is_interleaved
        self._rotate = rotate_neighbours if rope.is_interleaved else rotate
        self.mix_stages = num_mixed_pairs(head_dim).bit_length() - 1
        self._lanes = _lanes(self.rotated_dim, head_dim, rope.is_interleaved).to(device)
        self._places = self._lanes.argsort()
        self.inverse_frequencies = inverse_frequencies(rope, self.rotated_dim).to(device)
        self.magnitude, self.query_growth = rope.magnitude, rope.query_growth
        self._original_context = rope.original_max_position_embeddings

    def query_lengths(self, positions: Tensor) -> Tensor:
        """Compute factors of queries, float32 ``[tokens]``; see `RopeSpec.query_growth`."""
        return 1 + self.query_growth * torch.log(1 + torch.floor(positions / self._original_context))

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute cosine and sine, float32 ``[tokens, 1, pairs]``, of integer positions ``[tokens]``."""
        angles = (positions.float()[:, None] * self.inverse_frequencies)[:, None]
        return angles.cos() * self.magnitude, angles.sin() * self.magnitude

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn heads ``[tokens, heads, head_dim]`` by `angles`; same dtype."""
        if not self._is_partial:
            return self._rotate(heads, cos, sin)
        turned, rest = heads[..., : self.rotated_dim], heads[..., self.rotated_dim :]
        return torch.cat((self._rotate(turned, cos, sin), rest), dim=-1)

    def mix(self, heads: Tensor) -> Tensor:
        """Mix the pairs of heads by a Hadamard matrix: products of queries and keys that are mixed stay the same.

        A key in FP8 is off by a share of each of its numbers. Pairs that turn slowly have the largest numbers, in
        queries as in keys, so a product would be off by more than its share. See docs/quantization.md.

        Returns:
            ``[tokens, heads, head_dim]``, same dtype; the input itself where `mix_stages` is 0.
        """
        if not self.mix_stages:
            return heads
        lanes = heads[..., self._lanes].float().view(*heads.shape[:-1], 2, -1)
        return hadamard(lanes, self.mix_stages).view(heads.shape)[..., self._places].to(heads.dtype)


def num_mixed_pairs(head_dim: int) -> int:
    """Return how many pairs of a head `RotaryEmbedding.mix` mixes with each other: all, or 1 where it does nothing."""
    return head_dim // 2 if head_dim.bit_count() == 1 else 1


def identity_rotation(head_dim: int, device: torch.device) -> RotaryEmbedding:
    """Return a rotary embedding that turns nothing, for kernels of layers without one."""
    rotary = RotaryEmbedding(RopeSpec(theta=1.0), head_dim, device)
    rotary.inverse_frequencies.zero_()
    return rotary


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads ``[tokens, heads, head_dim]`` by the angles of `RotaryEmbedding.angles`; same dtype."""
    first, second = heads.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)


def rotate_neighbours(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Do what `rotate` does, with dimensions ``2 i`` and ``2 i + 1`` as pair i."""
    first, second = heads.float().view(*heads.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.flatten(-2).to(heads.dtype)


def hadamard(x: Tensor, stages: int) -> Tensor:
    """Multiply the last dimension by a Hadamard matrix over its root (Walsh's, in Sylvester's order).

    Args:
        x: float32, with 2 ** stages elements in its last dimension.
    """
    shape = x.shape
    for stage in range(stages):
        a, b = x.reshape(*shape[:-1], 1 << stage, 2, -1).unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2)
    return x.reshape(shape) * 2 ** (-stages / 2)


def _lanes(rotated_dim: int, head_dim: int, is_interleaved: bool) -> Tensor:
    """List the dimensions of a head: the first of each pair, then the second ones. The rest are taken as pairs, too."""
    turning = torch.arange(rotated_dim)
    turning = turning.view(-1, 2).t() if is_interleaved else turning.view(2, -1)
    return torch.cat((turning, torch.arange(rotated_dim, head_dim).view(2, -1)), dim=1).flatten()


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Compute f, in radians per position: float32 ``[head_dim / 2]`` on the CPU, rounded as transformers rounds."""
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "longrope":
        powers = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        return 1.0 / (torch.tensor(rope.pair_factors) * rope.theta**powers)
    if rope.kind == "llama3":
        return _llama3_frequencies(rope, frequencies)
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, frequencies)
    return frequencies


def _llama3_frequencies(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """Stretch long waves; the blend is linear in ``context / wavelength`` (Llama 3.1)."""
    context, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / frequencies
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    stretched = torch.where(wavelength > context / low, frequencies / rope.factor, between)
    return torch.where(wavelength < context / high, frequencies, stretched)


def _yarn_frequencies(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """Stretch slow pairs; the blend is linear in the pair's index (Peng et al. 2023, YaRN, section 3.2)."""
    num_pairs, context = len(frequencies), rope.original_max_position_embeddings

    def pair_with_turns(num_turns: float) -> float:
        return num_pairs * math.log(context / (num_turns * 2 * math.pi)) / math.log(rope.theta)

    first, last = pair_with_turns(rope.beta_fast), pair_with_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * num_pairs - 1)
    pairs = torch.arange(num_pairs, dtype=torch.float)
    kept = 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
    return frequencies / rope.factor * (1 - kept) + frequencies * kept
