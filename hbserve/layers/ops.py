"""The operations of a decoder layer in plain torch.

`LayerOps` computes every family on every device, and is the reference for `hbserve.layers.fused_ops.FusedOps`, which
computes the families without `ModelSpec.unfused_features`. Attention itself is in `hbserve/attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hbserve.attention.base import Attention
from hbserve.layers.activations import make_activation, xielu
from hbserve.layers.linear import Linear, Rows
from hbserve.layers.mixture.plain import ExpertWeights, mix_experts
from hbserve.layers.norms import NORMS
from hbserve.layers.parallel import SumAndNorm, TensorParallel, vocab_parallel_embedding
from hbserve.layers.rotary import RotaryEmbedding
from hbserve.model_spec import ModelSpec
from hbserve.platform.cuda_driver import has_triton

if TYPE_CHECKING:
    from hbserve.layers.mixture.grouped import GroupedExperts


_UP_ROWS = 2048
"""Rows of a slice of the first product of the feed-forward layer: enough for full speed."""

HeadNorms = tuple[Tensor, Tensor] | None
"""Parameters of the norms of q and k: ``[head_dim]``, ``[heads, head_dim]`` where each head has its own, or ``[heads *
head_dim]`` where the norm is of the whole projection; None: the model has no such norms."""


@dataclass
class ResidualStream:
    """The residual stream: the tensor that all layers read and add to (Elhage et al. 2021).

    Attributes:
        total: ``[tokens, hidden]``.
        block_input: same shape, what both blocks of a layer read, where they are parallel.
        pending: same shape, a layer's output that is not yet in ``total``. The next norm adds it, because that norm
            reads both tensors anyway.
        sum_and_norm: set if ``pending`` is only this rank's part of the output; computes the next norm.
    """

    total: Tensor
    pending: Tensor | None = None
    sum_and_norm: SumAndNorm | None = None
    block_input: Tensor | None = None


class LayerOps:
    """Operations of one model's layers in plain torch.

    Args:
        device: the device of the weights.
        parallel: the group of ranks that computes the model.

    Attributes:
        expert_totals: int64 ``[layers, experts]``, the number of tokens that each expert of any rank has computed.
            None: the model has no experts.
    """

    def __init__(self, spec: ModelSpec, device: torch.device, parallel: TensorParallel) -> None:
        family = spec.family
        self.eps, self.parallel, self.device = spec.norm_eps, parallel, device
        rotaries = {rope: RotaryEmbedding(rope, spec.head_dim, device) for rope in {*spec.ropes} if rope is not None}
        self.rotaries = [None if rope is None else rotaries[rope] for rope in spec.ropes]
        self._norm, self._add_norm_ = NORMS[family.norm], self._add_then_norm
        self._activate = make_activation(spec.activation, family.is_gated)
        self._is_gated, self._norms_projections = family.is_gated, family.qk_norm == "projection"
        self._norms_after_rope = family.has_qk_norm_after_rope
        self._residual_scale = spec.scales.residual
        self._experts = spec.experts
        self.expert_totals: Tensor | None = None
        if spec.experts is not None:
            size = (spec.num_layers, spec.experts.num_experts)
            self.expert_totals = torch.zeros(size, dtype=torch.int64, device=device)
        self._grouped_experts = _group_experts(spec, parallel, self.expert_totals)
        # that kernel knows only one kind of norm, and adds the sum as it is
        self._sum_and_norm = None if spec.unfused_features else parallel.sum_and_norm

    @property
    def has_expert_kernels(self) -> bool:
        """Whether experts are computed by kernels; False also where there are no experts."""
        return self._grouped_experts is not None

    def _add_then_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add ``x`` to ``residual`` in place and return the norm of the sum."""
        return self._norm(residual.add_(x), weight, eps)

    def embed(
        self, given: Tensor, last: Tensor, slots: Tensor, embedding: Tensor, vocab_size: int, scale: float
    ) -> Tensor:
        """Return embeddings ``[tokens, hidden]``, times a factor.

        Args:
            given: int64 ``[tokens]``; a negative one stands for the token that its slot has sampled last.
            last: int64 ``[slots]``, these tokens. slots: int64 ``[tokens]``.
            embedding: this rank's `hbserve.layers.parallel.vocab_shard`.
        """
        # Without a largest logit no token was sampled; the host finds that in the result of the step before.
        token_ids = torch.where(given < 0, last[slots], given).clamp_(0, vocab_size - 1)
        rows = vocab_parallel_embedding(token_ids, embedding, vocab_size, self.parallel)
        return rows if scale == 1 else rows * scale

    def linear(self, x: Rows, layer: Linear, out: Tensor | None = None, *, has_bias: bool = True) -> Tensor:
        """Return ``x @ weight.T + bias``; see `Linear.__call__`."""
        assert isinstance(x, Tensor), "plain torch computes tensors"
        return layer(x, out, has_bias=has_bias)

    def norm(self, stream: ResidualStream, weight: Tensor | None) -> Tensor:
        """Add what is pending to the stream and return the stream's norm, or the stream if ``weight`` is None."""
        pending, stream.pending = stream.pending, None
        sum_and_norm, stream.sum_and_norm = stream.sum_and_norm, None
        if weight is None:
            return stream.total if pending is None else stream.total.add_(pending)
        if pending is None:
            return self._norm(stream.total, weight, self.eps)
        return (sum_and_norm or self._add_norm_)(pending, stream.total, weight, self.eps)

    def norm_linear(
        self, stream: ResidualStream, norm: Tensor | None, layer: Linear, out: Tensor | None = None
    ) -> Tensor:
        """Apply a linear layer to the norm of the stream; the result is in ``out`` if given."""
        return self.linear(self.norm(stream, norm), layer, out)

    def norm_up_linear(
        self,
        stream: ResidualStream,
        norm: Tensor | None,
        layer: Linear,
        reader: Linear,
        curve: Tensor | None = None,
    ) -> Rows:
        """Apply a linear layer with outputs ``gate | up`` to the norm of the stream; return ``activation(gate) * up``.

        Without gate, the outputs are ``up`` and the result is ``activation(up)``. Rows are computed in slices, because
        ``gate | up`` is by far the widest tensor of a step.

        Args:
            reader: the layer that reads the result, in the form that it wants.
            curve: parameters of `hbserve.layers.activations.xielu`, which then is the activation.
        """
        x = self._norm_for(stream, norm, layer)
        num_rows = stream.total.shape[0]
        if num_rows <= _UP_ROWS:
            return self._activate_for(reader, self.linear(x, layer), None, curve)
        out = self._memory_for(reader, num_rows, layer.num_outputs // (2 if self._is_gated else 1))
        for begin in range(0, num_rows, _UP_ROWS):
            rows = slice(begin, begin + _UP_ROWS)
            self._activate_for(reader, self.linear(x[rows], layer), out[rows], curve)
        return out

    def _norm_for(self, stream: ResidualStream, norm: Tensor | None, layer: Linear) -> Rows:
        """Return the norm of the stream as ``layer`` reads it."""
        return self.norm(stream, norm)

    def _activate_for(self, layer: Linear, up: Tensor, out: Rows | None, curve: Tensor | None = None) -> Rows:
        """Return the activation as ``layer`` reads it, in ``out`` if given."""
        assert out is None or isinstance(out, Tensor), "plain torch computes tensors"
        return self._activate(up, out) if curve is None else xielu(up, curve, out)

    def _memory_for(self, layer: Linear, num_rows: int, num_inputs: int) -> Rows:
        """Allocate inputs ``[rows, inputs]`` of a layer."""
        return torch.empty(num_rows, num_inputs, dtype=layer.dtype, device=self.device)

    def add_linear(self, stream: ResidualStream, x: Rows, layer: Linear, norm: Tensor | None = None) -> None:
        """Apply a linear layer to ``x``, then a norm if given, and leave the result pending in the stream.

        Each rank has a slice of the layer's inputs and the whole bias.

        Args:
            x: ``[rows, inputs]``, plain or as ``layer`` reads them.
        """
        assert stream.pending is None, "the norm before must have added what was pending"
        self._leave_pending(stream, x, layer)
        self._finish_pending(stream, norm)

    def _finish_pending(self, stream: ResidualStream, norm: Tensor | None) -> None:
        """Apply a norm, if given, and the factor of the residual to what is pending."""
        assert stream.pending is not None, "a block has just left its output"
        if norm is not None:
            stream.pending = self._norm(stream.pending, norm, self.eps)
        if self._residual_scale != 1:
            stream.pending = stream.pending * self._residual_scale

    def add_experts(
        self,
        stream: ResidualStream,
        in_norm: Tensor | None,
        weights: ExpertWeights,
        layer: int,
        slots: Tensor,
        norm: Tensor | None = None,
    ) -> None:
        """Compute the norm of the stream by experts, then a norm if given, and leave the result pending in the stream.

        Each rank has some of the experts, or a slice of every expert; all ranks choose the same experts.

        Args:
            in_norm: None: the experts read the stream itself.
            slots: int64 ``[tokens]``; a padded token has a negative one.
        """
        assert self._experts is not None, "the model has experts"
        x = self.norm(stream, in_norm)
        if self._grouped_experts is None:
            first, _ = self.parallel.local_experts(self._experts.num_experts)
            assert self.expert_totals is not None, "it counts where there are experts"
            part = mix_experts(x, weights, self._experts, self._activate, self.expert_totals[layer], first)
        else:
            place = None if self.parallel.summand_place is None else self.parallel.summand_place((*x.shape,), x.dtype)
            part = torch.empty_like(x) if place is None else place
            self._grouped_experts.mix(layer, x, weights, slots, part)
            if place is not None and weights.shared_up is None and self._sum_and_norm is not None:
                stream.pending, stream.sum_and_norm = part, self._sum_and_norm
                return
        if weights.shared_up is not None:
            part += self._shared_expert(x, weights)
        stream.pending = self.parallel.reduce(part)
        self._finish_pending(stream, norm)

    def _shared_expert(self, x: Tensor, weights: ExpertWeights) -> Tensor:
        """Compute this rank's part of the expert that computes every token."""
        assert weights.shared_up is not None, "the model has such an expert"
        assert weights.shared_down is not None, "it has both matrices"
        inner = self._activate_for(weights.shared_down, self.linear(x, weights.shared_up), None)
        out = self.linear(inner, weights.shared_down)
        return out if weights.shared_gate is None else out * F.linear(x, weights.shared_gate).sigmoid()

    def _leave_pending(self, stream: ResidualStream, x: Rows, layer: Linear) -> None:
        parallel = self.parallel
        if parallel.size == 1:
            stream.pending = self.linear(x, layer)
            return
        place = parallel.summand(stream.total.shape[0], layer.num_outputs, layer.dtype)
        summand = self.linear(x, layer, place, has_bias=False)
        if place is not None and layer.bias is None and self._sum_and_norm is not None:
            stream.pending, stream.sum_and_norm = summand, self._sum_and_norm
        else:
            total = parallel.reduce(summand)
            stream.pending = total if layer.bias is None else total + layer.bias

    def rotate_and_store(
        self, qkv: Tensor, norms: HeadNorms, positions: Tensor, attention: Attention, layer: int, out: Tensor
    ) -> None:
        """Norm q and k, before or after a rotation by their positions; write k and v to the cache and q to ``out``.

        Where the cache is in FP8, q and k are mixed after that; see `RotaryEmbedding.mix`.

        Args:
            qkv: ``[tokens, (heads + 2 kv heads) * head_dim]``.
            positions: integers ``[tokens]``.
            out: ``[tokens, heads, head_dim]``.
        """
        num_kv_heads, head_dim = attention.layout.num_kv_heads, attention.layout.head_dim
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        q, k, v = heads.tensor_split((-2 * num_kv_heads, -num_kv_heads), dim=1)
        if self._norms_projections:
            assert norms is not None, "the family has norms of whole projections"
            q, k = self._norm_projections(q, k, *norms)
        elif norms is not None and not self._norms_after_rope:
            q, k = self._norm(q, norms[0], self.eps), self._norm(k, norms[1], self.eps)
        rotary = self.rotaries[layer]
        if rotary is not None:
            angles = rotary.angles(positions)
            q, k = rotary.rotate(q, *angles), rotary.rotate(k, *angles)
            if rotary.query_growth:
                q = q * rotary.query_lengths(positions)[:, None, None].to(q.dtype)
        if norms is not None and self._norms_after_rope:
            q, k = self._norm(q, norms[0], self.eps), self._norm(k, norms[1], self.eps)
        if rotary is not None and attention.kv_scales is not None:
            q, k = rotary.mix(q), rotary.mix(k)
        attention.store(layer, k, v)
        out.copy_(q)

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
        """Do what `rotate_and_store` does, and attend.

        Args:
            q: memory for the queries, ``[tokens, heads, head_dim]``; what it has afterwards is undefined.
            out: receives the result, same shape.
            on_stored: called with ``layer``; see `hbserve.models.decoder.Decoder.forward`.
        """
        self.rotate_and_store(qkv, norms, positions, attention, layer, q)
        on_stored(layer)
        attention.attend(layer, q, out)

    def _norm_projections(self, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Apply an RMS norm over the heads of all ranks to q and to k, each ``[tokens, heads, head_dim]``.

        The ranks exchange the means of their squares. Where they share KV heads, each head counts equally often.
        """
        wide = [x.flatten(1).float() for x in (q, k)]
        means = self.parallel.reduce(torch.stack([x.square().mean(-1) for x in wide])) / self.parallel.size
        scales = torch.rsqrt(means + self.eps)[..., None]
        normed = [x * scale * weight for x, scale, weight in zip(wide, scales, (q_weight, k_weight), strict=True)]
        return normed[0].to(q.dtype).view_as(q), normed[1].to(k.dtype).view_as(k)


def _group_experts(spec: ModelSpec, parallel: TensorParallel, totals: Tensor | None) -> GroupedExperts | None:
    """Return the kernels for experts; None: the model has no experts, or there are no kernels for them."""
    experts = spec.experts
    if experts is None or totals is None or not has_triton(totals.device):
        return None
    from hbserve.layers.mixture.grouped import ACTIVATIONS, GroupedExperts

    if spec.activation not in ACTIVATIONS:
        return None
    return GroupedExperts(experts, parallel.local_experts(experts.num_experts), totals, spec.activation)
