"""The profile of a model in FP8, derived from one in bfloat16 by what its steps read and compute.

A step's time is split into the host's part and three parts of the device: the matrices between embedding and LM head,
the LM head, and attention. The three are in proportion to their rooflines (Williams et al. 2009): the longer one of
bytes over bandwidth and operations over the rate. Quantisation changes the matrices and attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from hbserve.policy.step_profile import PairPoint, StepPoint, StepProfile

HOST_MS = 0.7
"""Time of the host for a step, even of the smallest model: measured for Qwen3-0.6B beside an H200."""
_BYTES_PER_S = 3.4e12
_FLOP_PER_S = 7.9e14
"""Rates of an H200 in bfloat16 (docs/quantization.md): bytes of weights at one row, operations at 4096 rows. Only their
ratio counts here."""
_SHORT_BYTES = 2
_FP8_MATRICES = 0.60
"""Time of FP8 matrices over that in bfloat16: between 0.53 (4096 rows) and 0.8 (128 rows) were measured on an H200."""
_FP8_KV = 0.57
"""The same of decode attention over FP8 KV. Prompts' attention computes as much as before."""


@dataclass(frozen=True)
class ModelAmounts:
    """What a step of one rank reads and computes.

    Attributes:
        matrices: parameters between embedding and LM head; ``head``: those of the LM head.
        kv_bytes: of a token in bfloat16.
        pair_flop: of a pair of query and key.
    """

    matrices: float
    head: float
    kv_bytes: float
    pair_flop: float


@dataclass(frozen=True)
class QuantizedShares:
    """Times of a quantised model's parts over those in bfloat16, and the same in words."""

    matrices: float
    decode_attention: float
    text: str


def quantized_shares(weights: bool, kv: bool) -> QuantizedShares:
    """Return the shares of FP8 weights, FP8 KV, or both."""
    matrices, attention = _FP8_MATRICES if weights else 1.0, _FP8_KV if kv else 1.0
    texts = [f"matrices take {matrices:.2f} of their time"] if weights else []
    texts += [f"decode attention takes {attention:.2f} of its time"] if kv else []
    return QuantizedShares(matrices, attention, ", ".join(texts))


def derive(profile: StepProfile, amounts: ModelAmounts, shares: QuantizedShares) -> StepProfile:
    """Return the profile of the same model with some parts faster."""
    replace = msgspec.structs.replace

    def of_step(point: StepPoint) -> StepPoint:
        rows, pairs = point.decode_rows, point.prompt_tokens * (point.prompt_context + point.prompt_tokens / 2)
        share = _share(amounts, shares, point.prompt_tokens, pairs, rows, rows * point.decode_context)
        return replace(point, ms=_scaled(point.ms, share))

    def of_pair(pair: PairPoint) -> PairPoint:
        rows = pair.decode_rows
        prefill = _share(amounts, shares, pair.prompt_tokens, pair.prompt_tokens**2 / 2, 0, 0)
        decode = _share(amounts, shares, 0, 0.0, rows, rows * pair.decode_context)
        return replace(pair, prefill_ms=_scaled(pair.prefill_ms, prefill), decode_ms=_scaled(pair.decode_ms, decode))

    return replace(
        profile,
        model=f"{profile.model}, {shares.text}",
        source="derived",
        subject="",
        steps=tuple(map(of_step, profile.steps)),
        pairs=tuple(map(of_pair, profile.pairs)),
    )


def _scaled(ms: float, share: float) -> float:
    host_ms = min(HOST_MS, ms)
    return host_ms + share * (ms - host_ms)


def _share(
    amounts: ModelAmounts, shares: QuantizedShares, tokens: float, pairs: float, rows: float, keys: float
) -> float:
    """Return the time of the device's work over that in bfloat16."""
    num_tokens = tokens + rows
    matrices_s = max(_SHORT_BYTES * amounts.matrices / _BYTES_PER_S, 2 * amounts.matrices * num_tokens / _FLOP_PER_S)
    num_sampled = rows + (tokens > 0)
    head_s = max(_SHORT_BYTES * amounts.head / _BYTES_PER_S, 2 * amounts.head * num_sampled / _FLOP_PER_S)
    prompts_s = amounts.pair_flop * pairs / _FLOP_PER_S
    decodes_s = amounts.kv_bytes * keys / _BYTES_PER_S
    whole_s = matrices_s + head_s + prompts_s + decodes_s
    return (shares.matrices * matrices_s + head_s + prompts_s + shares.decode_attention * decodes_s) / whole_s
