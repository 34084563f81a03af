"""The operations of a layer, in the form that the device likes."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hbserve.attention.base import Attention
from hbserve.layers.parallel import SumAndNorm, TensorParallel
from hbserve.layers.rotary import RotaryEmbedding, rotate

_GATED_ROWS = 2048
"""Enough for products at full speed."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x) * weight`` over the last dimension (Zhang and Sennrich 2019).

    The mean is taken in float32 and the quotient rounded to ``x``'s dtype before the weight, which
    is where transformers rounds: in bf16 the order shows.
    """
    return weight * F.rms_norm(x, weight.shape, None, eps)


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``silu(gate) * up`` of ``[tokens, gate | up]`` (Shazeer 2020); half as wide, in ``out`` if that is given."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.mul(F.silu(gate), up, out=out)


@dataclass
class ResidualStream:
    """What the layers add to, one after the other (Elhage et al. 2021 name it so).

    Attributes:
        total: ``[tokens, hidden]``.
        pending: of the same shape, a layer's output that is not yet in ``total``: adding it is left
            to the next norm, which passes over both anyway.
        sum_and_norm: set if ``pending`` is only this rank's part of the output: so the next norm is taken.
    """

    total: torch.Tensor
    pending: torch.Tensor | None = None
    sum_and_norm: SumAndNorm | None = None


class LayerOps:
    """The operations of a decoder layer that are not attention.

    Here in torch's own operations: what runs on the CPU, and the reference for everything else.
    """

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x @ weight.T + bias``."""
        return F.linear(x, weight, bias)

    def linear_into(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """``x @ weight.T`` in ``out``, contiguous ``[rows of x, rows of weight]``."""
        return torch.mm(x, weight.t(), out=out)

    def norm(self, stream: ResidualStream, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """The RMS norm of the stream, with what is pending."""
        pending, stream.pending = stream.pending, None
        sum_and_norm, stream.sum_and_norm = stream.sum_and_norm, None
        if pending is None:
            return self.rms_norm(stream.total, weight, eps)
        return (sum_and_norm or self.add_rms_norm_)(pending, stream.total, weight, eps)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """As the function `rms_norm`."""
        return rms_norm(x, weight, eps)

    def add_rms_norm_(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Add ``x`` to ``residual`` in place and return the norm of the sum."""
        return rms_norm(residual.add_(x), weight, eps)

    def norm_linear(
        self, stream: ResidualStream, norm: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """A linear layer on the norm of the stream."""
        return self.linear(self.norm(stream, norm, eps), weight, bias)

    def norm_gated_linear(
        self, stream: ResidualStream, norm: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The same with rows ``gate | up``: ``silu(gate) * up``.

        A slice of the rows at a time: ``gate | up`` is by far the widest of a step's tensors.
        """
        x = self.norm(stream, norm, eps)
        num_rows = x.shape[0]
        if num_rows <= _GATED_ROWS:
            return self.silu_and_mul(self.linear(x, weight, bias))
        out = x.new_empty(num_rows, weight.shape[0] // 2)
        for begin in range(0, num_rows, _GATED_ROWS):
            rows = slice(begin, begin + _GATED_ROWS)
            self.silu_and_mul(self.linear(x[rows], weight, bias), out[rows])
        return out

    def add_linear(
        self,
        stream: ResidualStream,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        parallel: TensorParallel,
    ) -> None:
        """Add a linear layer on ``x`` to the stream; each rank has a slice of its inputs, and the whole bias."""
        assert stream.pending is None, "the norm before has taken what was pending"
        if parallel.size == 1:
            stream.pending = self.linear(x, weight, bias)
        else:
            place = parallel.summand(x.shape[0], weight)
            mine = self.linear(x, weight, None) if place is None else self.linear_into(x, weight, place)
            if place is not None and bias is None and parallel.sum_and_norm is not None:
                stream.pending, stream.sum_and_norm = mine, parallel.sum_and_norm
            else:
                total = parallel.reduce(mine)
                stream.pending = total if bias is None else total + bias

    def silu_and_mul(self, gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """As the function `silu_and_mul`."""
        return silu_and_mul(gate_up, out)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        positions: torch.Tensor,
        rotary: RotaryEmbedding,
        attention: Attention,
        layer: int,
        out: torch.Tensor,
    ) -> None:
        """Normalise heads where the model does, rotate q and k; k and v go to the cache, q to ``out``."""
        num_kv_heads, head_dim = attention.layout.num_kv_heads, attention.layout.head_dim
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        q, k, v = heads.tensor_split((-2 * num_kv_heads, -num_kv_heads), dim=1)
        if q_norm is not None and k_norm is not None:
            q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
        angles = rotary.angles(positions)
        attention.store(layer, rotate(k, *angles), v)
        out.copy_(rotate(q, *angles))


class FusedOps(LayerOps):
    """In Triton kernels that pass over memory once; a single row has kernels of its own."""

    def __init__(self) -> None:
        from hbserve.layers import fused, one_row

        self._fused = fused
        self._one_row_linear = one_row.one_row_linear

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x.shape[0] == 1:
            return self._one_row_linear(x, weight, bias)
        return F.linear(x, weight, bias)

    def linear_into(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 1:
            return self._one_row_linear(x, weight, out=out)
        return super().linear_into(x, weight, out)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._fused.rms_norm(x, weight, eps)

    def add_rms_norm_(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._fused.add_rms_norm_(x, residual, weight, eps)

    def norm_linear(
        self, stream: ResidualStream, norm: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if stream.total.shape[0] == 1 and stream.pending is None:
            return self._one_row_linear(stream.total, weight, bias, norm=norm, eps=eps)
        return super().norm_linear(stream, norm, eps, weight, bias)

    def norm_gated_linear(
        self, stream: ResidualStream, norm: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if stream.total.shape[0] == 1 and stream.pending is None:
            return self._one_row_linear(stream.total, weight, bias, norm=norm, eps=eps, gated=True)
        return super().norm_gated_linear(stream, norm, eps, weight, bias)

    def add_linear(
        self,
        stream: ResidualStream,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        parallel: TensorParallel,
    ) -> None:
        if x.shape[0] == 1 and parallel.size == 1 and stream.pending is None:
            self._one_row_linear(x, weight, bias, residual=stream.total)
        else:
            super().add_linear(stream, x, weight, bias, parallel)

    def silu_and_mul(self, gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._fused.silu_and_mul(gate_up, out)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        positions: torch.Tensor,
        rotary: RotaryEmbedding,
        attention: Attention,
        layer: int,
        out: torch.Tensor,
    ) -> None:
        self._fused.norm_rotate_store(
            qkv,
            attention.kv_cache[:, layer],
            q_norm,
            k_norm,
            positions,
            attention.slot_mapping,
            rotary.inverse_frequencies,
            rotary.magnitude,
            eps,
            out,
        )


def has_triton(device: torch.device) -> bool:
    """Whether Triton can compile for ``device``."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def select_ops(weights: torch.Tensor) -> LayerOps:
    """Fused where Triton can compile for the device of ``weights``, plain elsewhere."""
    return FusedOps() if has_triton(weights.device) else LayerOps()
