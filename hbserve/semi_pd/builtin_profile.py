"""The profile that stands in until there is one of the model and device at hand.

An 8B-shaped model (32 layers, hidden 4096, GQA 32/8) on one NVIDIA H200, driver 580, CUDA 13.0,
torch 2.11, FlashInfer 0.6.6, MPS: decode of 64 sequences at context 1024 and prefill of 2048 tokens,
alone at each percentage and side by side, without and with client priority; a prefill of 4096
tokens from docs/benchmarks.md (8 prompts in 0.839 s).
"""

from __future__ import annotations

from hbserve.semi_pd.step_profile import DecodePoint, MixedPoint, PrefillPoint, StepProfile, TogetherPoint

_PERCENTAGES = (100, 80, 60, 50, 40, 30, 20)
_PREFILL_2048_MS = (45.0, 53.0, 68.0, 81.0, 101.0, 136.0, 195.0)
_DECODE_64_MS = (7.3, 7.5, 8.1, 8.2, 9.0, 11.5, 15.5)
# (prefill %, decode %): (prefill ms, decode ms)
_SIDE_BY_SIDE = {
    (50, 50): (101, 11.5),
    (60, 40): (87, 12.7),
    (70, 30): (71, 15.8),
    (80, 40): (66, 17.0),
    (80, 20): (61, 18.7),
    (90, 50): (65, 26.0),
    (100, 50): (54, 34.0),
    (100, 100): (54, 33.0),
}
_WITH_PRIORITY_64 = {(100, 100): (67, 16.4), (100, 60): (60, 21.9), (80, 50): (72, 14.0), (70, 50): (79, 12.6)}
_WITH_PRIORITY_192 = {(100, 100): (86, 23.5), (80, 60): (81, 26.5), (70, 50): (85, 29.1), (80, 40): (72, 31.4)}
_MIXED_64 = {128: 9.7, 256: 11.7, 512: 17.9, 1024: 30.0, 2048: 56.0}
_MIXED_192 = {128: 15.7, 256: 22.1, 512: 25.0, 1024: 34.0, 2048: 61.0}


def _together(table: dict[tuple[int, int], tuple[int, float]], priority: bool, batch: int) -> list[TogetherPoint]:
    return [
        TogetherPoint(
            prefill_percentage=prefill,
            decode_percentage=decode,
            priority=priority,
            tokens=2048,
            batch=batch,
            context=1024,
            prefill_ms=prefill_ms,
            decode_ms=decode_ms,
        )
        for (prefill, decode), (prefill_ms, decode_ms) in table.items()
    ]


H200_8B = StepProfile(
    model="8B shape (32 layers, hidden 4096, GQA 32/8)",
    device="NVIDIA H200",
    source="built in",
    prefill=(
        *(PrefillPoint(percentage=p, tokens=2048, ms=ms) for p, ms in zip(_PERCENTAGES, _PREFILL_2048_MS, strict=True)),
        PrefillPoint(percentage=100, tokens=4096, ms=104.9),
    ),
    decode=(
        *(
            DecodePoint(percentage=p, batch=64, context=1024, ms=ms)
            for p, ms in zip(_PERCENTAGES, _DECODE_64_MS, strict=True)
        ),
        DecodePoint(percentage=100, batch=192, context=1024, ms=12.8),
    ),
    together=(
        *_together(_SIDE_BY_SIDE, False, 64),
        *_together(_WITH_PRIORITY_64, True, 64),
        *_together(_WITH_PRIORITY_192, True, 192),
    ),
    mixed=(
        *(MixedPoint(chunk=chunk, batch=64, context=1024, ms=ms) for chunk, ms in _MIXED_64.items()),
        *(MixedPoint(chunk=chunk, batch=192, context=1024, ms=ms) for chunk, ms in _MIXED_192.items()),
    ),
)
"""8B on an H200."""
