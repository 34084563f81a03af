"""The operations of a layer, in the form that the device likes."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F

from hbserve.attention.base import AttentionBackend
from hbserve.layers.mlp import silu_and_mul
from hbserve.layers.norm import rms_norm
from hbserve.layers.rotary import RotaryEmbedding, rotate


class LayerOps:
    """The operations of a decoder layer that are not attention.

    Here in torch's own operations: what runs on the CPU, and the reference for everything else.
    """

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x @ weight.T + bias``."""
        return F.linear(x, weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """As `hbserve.layers.norm.rms_norm`."""
        return rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of ``x + residual``, and the sum itself; may reuse the residual's memory."""
        total = residual + x
        return rms_norm(total, weight, eps), total

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """As `hbserve.layers.mlp.silu_and_mul`."""
        return silu_and_mul(gate_up)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        positions: torch.Tensor,
        rotary: RotaryEmbedding,
        attention: AttentionBackend,
        layer: int,
    ) -> torch.Tensor:
        """Normalise heads where the model does, rotate q and k, put k and v into the cache; returns q."""
        num_kv_heads, head_dim = attention.layout.num_kv_heads, attention.layout.head_dim
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        q, k, v = heads.tensor_split((-2 * num_kv_heads, -num_kv_heads), dim=1)
        if q_norm is not None and k_norm is not None:
            q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
        angles = rotary.angles(positions)
        attention.store(layer, rotate(k, *angles), v)
        return rotate(q, *angles)


class FusedOps(LayerOps):
    """In Triton kernels that pass over memory once."""

    def __init__(self) -> None:
        from hbserve.layers import fused

        self._fused = fused

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x.shape[0] == 1 and bias is None:
            return self._fused.one_row_linear(x, weight)
        return F.linear(x, weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._fused.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._fused.add_rms_norm_(x, residual, weight, eps), residual

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._fused.silu_and_mul(gate_up)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        positions: torch.Tensor,
        rotary: RotaryEmbedding,
        attention: AttentionBackend,
        layer: int,
    ) -> torch.Tensor:
        return self._fused.norm_rotate_store(
            qkv,
            attention.kv_cache[:, layer],
            q_norm,
            k_norm,
            positions,
            attention.slot_mapping,
            rotary.inverse_frequencies,
            eps,
        )


def select_ops(weights: torch.Tensor) -> LayerOps:
    """Fused where Triton can compile for the device of ``weights``, plain elsewhere."""
    if weights.is_cuda and importlib.util.find_spec("triton") is not None:
        return FusedOps()
    return LayerOps()
