"""The operations of a decoder layer as fused kernels for a GPU, and kernels of layers without a scheme."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hbserve.attention.base import Attention, HeadTransform
from hbserve.layers import fused
from hbserve.layers.few_rows import MAX_FEW_ROWS, few_rows
from hbserve.layers.fp8 import Fp8Linear
from hbserve.layers.linear import Linear, LinearKernels, PlainLinear, Rows
from hbserve.layers.mixture.plain import ExpertWeights
from hbserve.layers.one_row import one_row
from hbserve.layers.ops import HeadNorms, LayerOps, ResidualStream
from hbserve.layers.parallel import TensorParallel
from hbserve.layers.rotary import identity_rotation
from hbserve.model_spec import ModelSpec


class PlainKernels:
    """`hbserve.layers.linear.LinearKernels` of layers without a scheme."""

    one_row = staticmethod(one_row)

    def rows_kernel(self, layer: PlainLinear, num_rows: int) -> Callable[..., Tensor] | None:
        if num_rows == 1:
            return one_row
        return few_rows if num_rows <= MAX_FEW_ROWS and layer.dtype.itemsize == 2 else None

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


class FusedOps(LayerOps):
    """The operations in Triton kernels that pass over memory once; a single row has kernels of its own."""

    def __init__(self, spec: ModelSpec, device: torch.device, parallel: TensorParallel) -> None:
        assert not spec.unfused_features, f"the kernels do not compute {spec.unfused_features}"
        super().__init__(spec, device, parallel)
        still = identity_rotation(spec.head_dim, device)
        self._rotaries = [still if rotary is None else rotary for rotary in self.rotaries]
        self._norm_rotate_store, self._embed = fused.norm_rotate_store, fused.embed
        self._norm, self._add_norm_ = fused.rms_norm, fused.add_rms_norm_
        self._activate = fused.silu_and_mul
        self._kernels: dict[type[Linear], LinearKernels] = {PlainLinear: PlainKernels()}
        if spec.weights_name:
            from hbserve.layers.fp8_kernels import Fp8Kernels

            self._kernels[Fp8Linear] = Fp8Kernels()

    def embed(
        self, given: Tensor, last: Tensor, slots: Tensor, embedding: Tensor, vocab_size: int, scale: float
    ) -> Tensor:
        if self.parallel.size > 1:
            return super().embed(given, last, slots, embedding, vocab_size, scale)
        return self._embed(given, last, slots, embedding, scale)

    def linear(self, x: Rows, layer: Linear, out: Tensor | None = None, *, has_bias: bool = True) -> Tensor:
        few_rows = self._few_rows(layer, x.shape[0]) if isinstance(x, Tensor) else None
        if few_rows is not None:
            return few_rows(layer, x, out=out, has_bias=has_bias)
        return self._kernels[type(layer)].many_rows(layer, x, out, has_bias=has_bias)

    def norm_linear(
        self, stream: ResidualStream, norm: Tensor | None, layer: Linear, out: Tensor | None = None
    ) -> Tensor:
        few_rows = self._few_rows_of(stream, layer)
        if few_rows is not None:
            return few_rows(layer, stream.total, norm=norm, eps=self.eps, out=out)
        return self.linear(self._norm_for(stream, norm, layer), layer, out)

    def norm_up_linear(
        self,
        stream: ResidualStream,
        norm: Tensor | None,
        layer: Linear,
        reader: Linear,
        curve: Tensor | None = None,
    ) -> Rows:
        few_rows = self._few_rows_of(stream, layer)
        if few_rows is not None:
            return few_rows(layer, stream.total, norm=norm, eps=self.eps, is_gated=True)
        return super().norm_up_linear(stream, norm, layer, reader)

    def _few_rows(self, layer: Linear, num_rows: int) -> Callable[..., Tensor] | None:
        return self._kernels[type(layer)].rows_kernel(layer, num_rows)

    def _few_rows_of(self, stream: ResidualStream, layer: Linear) -> Callable[..., Tensor] | None:
        """Return that kernel for the stream; None: it has too many rows, or something is pending."""
        return self._few_rows(layer, stream.total.shape[0]) if stream.pending is None else None

    def _norm_for(self, stream: ResidualStream, norm: Tensor | None, layer: Linear) -> Rows:
        if norm is None or stream.sum_and_norm is not None or stream.total.shape[0] == 1:
            return self.norm(stream, norm)
        pending, stream.pending = stream.pending, None
        return self._kernels[type(layer)].norm(layer, pending, stream.total, norm, self.eps)

    def _activate_for(self, layer: Linear, up: Tensor, out: Rows | None, curve: Tensor | None = None) -> Rows:
        assert curve is None, "the kernels know no activation with parameters"
        if out is None and up.shape[0] == 1:  # `LinearKernels.one_row` reads a tensor
            return self._activate(up, None)
        return self._kernels[type(layer)].gate(layer, up, out)

    def _memory_for(self, layer: Linear, num_rows: int, num_inputs: int) -> Rows:
        return self._kernels[type(layer)].memory(layer, num_rows, num_inputs)

    def add_linear(self, stream: ResidualStream, x: Rows, layer: Linear, norm: Tensor | None = None) -> None:
        assert norm is None, "the kernels know no norm of a block's output"
        few_rows = self._few_rows_of(stream, layer)
        if few_rows is not None and self.parallel.size == 1 and isinstance(x, Tensor):
            few_rows(layer, x, residual=stream.total)
        else:
            super().add_linear(stream, x, layer)

    def add_experts(
        self,
        stream: ResidualStream,
        in_norm: Tensor | None,
        weights: ExpertWeights,
        layer: int,
        slots: Tensor,
        norm: Tensor | None = None,
    ) -> None:
        assert norm is None, "the kernels know no norm of a block's output"
        experts = self._grouped_experts
        assert experts is not None, "experts without kernels are an unfused feature"
        shared_up, shared_down = weights.shared_up, weights.shared_down
        has_one_row_kernels = weights.shared_gate is None and weights.up_bias is None
        if stream.total.shape[0] > 1 or self.parallel.size > 1 or not has_one_row_kernels:
            super().add_experts(stream, in_norm, weights, layer, slots)
        elif shared_up is not None and shared_down is not None:
            x = self.norm(stream, in_norm)
            inner = self._kernels[type(shared_up)].one_row(shared_up, x, is_gated=True)
            experts.mix(layer, x, weights, slots, stream.total, is_added=True)
            self._kernels[type(shared_down)].one_row(shared_down, inner, residual=stream.total)
        elif in_norm is not None and stream.pending is None:
            first = (in_norm, self.eps)
            experts.mix(layer, stream.total, weights, slots, stream.total, is_added=True, norm=first)
        else:
            experts.mix(layer, self.norm(stream, in_norm), weights, slots, stream.total, is_added=True)

    def rotate_and_store(
        self, qkv: Tensor, norms: HeadNorms, positions: Tensor, attention: Attention, layer: int, out: Tensor
    ) -> None:
        cache, slots = attention.kv_cache[:, layer], attention.slot_mapping
        scales = None if attention.kv_scales is None else attention.kv_scales[layer]
        self._norm_rotate_store(qkv, cache, norms, positions, slots, self._rotaries[layer], self.eps, out, scales)

    def attend(
        self,
        qkv: Tensor,
        norms: HeadNorms,
        positions: Tensor,
        attention: Attention,
        layer: int,
        q: Tensor,
        out: Tensor,
        on_stored: Callable[[int], None],
    ) -> None:
        if not attention.transforms_heads:
            super().attend(qkv, norms, positions, attention, layer, q, out, on_stored)
            return
        rotary = self._rotaries[layer]
        turn = rotary.inverse_frequencies, rotary.magnitude, rotary.rotated_dim, rotary.is_interleaved
        attention.attend_transformed(layer, qkv, HeadTransform(norms, self.eps, *turn), out)
        on_stored(layer)
