"""Quantisation into llama.cpp's K-quants, plain and slow: the package ``gguf`` can only read them.

The layouts are those of the structs ``block_q2_K`` to ``block_q6_K`` in llama.cpp's ggml-common.h: super-blocks of 256
values in 8 or 16 sub-blocks. A sub-block has an integer scale (and minimum); a super-block has their units in float16.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np

Kind = gguf.GGMLQuantizationType
K_QUANTS = (Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
_SIZE = 256


def quantize(values: Any, kind: Kind) -> Any:
    """Return the bytes ``[rows, bytes of a row]`` of a float32 matrix, whose rows are multiples of 256."""
    if kind not in K_QUANTS:
        return gguf.quantize(values, kind)
    blocks = values.astype(np.float32).reshape(-1, _SIZE)
    packed = {Kind.Q2_K: _q2, Kind.Q3_K: _q3, Kind.Q4_K: _q4, Kind.Q5_K: _q5, Kind.Q6_K: _q6}[kind](blocks)
    return packed.reshape(len(values), -1)


def _affine(blocks: Any, num_parts: int, max_level: int, max_scale: int) -> tuple[Any, ...]:
    """Return levels, scales, minima and their two units: value = unit·scale·level - min_unit·minimum."""
    parts = blocks.reshape(len(blocks), num_parts, -1)
    minima = np.maximum(-parts.min(-1), 0)
    spans = np.maximum(parts.max(-1) + minima, 1e-6)
    unit, min_unit = (_half(x.max(-1, keepdims=True) / max_scale) for x in (spans / max_level, minima))
    scales = np.clip(np.ceil(spans / max_level / unit), 1, max_scale)
    steps = np.clip(np.round(minima / np.maximum(min_unit, 1e-8)), 0, max_scale)
    shifted = parts + (min_unit * steps)[..., None]
    levels = np.clip(np.round(shifted / (unit * scales)[..., None]), 0, max_level)
    return *(x.astype(np.uint8) for x in (levels.reshape(blocks.shape), scales, steps)), unit, min_unit


def _symmetric(blocks: Any, half_levels: int, max_scale: int) -> tuple[Any, Any, Any]:
    """Return levels in ``[-half_levels, half_levels)``, the scales of 16 sub-blocks, and their unit."""
    parts = blocks.reshape(len(blocks), 16, 16)
    wanted = np.maximum(np.abs(parts).max(-1), 1e-6) / (half_levels - 1)
    unit = _half(wanted.max(-1, keepdims=True) / max_scale)
    scales = np.clip(np.ceil(wanted / unit), 1, max_scale).astype(np.int8)
    levels = np.clip(np.round(parts / (unit * scales)[..., None]), -half_levels, half_levels - 1).astype(np.int8)
    return levels.reshape(blocks.shape), scales, unit


def _half(values: Any) -> Any:
    """Round up to float16, so that no scale is above its maximum."""
    return np.nextafter(np.maximum(values, 1e-5).astype(np.float16), np.float16(np.inf)).astype(np.float32)


def _bytes(values: Any) -> Any:
    return values.astype(np.float16).view(np.uint8)


def _join(*fields: Any) -> Any:
    return np.concatenate([field.reshape(len(field), -1).astype(np.uint8) for field in fields], axis=-1)


def _two_bits(levels: Any) -> Any:
    """Of each half, byte ``i`` holds the levels ``i``, ``i + 32``, ``i + 64`` and ``i + 96``."""
    quarters = levels.reshape(-1, 2, 4, 32) & 3
    return quarters[:, :, 0] | quarters[:, :, 1] << 2 | quarters[:, :, 2] << 4 | quarters[:, :, 3] << 6


def _nibbles(levels: Any) -> Any:
    """Byte ``i`` of each 64 levels holds the levels ``i`` and ``i + 32``."""
    pairs = levels.reshape(-1, 4, 2, 32) & 15
    return pairs[:, :, 0] | pairs[:, :, 1] << 4


def _eight_scales(scales: Any, minima: Any) -> Any:
    """Pack eight scales and eight minima of six bits into twelve bytes."""
    rest = (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4
    return _join(*(x[:, :4] | x[:, 4:] >> 4 << 6 for x in (scales, minima)), rest)


def _high_bits(bits: Any) -> Any:
    """Bit ``j`` of byte ``i`` belongs to value ``32·j + i``."""
    return np.packbits(bits.reshape(-1, 8, 32).astype(np.uint8), axis=1, bitorder="little")


def _q2(blocks: Any) -> Any:
    levels, scales, minima, unit, min_unit = _affine(blocks, 16, 3, 15)
    return _join(scales | minima << 4, _two_bits(levels), _bytes(unit), _bytes(min_unit))


def _q3(blocks: Any) -> Any:
    levels, scales, unit = _symmetric(blocks, 4, 31)
    raised, packed = (levels + 4).astype(np.uint8), (scales + 32).astype(np.uint8)
    low = (packed[:, :8] & 15) | (packed[:, 8:] & 15) << 4
    quarters = packed.reshape(-1, 4, 4) >> 4
    high = quarters[:, 0] | quarters[:, 1] << 2 | quarters[:, 2] << 4 | quarters[:, 3] << 6
    return _join(_high_bits(raised > 3), _two_bits(raised), low, high, _bytes(unit))


def _q4(blocks: Any) -> Any:
    levels, scales, minima, unit, min_unit = _affine(blocks, 8, 15, 63)
    return _join(_bytes(unit), _bytes(min_unit), _eight_scales(scales, minima), _nibbles(levels))


def _q5(blocks: Any) -> Any:
    levels, scales, minima, unit, min_unit = _affine(blocks, 8, 31, 63)
    high = _high_bits(levels > 15)
    return _join(_bytes(unit), _bytes(min_unit), _eight_scales(scales, minima), high, _nibbles(levels))


def _q6(blocks: Any) -> Any:
    levels, scales, unit = _symmetric(blocks, 32, 127)
    raised = (levels + 32).astype(np.uint8)
    quarters = raised.reshape(-1, 2, 4, 32)
    low = np.stack([quarters[:, :, part] & 15 | (quarters[:, :, part + 2] & 15) << 4 for part in (0, 1)], axis=2)
    return _join(low, _two_bits(raised >> 4), scales.view(np.uint8), _bytes(unit))
