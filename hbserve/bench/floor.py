"""The least time in which one device could serve a batch, from its bytes and FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hbserve.bench.model_cost import ModelCost


@dataclass(frozen=True)
class Floor:
    """Time and work of the ideal schedule.

    Attributes:
        prefill_flops, decode_flops: floating point operations.
        weight_bytes: read in the decode steps.
        kv_bytes: read and written in the decode steps.
        decode_steps: how many there are.
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
        """Prefill, then decode."""
        return self.prefill_s + self.decode_s

    @property
    def flops(self) -> int:
        """Of the whole batch."""
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

        prefill = max(sum of prompt_flops(p) / matmul rate, weight_bytes / copy rate)

    Then decode steps j = 1, 2, ... with every request that wants more than j tokens, until each has
    ended; a request with a prompt of p tokens has a context of p + j in step j, its newest token
    included, of which it reads all but that one and writes that one::

        bytes  = weight_bytes + sum of kv_bytes(p + j)
        flops  = sum of token_flops + head_flops + attention_flops(p + j)
        step   = max(bytes / copy rate, flops / matmul rate)

    No memory limit, no launch, no scheduling, no sampling. A schedule that runs prefill's compute
    beside decode's memory traffic, or on another device, may in principle be faster than this one.

    Args:
        cost: of the model; the terms above are its methods.
        copy_bytes_per_s, matmul_flops_per_s: what the device reaches, see `hbserve.bench.device_limits`.
    """
    prefill_flops = sum(cost.prompt_flops(length) for length in input_lens)
    decode_flops = kv_bytes = decode_steps = 0
    decode_s = 0.0
    for step in range(1, max(output_lens)):
        contexts = [p + step for p, output_len in zip(input_lens, output_lens, strict=True) if output_len > step]
        step_kv_bytes = sum(map(cost.kv_bytes, contexts))
        step_flops = len(contexts) * (cost.token_flops + cost.head_flops) + sum(map(cost.attention_flops, contexts))
        decode_s += max((cost.weight_bytes + step_kv_bytes) / copy_bytes_per_s, step_flops / matmul_flops_per_s)
        decode_flops += step_flops
        kv_bytes += step_kv_bytes
        decode_steps += 1
    return Floor(
        prefill_s=max(prefill_flops / matmul_flops_per_s, cost.weight_bytes / copy_bytes_per_s),
        decode_s=decode_s,
        prefill_flops=prefill_flops,
        decode_flops=decode_flops,
        weight_bytes=decode_steps * cost.weight_bytes,
        kv_bytes=kv_bytes,
        decode_steps=decode_steps,
    )
