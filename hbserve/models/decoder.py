"""The one forward pass of all supported models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hbserve.attention.base import AttentionBackend
from hbserve.layers.mlp import silu_and_mul
from hbserve.layers.norm import rms_norm
from hbserve.layers.parallel import TensorParallel, row_parallel_linear, vocab_parallel_embedding
from hbserve.layers.rotary import RotaryEmbedding, rotate
from hbserve.models.spec import ModelSpec


@dataclass(frozen=True)
class _Layer:
    """Parameters of one layer; see `hbserve.models.weights.WeightTable` for what they are."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    qkv_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


class Decoder:
    """A decoder-only transformer over flat batches: the tokens of all sequences one after the other.

    Args:
        weights: `WeightTable.views` of this rank; they are used in place.
        parallel: the group that computes the model together.
    """

    def __init__(
        self, spec: ModelSpec, weights: Mapping[str, torch.Tensor], parallel: TensorParallel | None = None
    ) -> None:
        self.spec = spec
        self.parallel = parallel or TensorParallel()
        self.embedding, self.final_norm, self.lm_head = (
            weights[name] for name in ("embedding", "final_norm", "lm_head")
        )
        self.rotary = RotaryEmbedding(spec.rope, spec.head_dim, self.embedding.device)
        self.layers = []
        for layer in range(spec.num_layers):
            prefix = f"layers.{layer}."
            own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            self.layers.append(_Layer(**own))

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionBackend) -> torch.Tensor:
        """Hidden states ``[tokens, hidden]`` after the final norm; the tokens' KV is in the cache then.

        Args:
            token_ids, positions: integers ``[tokens]``, in the order of the batch that ``attention``
                was told about in `AttentionBackend.begin`.
        """
        hidden = vocab_parallel_embedding(token_ids, self.embedding, self.parallel)
        angles = self.rotary.angles(positions)
        eps = self.spec.rms_norm_eps
        for index, layer in enumerate(self.layers):
            normed = rms_norm(hidden, layer.input_norm, eps)
            hidden = hidden + self._attend(index, layer, normed, angles, attention)
            normed = rms_norm(hidden, layer.mlp_norm, eps)
            inner = silu_and_mul(F.linear(normed, layer.gate_up, layer.gate_up_bias))
            hidden = hidden + row_parallel_linear(inner, layer.down, layer.down_bias, self.parallel)
        return rms_norm(hidden, self.final_norm, eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[rows, vocab]``, in the model's dtype, of rows of `forward`'s result."""
        return self.parallel.gather(F.linear(hidden, self.lm_head))

    def _attend(
        self,
        index: int,
        layer: _Layer,
        normed: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        attention: AttentionBackend,
    ) -> torch.Tensor:
        head_dim = self.spec.head_dim
        num_heads = layer.o.shape[1] // head_dim
        num_kv_heads = (layer.qkv.shape[0] // head_dim - num_heads) // 2
        heads = F.linear(normed, layer.qkv, layer.qkv_bias).view(-1, num_heads + 2 * num_kv_heads, head_dim)
        q, k, v = heads.tensor_split((num_heads, num_heads + num_kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(q, layer.q_norm, self.spec.rms_norm_eps)
            k = rms_norm(k, layer.k_norm, self.spec.rms_norm_eps)
        out = attention.attend(index, rotate(q, *angles), rotate(k, *angles), v)
        return row_parallel_linear(out.flatten(1), layer.o, layer.o_bias, self.parallel)
