"""The profile that stands in until there is one of the model and device at hand.

Qwen3-8B's shape (36 layers, hidden 4096, GQA 32/8) on one NVIDIA H200, driver 580, CUDA 13.0, torch 2.11,
FlashInfer 0.6.6, shares as `hbserve.platform` makes them, prefill at the lower client priority: points of two runs
of `python -m hbserve.profile`, those with short prompts side by side of docs/results/profile_qwen3_8b_h200.json.
"""

from __future__ import annotations

from hbserve.slo.step_profile import DecodePoint, MixedPoint, PrefillPoint, StepProfile, TogetherPoint

_PERCENTAGES = (100, 80, 60, 40, 20)
_PREFILL_2048_MS = (53.4, 65.4, 71.2, 95.7, 201.0)
_DECODE_64_MS = (7.2, 8.7, 8.5, 10.8, 16.8)
_DECODE_192_MS = (13.0, 16.2, 17.8, 23.1, 38.9)
# (prefill %, decode %): (prefill ms, decode ms)
_TOGETHER_64 = {
    (100, 100): (58.2, 24.4),
    (100, 60): (57.7, 35.3),
    (100, 40): (57.9, 39.5),
    (80, 100): (71.0, 12.3),
    (80, 60): (73.5, 15.2),
    (80, 40): (72.8, 17.6),
    (60, 100): (73.5, 11.2),
    (60, 60): (77.0, 12.9),
    (60, 40): (76.3, 13.9),
    (40, 100): (96.5, 9.6),
}
_TOGETHER_192 = {
    (100, 100): (71.1, 36.0),
    (100, 60): (70.5, 53.0),
    (100, 40): (67.1, 67.1),
    (80, 100): (68.8, 23.3),
    (80, 60): (73.4, 31.4),
    (80, 40): (74.7, 37.1),
    (60, 100): (72.1, 20.5),
    (60, 60): (83.4, 27.0),
    (60, 40): (77.3, 31.5),
    (40, 100): (96.6, 18.2),
}
# The same beside steps of 512 prompt tokens, which lose far more.
_SHORT_64 = {
    (100, 100): (20.8, 14.3),
    (100, 60): (19.0, 18.5),
    (100, 40): (18.6, 20.3),
    (80, 100): (30.9, 10.2),
    (80, 60): (25.2, 12.9),
    (80, 40): (22.4, 15.3),
    (60, 100): (35.5, 9.6),
    (60, 60): (26.4, 11.7),
    (60, 40): (23.6, 13.6),
    (40, 100): (44.6, 9.1),
}
_SHORT_192 = {
    (100, 100): (31.7, 20.8),
    (100, 60): (23.0, 31.8),
    (100, 40): (21.7, 36.0),
    (80, 100): (41.0, 18.6),
    (80, 60): (27.0, 27.0),
    (80, 40): (23.7, 32.3),
    (60, 100): (45.3, 16.7),
    (60, 60): (28.5, 24.4),
    (60, 40): (24.5, 30.4),
    (40, 100): (51.5, 16.2),
}
_MIXED_64 = {128: 9.5, 512: 19.9, 2048: 55.6}
_MIXED_192 = {128: 17.0, 512: 24.5, 2048: 62.5}


def _together(table: dict[tuple[int, int], tuple[float, float]], batch: int, tokens: int = 2048) -> list[TogetherPoint]:
    return [
        TogetherPoint(
            prefill_percentage=prefill,
            decode_percentage=decode,
            priority=True,
            tokens=tokens,
            batch=batch,
            context=1024,
            prefill_ms=prefill_ms,
            decode_ms=decode_ms,
        )
        for (prefill, decode), (prefill_ms, decode_ms) in table.items()
    ]


def _decode(milliseconds: tuple[float, ...], batch: int) -> list[DecodePoint]:
    return [
        DecodePoint(percentage=p, batch=batch, context=1024, ms=ms)
        for p, ms in zip(_PERCENTAGES, milliseconds, strict=True)
    ]


H200_8B = StepProfile(
    model="8B shape (36 layers, hidden 4096, GQA 32/8)",
    device="NVIDIA H200",
    source="built in",
    prefill=(
        *(PrefillPoint(percentage=p, tokens=2048, ms=ms) for p, ms in zip(_PERCENTAGES, _PREFILL_2048_MS, strict=True)),
        PrefillPoint(percentage=100, tokens=128, ms=5.7),
        PrefillPoint(percentage=100, tokens=512, ms=12.9),
        PrefillPoint(percentage=100, tokens=4096, ms=101.4),
        PrefillPoint(percentage=100, tokens=4096, context=8192, ms=133.1),
    ),
    decode=(
        DecodePoint(percentage=100, batch=1, context=1024, ms=4.3),
        *_decode(_DECODE_64_MS, 64),
        *_decode(_DECODE_192_MS, 192),
    ),
    together=(
        *_together(_TOGETHER_64, 64),
        *_together(_TOGETHER_192, 192),
        *_together(_SHORT_64, 64, 512),
        *_together(_SHORT_192, 192, 512),
    ),
    mixed=(
        *(MixedPoint(chunk=chunk, batch=64, context=1024, ms=ms) for chunk, ms in _MIXED_64.items()),
        *(MixedPoint(chunk=chunk, batch=192, context=1024, ms=ms) for chunk, ms in _MIXED_192.items()),
    ),
)
"""8B on an H200."""
