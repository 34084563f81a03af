"""The floor: the least time in which a device could serve a batch, from the model's bytes and FLOPs.

`ModelCost` counts the bytes and FLOPs that no implementation of a model can avoid. `compute_floor`
divides them by what the device reaches (`hbserve.bench.device_limits`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hbserve.model_spec import ModelSpec
from hbserve.models.expert_shares import expert_shares, touched_experts


class ModelCost:
    """Least work per token of a model.

    Norms, biases, rotary embeddings and activations are left out. They are small, and without them
    the floor is certainly not too high.

    Args:
        itemsize: bytes per parameter and per KV element that is not in FP8.
        expert_skew: exponent of the loads of experts (`hbserve.models.expert_shares`).

    Attributes:
        layer_params: parameters of all layers' matrices; of experts, those of one token.
        head_params: parameters of the LM head.
        token_flops: FLOPs of all layers' matrices for one token: 2 per parameter.
        head_flops: FLOPs of the LM head for one sampled token.
    """

    def __init__(self, spec: ModelSpec, itemsize: int, expert_skew: float = 0.0) -> None:
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        attention_params = spec.hidden_size * (2 * q_size + 2 * kv_size)
        row_params = spec.hidden_size * (3 if spec.family.is_gated else 2)
        experts, num_sparse = spec.experts, 0 if spec.experts is None else sum(spec.experts.layers)
        common_params = spec.num_layers * attention_params
        common_params += (spec.num_layers - num_sparse) * row_params * spec.intermediate_size
        expert_params, num_chosen, self._shares = 0, 0, []
        if experts is not None:
            common_params += num_sparse * (row_params * experts.shared_size + spec.hidden_size * experts.num_experts)
            expert_params, num_chosen = num_sparse * row_params * experts.inner_size, experts.num_chosen
            self._shares = expert_shares(experts, expert_skew)
        self.layer_params = common_params + num_chosen * expert_params
        self.head_params = spec.vocab_size * spec.hidden_size
        matrix_itemsize, plain_params = itemsize, 0
        if spec.weight_format is not None and spec.weight_format.computes:
            matrix_itemsize, dense_params = 1, row_params * spec.intermediate_size
            names = (f"model.layers.{i}.{spec.family.mlp}.{spec.family.down}" for i in range(spec.num_layers))
            plain_params = dense_params * sum(not spec.weight_format.converts(name) for name in names)
        self._common_bytes = common_params * matrix_itemsize + plain_params * (itemsize - matrix_itemsize)
        self._common_bytes += self.head_params * itemsize
        self._expert_bytes = expert_params * matrix_itemsize
        self.token_flops = 2 * self.layer_params
        self.head_flops = 2 * self.head_params
        # Scores and weighted values: one multiplication and one addition each per query element.
        self._flops_per_key = 4 * q_size
        self._bytes_per_key = 2 * kv_size * (itemsize if spec.kv_format is None else 1)
        self._windows = Counter(spec.sliding_windows)

    def weight_bytes(self, num_tokens: int) -> int:
        """Count the bytes of weights that a step with so many tokens reads: layers, LM head, and the experts it needs.

        The embedding is read by row, so it counts only where it is the LM head too. Tokens choose independently.
        """
        touched = touched_experts(self._shares, num_tokens)
        return self._common_bytes + round(touched * self._expert_bytes)

    def attention_flops(self, context_tokens: int) -> int:
        """Count the FLOPs of one token that attends to ``context_tokens``, itself included, in all layers."""
        return self._flops_per_key * self._visible_keys(context_tokens)

    def kv_bytes(self, context_tokens: int) -> int:
        """Count the KV bytes that one token with such a context, itself included, reads or writes in all layers."""
        return self._bytes_per_key * self._visible_keys(context_tokens)

    def prompt_flops(self, prompt_tokens: int) -> int:
        """Count the FLOPs of a whole prompt: layers, causal attention, and the logits of the last token."""
        keys = sum(layers * _causal_pairs(prompt_tokens, window) for window, layers in self._windows.items())
        return prompt_tokens * self.token_flops + self._flops_per_key * keys + self.head_flops

    def _visible_keys(self, context_tokens: int) -> int:
        """Sum over the layers the keys that a token sees."""
        return sum(
            layers * (context_tokens if window is None else min(context_tokens, window))
            for window, layers in self._windows.items()
        )


def _causal_pairs(tokens: int, window: int | None) -> int:
    """Count one layer's query-key pairs: each token sees itself and the tokens before it within the window."""
    width = tokens if window is None else min(tokens, window)
    return width * (width + 1) // 2 + (tokens - width) * width


@dataclass(frozen=True)
class Floor:
    """Time and work of the ideal schedule.

    Attributes:
        prefill_flops, decode_flops: floating point operations.
        weight_bytes: bytes of weights read in the decode steps.
        kv_bytes: bytes of KV read and written in the decode steps.
    """

    prefill_s: float
    decode_s: float
    prefill_flops: int
    decode_flops: int
    weight_bytes: int
    kv_bytes: int
    decode_steps: int

    @property
    def seconds(self) -> float:
        return self.prefill_s + self.decode_s

    @property
    def flops(self) -> int:
        return self.prefill_flops + self.decode_flops


def compute_floor(
    cost: ModelCost,
    input_lens: Sequence[int],
    output_lens: Sequence[int],
    copy_bytes_per_s: float,
    matmul_flops_per_s: float,
) -> Floor:
    """Simulate the ideal schedule of requests that are all there at once.

    First all prompts, which also give each request its first token::

        prefill = max(sum of prompt_flops(p) / matmul rate, weight_bytes(all tokens) / copy rate)

    Then decode steps j = 1, 2, ... with every request that wants more than j tokens, until all have
    ended. In step j a request with a prompt of p tokens has a context of p + j, its newest token
    included. It writes the KV of that token and reads the KV of the others::

        bytes  = weight_bytes(requests) + sum of kv_bytes(p + j)
        flops  = sum of token_flops + head_flops + attention_flops(p + j)
        step   = max(bytes / copy rate, flops / matmul rate)

    Memory limits, launches, scheduling and sampling take no time. A schedule that runs prefill's compute
    beside decode's memory traffic, or on another device, may in principle be faster than this one.

    Args:
        copy_bytes_per_s, matmul_flops_per_s: what the device reaches, see `hbserve.bench.device_limits`.
    """
    prefill_flops = sum(cost.prompt_flops(length) for length in input_lens)
    decode_flops = kv_bytes = weight_bytes = decode_steps = 0
    decode_s = 0.0
    for step in range(1, max(output_lens)):
        contexts = [p + step for p, output_len in zip(input_lens, output_lens, strict=True) if output_len > step]
        step_kv_bytes = sum(map(cost.kv_bytes, contexts))
        step_flops = len(contexts) * (cost.token_flops + cost.head_flops) + sum(map(cost.attention_flops, contexts))
        step_weight_bytes = cost.weight_bytes(len(contexts))
        decode_s += max((step_weight_bytes + step_kv_bytes) / copy_bytes_per_s, step_flops / matmul_flops_per_s)
        decode_flops += step_flops
        kv_bytes += step_kv_bytes
        weight_bytes += step_weight_bytes
        decode_steps += 1
    prefill_s = max(prefill_flops / matmul_flops_per_s, cost.weight_bytes(sum(input_lens)) / copy_bytes_per_s)
    return Floor(prefill_s, decode_s, prefill_flops, decode_flops, weight_bytes, kv_bytes, decode_steps)
