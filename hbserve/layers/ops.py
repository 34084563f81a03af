"""The operations of a decoder layer: as plain torch, and as fused kernels for a GPU.

`LayerOps` runs on the CPU and is the reference for `FusedOps`. Attention itself is in `hbserve/attention`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hbserve.attention.base import Attention
from hbserve.layers.parallel import SumAndNorm, TensorParallel
from hbserve.layers.rotary import RotaryEmbedding, rotate

_GATED_ROWS = 2048
"""Rows of a slice of the gated layer: enough for matrix products at full speed."""

HeadNorms = tuple[Tensor, Tensor] | None
"""Weights ``[head_dim]`` of the RMS norm of each q head and of each k head; None: the model has no such norms."""


class Linear(NamedTuple):
    """Parameters of a linear layer: ``weight [outputs, inputs]`` and ``bias [outputs]`` or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass
class ResidualStream:
    """The residual stream: the tensor that all layers read and add to (Elhage et al. 2021).

    Attributes:
        total: ``[tokens, hidden]``.
        pending: same shape, a layer's output that is not yet in ``total``. The next norm adds it, because that norm
            reads both tensors anyway.
        sum_and_norm: set if ``pending`` is only this rank's part of the output; computes the next norm.
    """

    total: Tensor
    pending: Tensor | None = None
    sum_and_norm: SumAndNorm | None = None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``x / rms(x) * weight`` over the last dimension (Zhang and Sennrich 2019).

    The mean is computed in float32. The quotient is rounded to the dtype of ``x`` before it is multiplied by the
    weight, because transformers rounds there; in bfloat16 the order changes the result.
    """
    return weight * F.rms_norm(x, weight.shape, None, eps)


def add_rms_norm_(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add ``x`` to ``residual`` in place and return the RMS norm of the sum."""
    return rms_norm(residual.add_(x), weight, eps)


def silu_and_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``silu(gate) * up`` (Shazeer 2020) of ``[tokens, gate | up]``, half as wide; in ``out`` if given."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.mul(F.silu(gate), up, out=out)


class LayerOps:
    """Operations of one model's layers in plain torch.

    Args:
        eps: epsilon of all RMS norms.
        parallel: the group of ranks that computes the model.
    """

    def __init__(self, eps: float, rotary: RotaryEmbedding, parallel: TensorParallel) -> None:
        self.eps, self.rotary, self.parallel = eps, rotary, parallel
        self._rms_norm, self._add_rms_norm_, self._silu_and_mul = rms_norm, add_rms_norm_, silu_and_mul

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        """Return ``x @ weight.T + bias``."""
        return F.linear(x, layer.weight, layer.bias)

    def linear_into(self, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """Write ``x @ weight.T`` to ``out``, contiguous ``[rows of x, rows of weight]``."""
        return torch.mm(x, weight.t(), out=out)

    def norm(self, stream: ResidualStream, weight: Tensor) -> Tensor:
        """Add what is pending to the stream and return the stream's RMS norm."""
        pending, stream.pending = stream.pending, None
        sum_and_norm, stream.sum_and_norm = stream.sum_and_norm, None
        if pending is None:
            return self._rms_norm(stream.total, weight, self.eps)
        return (sum_and_norm or self._add_rms_norm_)(pending, stream.total, weight, self.eps)

    def norm_linear(self, stream: ResidualStream, norm: Tensor, layer: Linear) -> Tensor:
        """Apply a linear layer to the norm of the stream."""
        return self.linear(self.norm(stream, norm), layer)

    def norm_gated_linear(self, stream: ResidualStream, norm: Tensor, layer: Linear) -> Tensor:
        """Apply a linear layer with outputs ``gate | up`` to the norm of the stream; return ``silu(gate) * up``.

        Rows are computed in slices, because ``gate | up`` is by far the widest tensor of a step.
        """
        x = self.norm(stream, norm)
        num_rows = x.shape[0]
        if num_rows <= _GATED_ROWS:
            return self._silu_and_mul(self.linear(x, layer))
        out = x.new_empty(num_rows, layer.weight.shape[0] // 2)
        for begin in range(0, num_rows, _GATED_ROWS):
            rows = slice(begin, begin + _GATED_ROWS)
            self._silu_and_mul(self.linear(x[rows], layer), out[rows])
        return out

    def add_linear(self, stream: ResidualStream, x: Tensor, layer: Linear) -> None:
        """Apply a linear layer to ``x`` and leave the result pending in the stream.

        Each rank has a slice of the layer's inputs and the whole bias.
        """
        assert stream.pending is None, "the norm before must have added what was pending"
        parallel = self.parallel
        if parallel.size == 1:
            stream.pending = self.linear(x, layer)
            return
        place = parallel.summand(x.shape[0], layer.weight)
        weight = layer.weight
        summand = self.linear(x, Linear(weight)) if place is None else self.linear_into(x, weight, place)
        if place is not None and layer.bias is None and parallel.sum_and_norm is not None:
            stream.pending, stream.sum_and_norm = summand, parallel.sum_and_norm
        else:
            total = parallel.reduce(summand)
            stream.pending = total if layer.bias is None else total + layer.bias

    def rotate_and_store(
        self, qkv: Tensor, norms: HeadNorms, positions: Tensor, attention: Attention, layer: int, out: Tensor
    ) -> None:
        """Rotate q and k by their positions; write k and v to the cache and q to ``out``.

        Args:
            qkv: ``[tokens, (heads + 2 kv heads) * head_dim]``.
            positions: integers ``[tokens]``.
            out: ``[tokens, heads, head_dim]``.
        """
        num_kv_heads, head_dim = attention.layout.num_kv_heads, attention.layout.head_dim
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        q, k, v = heads.tensor_split((-2 * num_kv_heads, -num_kv_heads), dim=1)
        if norms is not None:
            q, k = rms_norm(q, norms[0], self.eps), rms_norm(k, norms[1], self.eps)
        angles = self.rotary.angles(positions)
        attention.store(layer, rotate(k, *angles), v)
        out.copy_(rotate(q, *angles))


class FusedOps(LayerOps):
    """The operations in Triton kernels that pass over memory once; a single row has kernels of its own."""

    def __init__(self, eps: float, rotary: RotaryEmbedding, parallel: TensorParallel) -> None:
        from hbserve.layers import fused, one_row

        super().__init__(eps, rotary, parallel)
        self._one_row_linear, self._norm_rotate_store = one_row.one_row_linear, fused.norm_rotate_store
        self._rms_norm, self._add_rms_norm_ = fused.rms_norm, fused.add_rms_norm_
        self._silu_and_mul = fused.silu_and_mul

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        return self._one_row_linear(x, *layer) if x.shape[0] == 1 else super().linear(x, layer)

    def linear_into(self, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        return self._one_row_linear(x, weight, out=out) if x.shape[0] == 1 else super().linear_into(x, weight, out)

    def norm_linear(self, stream: ResidualStream, norm: Tensor, layer: Linear) -> Tensor:
        if stream.total.shape[0] == 1 and stream.pending is None:
            return self._one_row_linear(stream.total, *layer, norm=norm, eps=self.eps)
        return super().norm_linear(stream, norm, layer)

    def norm_gated_linear(self, stream: ResidualStream, norm: Tensor, layer: Linear) -> Tensor:
        if stream.total.shape[0] == 1 and stream.pending is None:
            return self._one_row_linear(stream.total, *layer, norm=norm, eps=self.eps, gated=True)
        return super().norm_gated_linear(stream, norm, layer)

    def add_linear(self, stream: ResidualStream, x: Tensor, layer: Linear) -> None:
        if x.shape[0] == 1 and self.parallel.size == 1 and stream.pending is None:
            self._one_row_linear(x, *layer, residual=stream.total)
        else:
            super().add_linear(stream, x, layer)

    def rotate_and_store(
        self, qkv: Tensor, norms: HeadNorms, positions: Tensor, attention: Attention, layer: int, out: Tensor
    ) -> None:
        cache, slots = attention.kv_cache[:, layer], attention.slot_mapping
        self._norm_rotate_store(qkv, cache, norms, positions, slots, self.rotary, self.eps, out)


def has_triton(device: torch.device) -> bool:
    """Whether Triton can compile for ``device``."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def select_ops(device: torch.device, eps: float, rotary: RotaryEmbedding, parallel: TensorParallel) -> LayerOps:
    """Choose `FusedOps` if Triton can compile for ``device``, else `LayerOps`."""
    return (FusedOps if has_triton(device) else LayerOps)(eps, rotary, parallel)
