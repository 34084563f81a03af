"""Kernels of a GPU for layers without a scheme."""

from __future__ import annotations

import torch
from torch import Tensor

from hbserve.layers import fused
from hbserve.layers.few_rows import MAX_FEW_ROWS, few_rows
from hbserve.layers.linear import PlainLinear, Rows
from hbserve.layers.one_row import one_row


class PlainKernels:
    """`hbserve.layers.linear.LinearKernels` of layers without a scheme."""

    one_row = staticmethod(one_row)
    few_rows = staticmethod(few_rows)

    def max_few_rows(self, layer: PlainLinear) -> int:
        return MAX_FEW_ROWS if layer.dtype.itemsize == 2 else 1

    def many_rows(self, layer: PlainLinear, rows: Rows, out: Tensor | None = None, *, has_bias: bool = True) -> Tensor:
        assert isinstance(rows, Tensor), "plain layers read tensors"
        return layer(rows, out, has_bias=has_bias)

    def norm(self, layer: PlainLinear, pending: Tensor | None, total: Tensor, weight: Tensor, eps: float) -> Tensor:
        if pending is None:
            return fused.rms_norm(total, weight, eps)
        return fused.add_rms_norm_(pending, total, weight, eps)

    def gate(self, layer: PlainLinear, gate_up: Tensor, out: Rows | None) -> Tensor:
        assert out is None or isinstance(out, Tensor), "plain layers read tensors"
        return fused.silu_and_mul(gate_up, out)

    def memory(self, layer: PlainLinear, num_rows: int, num_inputs: int) -> Tensor:
        return torch.empty(num_rows, num_inputs, dtype=layer.dtype, device=layer.weight.device)
