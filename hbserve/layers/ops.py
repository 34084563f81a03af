"""The operations of a decoder layer: as plain torch, and as fused kernels for a GPU.

`LayerOps` runs on the CPU and is the reference for `FusedOps`. Attention itself is in `hbserve/attention`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from hbserve.attention.base import Attention
from hbserve.layers.parallel import SumAndNorm, TensorParallel
from hbserve.layers.rotary import RotaryEmbedding, rotate

_GATED_ROWS = 2048
"""Rows of a slice of the gated layer: enough for matrix products at full speed."""


class Linear(NamedTuple):
    """Parameters of a linear layer: ``weight [outputs, inputs]`` and ``bias [outputs]`` or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass
class ResidualStream:
    """The residual stream: the tensor that all layers read and add to (Elhage et al. 2021).

    Attributes:
        total: ``[tokens, hidden]``.
        pending: same shape, a layer's output that is not yet in ``total``. The next norm adds it, because that norm
            reads both tensors anyway.
        sum_and_norm: set if ``pending`` is only this rank's part of the output; computes the next norm.
    """

    total: torch.Tensor
    pending: torch.Tensor | None = None
    sum_and_norm: SumAndNorm | None = None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``x / rms(x) * weight`` over the last dimension (Zhang and Sennrich 2019).

    The mean is computed in float32. The quotient is rounded to the dtype of ``x`` before it is multiplied by the
    weight, because transformers rounds there; in bfloat16 the order changes the result.
    """
    return weight * F.rms_norm(x, weight.shape, None, eps)


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
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

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        """Return ``x @ weight.T + bias``."""
        return F.linear(x, layer.weight, layer.bias)

    def linear_into(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write ``x @ weight.T`` to ``out``, contiguous ``[rows of x, rows of weight]``."""
        return torch.mm(x, weight.t(), out=out)

    def norm(self, stream: ResidualStream, weight: torch.Tensor) -> torch.Tensor:
        """Add what is pending to the stream and return the stream's RMS norm."""
        pending, stream.pending = stream.pending, None
        sum_and_norm, stream.sum_and_norm = stream.sum_and_norm, None
        if pending is None:
            return self._rms_norm(stream.total, weight, self.eps)
        return (sum_and_norm or self._add_rms_norm_)(pending, stream.total, weight, self.eps)

    def norm_linear(self, stream: ResidualStream, norm: torch.Tensor, layer: Linear) -> torch.Tensor:
        """Apply a linear layer to the norm of the stream."""
        return self.linear(self.norm(stream, norm), layer)

    def norm_gated_linear(self, stream: ResidualStream, norm: torch.Tensor, layer: Linear) -> torch.Tensor:
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

    def add_linear(self, stream: ResidualStream, x: torch.Tensor, layer: Linear) -> None:
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
        self,
        qkv: torch.Tensor,
        head_norms: tuple[torch.Tensor, torch.Tensor] | None,
        positions: torch.Tensor,
        attention: Attention,
        layer: int,
        out: torch.Tensor,
    ) -> None:
        """Rotate q and k by their positions; write k and v to the cache and q to ``out``.

        Args:
            qkv: ``[tokens, (heads + 2 kv heads) * head_dim]``.
            head_norms: weights ``[head_dim]`` of the RMS norms of each q head and each k head; None: no norms.
            positions: integers ``[tokens]``.
            out: ``[tokens, heads, head_dim]``.
        """
        num_kv_heads, head_dim = attention.layout.num_kv_heads, attention.layout.head_dim
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        q, k, v = heads.tensor_split((-2 * num_kv_heads, -num_kv_heads), dim=1)
        if head_norms is not None:
            q, k = rms_norm(q, head_norms[0], self.eps), rms_norm(k, head_norms[1], self.eps)
        angles = self.rotary.angles(positions)
        attention.store(layer, rotate(k, *angles), v)
        out.copy_(rotate(q, *angles))

    def _rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return rms_norm(x, weight, eps)

    def _add_rms_norm_(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Add ``x`` to ``residual`` in place and return the norm of the sum."""
        return rms_norm(residual.add_(x), weight, eps)

    def _silu_and_mul(self, gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return silu_and_mul(gate_up, out)


class FusedOps(LayerOps):
    """The operations in Triton kernels that pass over memory once; a single row has kernels of its own."""

    def __init__(self, eps: float, rotary: RotaryEmbedding, parallel: TensorParallel) -> None:
        from hbserve.layers import fused, one_row

        super().__init__(eps, rotary, parallel)
        self._fused, self._one_row_linear = fused, one_row.one_row_linear

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        return self._one_row_linear(x, *layer) if x.shape[0] == 1 else super().linear(x, layer)

    def linear_into(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return self._one_row_linear(x, weight, out=out) if x.shape[0] == 1 else super().linear_into(x, weight, out)

    def norm_linear(self, stream: ResidualStream, norm: torch.Tensor, layer: Linear) -> torch.Tensor:
        if stream.total.shape[0] == 1 and stream.pending is None:
            return self._one_row_linear(stream.total, *layer, norm=norm, eps=self.eps)
        return super().norm_linear(stream, norm, layer)

    def norm_gated_linear(self, stream: ResidualStream, norm: torch.Tensor, layer: Linear) -> torch.Tensor:
        if stream.total.shape[0] == 1 and stream.pending is None:
            return self._one_row_linear(stream.total, *layer, norm=norm, eps=self.eps, gated=True)
        return super().norm_gated_linear(stream, norm, layer)

    def add_linear(self, stream: ResidualStream, x: torch.Tensor, layer: Linear) -> None:
        if x.shape[0] == 1 and self.parallel.size == 1 and stream.pending is None:
            self._one_row_linear(x, *layer, residual=stream.total)
        else:
            super().add_linear(stream, x, layer)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        head_norms: tuple[torch.Tensor, torch.Tensor] | None,
        positions: torch.Tensor,
        attention: Attention,
        layer: int,
        out: torch.Tensor,
    ) -> None:
        cache, slots = attention.kv_cache[:, layer], attention.slot_mapping
        self._fused.norm_rotate_store(qkv, cache, head_norms, positions, slots, self.rotary, self.eps, out)

    def _rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._fused.rms_norm(x, weight, eps)

    def _add_rms_norm_(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._fused.add_rms_norm_(x, residual, weight, eps)

    def _silu_and_mul(self, gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._fused.silu_and_mul(gate_up, out)


def has_triton(device: torch.device) -> bool:
    """Whether Triton can compile for ``device``."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def select_ops(device: torch.device, eps: float, rotary: RotaryEmbedding, parallel: TensorParallel) -> LayerOps:
    """Choose `FusedOps` if Triton can compile for ``device``, else `LayerOps`."""
    return (FusedOps if has_triton(device) else LayerOps)(eps, rotary, parallel)
