"""FP8 linear layers in plain torch: the reference for `hbserve.layers.fp8_kernels`, and what a CPU computes.

Weights and inputs are e4m3 (`hbserve.float8`). With q the rounding to it, and a scale s for each row of the weight, or
for each of its blocks of 128 x 128::

    weight     W[n, k] ~ s[n] Q[n, k]
    input      t = max |x| / 448 over a token (over 128 inputs where weights have blocks), or from the checkpoint;
               where inputs have an upper bound, t is at most the bound over 448
               X[m, k] = q(x[m, k] / t[m])
    output     y[m, n] = t[m] s[n] sum over k of X[m, k] Q[n, k]  + bias, summed in float32, rounded once

Inputs are quantised whatever the number of rows is, so a token's values do not depend on the batch it is in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hbserve.float8 import FP8_MAX, rounded, widened
from hbserve.layers.linear import Linear
from hbserve.weight_format import BLOCK_SIZE

_NUM_SCALES, _MAX_SAMPLED_COLUMNS = 8, 1024
_MIN_PEAK = 1e-12
"""The least peak of a token, so that a token of zeros has a scale."""


@dataclass(frozen=True)
class Quantised:
    """Rows in FP8: ``values [rows, columns]`` and ``scales`` in float32, ``[rows, 1]`` or ``[rows, groups]``."""

    values: Tensor
    scales: Tensor

    def __getitem__(self, rows: slice) -> Quantised:
        return Quantised(self.values[rows], self.scales[rows])

    def dequantised(self) -> Tensor:
        """Return the rows in float32."""
        if self.scales.shape[1] == 1:
            return widened(self.values) * self.scales
        scales = self.scales.repeat_interleave(BLOCK_SIZE, dim=1)[:, : self.values.shape[1]]
        return widened(self.values) * scales


def quantise(
    x: Tensor, scale: Tensor | None = None, *, is_grouped: bool = False, max_input: float | None = None
) -> Quantised:
    """Quantise rows ``[rows, columns]``.

    Args:
        scale: float32 ``[1]``, of all rows; None: each row, or group of 128 columns, has its own.
        max_input: larger values are clipped to it, where each row has a scale; None: none are.
    """
    values = x.float()
    if scale is not None:
        scales = scale.expand(len(x), 1)
        return Quantised(rounded(values * (1 / scales)), scales)
    if not is_grouped:
        peaks = values.abs().amax(1, keepdim=True).clamp(min=_MIN_PEAK, max=max_input)
        return Quantised(rounded(values * (FP8_MAX / peaks)), peaks / FP8_MAX)
    num_columns = x.shape[1]
    groups = F.pad(values, (0, -num_columns % BLOCK_SIZE)).view(len(x), -1, BLOCK_SIZE)
    peaks = groups.abs().amax(2).clamp(min=_MIN_PEAK)
    flat = rounded(groups * (FP8_MAX / peaks)[:, :, None])
    return Quantised(flat.flatten(1)[:, :num_columns], peaks / FP8_MAX)


def quantise_weight(weight: Tensor) -> Quantised:
    """Quantise a matrix ``[rows, columns]`` such that each row's squared error is small.

    FP8's steps double at powers of two. A row's error therefore depends on where its values lie between two of them:
    the best of scales from the least one, whose largest value is FP8's, to almost its double saves a tenth of it.
    Some columns are enough to choose by.
    """
    values = weight.float()
    least = values.abs().amax(1, keepdim=True).clamp(min=_MIN_PEAK) / FP8_MAX
    sample = values[:, :: -(-values.shape[1] // _MAX_SAMPLED_COLUMNS)]
    errors = []
    for step in range(_NUM_SCALES):
        scales = least * 2 ** (step / _NUM_SCALES)
        errors.append((widened(rounded(sample / scales)) * scales - sample).square().sum(1, keepdim=True))
    scales = least * 2 ** (torch.stack(errors).argmin(0) / _NUM_SCALES)
    return Quantised(rounded(values / scales), scales)


class Fp8Linear(Linear):
    """A linear layer with FP8 weights and inputs.

    Args:
        weight: FP8 ``[outputs, inputs]``.
        scale: float32 ``[outputs]``, or ``[outputs / r, ceil(inputs / 128)]`` for blocks of r x 128; r divides 128.
        bias: ``[outputs]`` or None.
        input_scales: float32, scales of the inputs from the checkpoint, one of each stacked matrix; the largest counts,
            because the matrices read one input. None: scales are computed.
        dtype: dtype of inputs and outputs.
        max_input: larger inputs are clipped to it; None: none are. Only where each token has a scale.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        input_scales: Tensor | None,
        dtype: torch.dtype,
        max_input: float | None = None,
    ) -> None:
        self.weight, self.scale, self.bias, self.dtype = weight, scale, bias, dtype
        self.num_outputs, self.num_weights = weight.shape[0], weight.numel()
        self.has_blocks = scale.dim() == 2
        self.block_rows = self.num_outputs // scale.shape[0]
        self.input_scale = None if input_scales is None else input_scales.amax().reshape(1)
        self.max_input = max_input
        self.bound = None if max_input is None else scale.new_full((1,), max_input)
        assert max_input is None or (not self.has_blocks and input_scales is None), "only tokens' scales are bounded"

    def quantise_input(self, x: Tensor) -> Quantised:
        """Quantise inputs ``[rows, inputs]``."""
        return quantise(x, self.input_scale, is_grouped=self.has_blocks, max_input=self.max_input)

    def dequantised_weight(self) -> Tensor:
        """Return the weight in float32."""
        if not self.has_blocks:
            return widened(self.weight) * self.scale[:, None]
        return Quantised(self.weight, self.scale.repeat_interleave(self.block_rows, dim=0)).dequantised()

    def __call__(self, x: Tensor, out: Tensor | None = None, *, has_bias: bool = True) -> Tensor:
        rows = self.quantise_input(x)
        if self.has_blocks:
            total = F.linear(rows.dequantised(), self.dequantised_weight())
        else:
            total = F.linear(widened(rows.values), widened(self.weight)) * rows.scales * self.scale
        if has_bias and self.bias is not None:
            assert out is None, "a product into given memory has no bias"
            total += self.bias
        return total.to(self.dtype) if out is None else out.copy_(total)
