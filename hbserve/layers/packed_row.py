"""Products of a row with weights in packed words, for Triton kernels that read weights as fast as memory delivers.

A thread loads 16 bytes of a row of weights, a chunk, as four 32-bit words. Triton would take values of 8 or 16 bits
apart that a loop carries from one round to the next, with more instructions than the products need. Assembler converts
and multiplies the words of a chunk and returns one sum in float32. The row is prepared once, in the same order::

    weights of a chunk    word 0         word 1         word 2         word 3
      FP8, 16 values      w0 w1 w2 w3    w4 w5 w6 w7    ...            ... w15
      16 bits, 8 values   w0 w1          w2 w3          w4 w5          w6 w7

FP8 values are converted to float16 in pairs, and multiplied in pairs. A product of FP8 numbers has 8 significant bits,
so it is exact in float16. Eight products are added in float16, to 11 bits, and sums of chunks in float32. The row's
values must therefore be at most 7, and not 448: 8 * 7 * 448 is below the largest float16. Weights of 16 bits are
multiplied in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROW_PEAK = tl.constexpr(7.0)
"""The largest value of a row that is multiplied by FP8 weights."""

_CHUNK_WORDS = 4

_SUM_OF_FP8 = tl.constexpr(
    "{ .reg .b16 low, high; .reg .b32 w, v, s, t; .reg .b16 p, q; .reg .f32 f, g; mov.b32 s, 0; mov.b32 t, 0;"
    + "".join(
        f" mov.b32 {{low, high}}, ${1 + word}; cvt.rn.f16x2.e4m3x2 w, low; cvt.rn.f16x2.e4m3x2 v, high;"
        f" fma.rn.f16x2 s, w, ${5 + 2 * word}, s; fma.rn.f16x2 t, v, ${6 + 2 * word}, t;"
        for word in range(_CHUNK_WORDS)
    )
    + " add.rn.f16x2 s, s, t; mov.b32 {p, q}, s; cvt.f32.f16 f, p; cvt.f32.f16 g, q; add.rn.f32 $0, f, g; }"
)
_ROUNDED_PAIR = tl.constexpr(
    "{ .reg .b16 pair; .reg .b32 w, factor; cvt.rn.satfinite.e4m3x2.f32 pair, $2, $1; cvt.rn.f16x2.e4m3x2 w, pair;"
    " mov.b32 factor, 0x24002400; mul.rn.f16x2 $0, w, factor; }"  # 1 / 64 twice in float16
)
_UNPACKED = {
    "bf16": "shl.b32 a, ${0}, 16; mov.b32 f, a; and.b32 a, ${0}, 0xffff0000; mov.b32 g, a;",
    "fp16": "mov.b32 {{p, q}}, ${0}; cvt.f32.f16 f, p; cvt.f32.f16 g, q;",
}
_SUM_OF_BF16, _SUM_OF_FP16 = (
    tl.constexpr(
        "{ .reg .b32 a; .reg .b16 p, q; .reg .f32 f, g, s; mov.f32 s, 0f00000000;"
        + "".join(
            f" {_UNPACKED[kind].format(1 + word)}"
            f" fma.rn.f32 s, f, ${5 + 2 * word}, s; fma.rn.f32 s, g, ${6 + 2 * word}, s;"
            for word in range(_CHUNK_WORDS)
        )
        + " mov.f32 $0, s; }"
    )
    for kind in ("bf16", "fp16")
)


@triton.jit
def load_words(begins, first: tl.constexpr, count: tl.constexpr, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load words ``first .. first + count - 1`` of rows that begin at ``begins [rows, 1]``; those from ``size`` are 0.

    They are 32-bit integers ``[rows, count]``.
    """
    words = first + tl.arange(0, count)
    if first + count <= size:
        return tl.load(begins + words[None, :])
    return tl.load(begins + words[None, :], mask=(words < size)[None, :], other=0)


@triton.jit
def _quarters(x, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """Split a vector ``[4 * size]`` into four: element i of every four."""
    even, odd = tl.split(tl.reshape(x, (size, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _eighths(x, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """Split a vector ``[8 * size]`` into eight: element i of every eight."""
    even, odd = tl.split(tl.reshape(x, (size * 4, 2)))
    a0, a1, a2, a3 = _quarters(even, size)
    b0, b1, b2, b3 = _quarters(odd, size)
    return a0, b0, a1, b1, a2, b2, a3, b3


@triton.jit
def pack_row(values, size: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Prepare float32 values ``[size]`` for weights of a dtype: eight vectors, or four for float32.

    For FP8 weights they are at most `ROW_PEAK`, and are rounded to float16.
    """
    if dtype == tl.float32:
        return _quarters(values, size // 4)
    elif dtype == tl.float8e4nv:
        low, high = tl.split(tl.reshape(values.to(tl.float16).to(tl.int16, bitcast=True), (size // 2, 2)))
        return _eighths(low.to(tl.int32) & 0xFFFF | (high.to(tl.int32) << 16), size // 16)
    else:  # Triton compiles what comes after a return
        return _eighths(values, size // 8)


@triton.jit
def pack_rounded_row(values, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round float32 values ``[size]`` to FP8, and prepare a 64th of them for FP8 weights; FP8 has no infinity."""
    even, odd = tl.split(tl.reshape(values, (size // 2, 2)))
    pairs = tl.inline_asm_elementwise(_ROUNDED_PAIR, "=r,f,f", [even, odd], dtype=tl.int32, is_pure=True, pack=1)
    return _eighths(pairs, size // 16)


@triton.jit
def chunk_sums(  # type: ignore[no-untyped-def]
    words, row, rows: tl.constexpr, count: tl.constexpr, dtype: tl.constexpr
):
    """Multiply weights ``[rows, count]`` in words by a row of `pack_row`: float32 sums ``[rows, count / 4]``."""
    even, odd = tl.split(tl.reshape(words, (rows, count // 4, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    if dtype == tl.float32:
        total = w0.to(tl.float32, bitcast=True) * row[0][None, :]
        total += w1.to(tl.float32, bitcast=True) * row[1][None, :]
        total += w2.to(tl.float32, bitcast=True) * row[2][None, :]
        return total + w3.to(tl.float32, bitcast=True) * row[3][None, :]
    else:
        sum_of: tl.constexpr = (
            _SUM_OF_FP8 if dtype == tl.float8e4nv else _SUM_OF_BF16 if dtype == tl.bfloat16 else _SUM_OF_FP16
        )
        of_row: tl.constexpr = ",r,r,r,r,r,r,r,r" if dtype == tl.float8e4nv else ",f,f,f,f,f,f,f,f"
        return tl.inline_asm_elementwise(
            sum_of, "=f,r,r,r,r" + of_row,
            [
                w0, w1, w2, w3, row[0][None, :], row[1][None, :], row[2][None, :], row[3][None, :],
                row[4][None, :], row[5][None, :], row[6][None, :], row[7][None, :],
            ],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
