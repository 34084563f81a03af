"""Attention over FP8 keys and values that go from memory to the registers of tensor cores; a part of decode kernels.

Each thread loads 16 consecutive bytes at a time, one block of tokens ahead, and keeps them until the product. The way
through shared memory would cost more instructions than the arithmetic: values would be written to it as FP8, read,
converted, written again and read transposed. A warp has 32 threads ``(r, c)``, 8 x 4. Products of 16 bits take::

    queries x keys      of thread (r, c) key r of each 8, and of each 16 elements of a head 4 from 4 c
    weights x values    of thread (r, c) element r of each 8 of a head, and of each 16 tokens 4 from 4 c

Any order of the summed index gives the same product if both operands have it. So thread (r, c) loads elements
``16 c .. 16 c + 15`` of each 64 of key r, and queries are brought to that order. Of values it loads elements ``16 r ..
16 r + 15`` of a head of 128, of tokens ``2 c, 2 c + 1, 8 + 2 c, 9 + 2 c`` of each 16, because its weights are those of
these tokens. A compiler that orders operands in another way moves data between threads: the result stays right.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE_TOKENS = 16
"""A block of tokens is a whole number of tiles; a page must be, too."""


@triton.jit
def _halves(pairs):  # type: ignore[no-untyped-def]
    """Split 32 bits into two float16, in a new last dimension."""
    low = pairs.to(tl.int16).to(tl.float16, bitcast=True)
    return tl.join(low, (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True))


@triton.jit
def _widened_word(words):  # type: ignore[no-untyped-def]
    """Convert 4 FP8 numbers of each word to float16 ``[..., 2, 2]``, in their order."""
    first, second = tl.inline_asm_elementwise(
        "{ .reg .b16 low, high; mov.b32 {low, high}, $2;"
        " cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }",
        "=r,=r,r", [words], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    return _halves(tl.join(first, second))


@triton.jit
def _widened_pairs(words, next_words):  # type: ignore[no-untyped-def]
    """Convert the 4 FP8 numbers of two words to float16 ``[..., 2, 2, 2]``.

    Number ``i + 2 j`` of the first word is at ``[..., i, j, 0]``, that of the second at ``[..., i, j, 1]``.
    """
    first, second, third, fourth = tl.inline_asm_elementwise(
        "{ .reg .b16 low, high; .reg .b32 a, b; prmt.b32 a, $4, $5, 0x5140; prmt.b32 b, $4, $5, 0x7362;"
        " mov.b32 {low, high}, a; cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high;"
        " mov.b32 {low, high}, b; cvt.rn.f16x2.e4m3x2 $2, low; cvt.rn.f16x2.e4m3x2 $3, high; }",
        "=r,=r,=r,=r,r,r", [words, next_words],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    return _halves(tl.join(tl.join(first, second), tl.join(third, fourth)))


@triton.jit
def _load_block(  # type: ignore[no-untyped-def]
    words, pages, at, last_page, stride_block,
    page: tl.constexpr, block: tl.constexpr, head_dim: tl.constexpr, stride_token: tl.constexpr,
):  # fmt: skip
    """Load keys and values of a block of tokens from position ``at``, as words of 4 FP8 numbers.

    Returns:
        Keys ``[c, r, tiles, 2, head_dim / 64, 4]``; values of tokens 2 c and of tokens 2 c + 1, each
        ``[c, r, tiles, 2, head_dim / 32]``. From token ``end`` on they are anything.
    """
    tiles: tl.constexpr = block // 16
    c, r, half = tl.arange(0, 4), tl.arange(0, 8), tl.arange(0, 2)
    tile = at + tl.arange(0, tiles) * 16
    page_id = tl.load(pages + tl.minimum(tile // page, last_page)).to(tl.int64)
    first = words + page_id * (stride_block // 4) + (tile % page) * stride_token
    key = r[None, :, None, None, None, None] * stride_token + half[None, None, None, :, None, None] * (8 * stride_token)
    key += c[:, None, None, None, None, None] * 4 + tl.arange(0, 4)
    key += tl.arange(0, head_dim // 64)[None, None, None, None, :, None] * 16
    value = c[:, None, None, None, None] * (2 * stride_token) + half[None, None, None, :, None] * (8 * stride_token)
    value += r[None, :, None, None, None] * (head_dim // 32) + tl.arange(0, head_dim // 32)
    values = first[None, None, :, None, None] + page * stride_token + value
    return tl.load(first[None, None, :, None, None, None] + key), tl.load(values), tl.load(values + stride_token)


@triton.jit
def attend_directly(  # type: ignore[no-untyped-def]
    query, cache, pages, head, start, end, row_end, stride_block,
    page: tl.constexpr, block: tl.constexpr, query_rows: tl.constexpr, num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
):  # fmt: skip
    """Attend to tokens ``start .. end - 1`` of a sequence, with softmax in base 2.

    Args:
        query: float16 ``[query_rows, head_dim]``; the scale is in it.
        cache: FP8 ``[page, k/v, token, head, head_dim]``, strided by ``stride_block`` in its first dimension.
        pages: the sequence's page ids.
        start: a multiple of 16.
        row_end: ``[query_rows]``; a row sees tokens before it, at most ``end``.

    Returns:
        Of each row the highest score, the sum of weights, and the sum of weighted values ``[query_rows, head_dim]``.
    """
    tiles: tl.constexpr = block // 16
    stride_token: tl.constexpr = num_kv_heads * head_dim // 4
    words = cache.to(tl.pointer_type(tl.int32)) + head * (head_dim // 4)
    query = tl.permute(tl.reshape(query, (query_rows, head_dim // 64, 4, 4, 4)), (0, 1, 3, 2, 4))
    query = tl.reshape(query, (query_rows, head_dim))
    highest = tl.full((query_rows,), -1e30, tl.float32)
    total = tl.zeros((query_rows,), tl.float32)
    weighted = tl.zeros((query_rows, head_dim), tl.float32)
    token = tl.arange(0, block)
    value_token = tl.arange(0, 4)[:, None, None, None, None] * 2 + tl.arange(0, 2)[None, None, None, :, None] * 8
    value_token += tl.arange(0, tiles)[None, None, :, None, None] * 16
    last_page = (end - 1) // page
    keys, values, next_values = _load_block(
        words, pages, start, last_page, stride_block, page, block, head_dim, stride_token
    )
    for at in tl.range(start, end, block, num_stages=1):
        key = tl.permute(_widened_word(keys), (4, 5, 0, 6, 7, 2, 3, 1))
        score = tl.dot(query, tl.reshape(key, (head_dim, block)))
        score = tl.where((at + token)[None, :] < row_end[:, None], score, -1e30)
        new_highest = tl.maximum(highest, tl.max(score, axis=1))
        shrink = tl.exp2(highest - new_highest)
        weight = tl.exp2(score - new_highest[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        highest = new_highest
        weight = tl.reshape(weight.to(tl.float16), (query_rows, tiles, 2, 4, 2))
        weight = tl.reshape(tl.permute(weight, (0, 1, 3, 2, 4)), (query_rows, block))
        # what was never written may be NaN
        values = tl.where(at + value_token < end, values, 0)
        next_values = tl.where(at + value_token + 1 < end, next_values, 0)
        value = tl.permute(_widened_pairs(values, next_values), (2, 0, 3, 7, 4, 6, 5, 1))
        keys, values, next_values = _load_block(
            words, pages, at + block, last_page, stride_block, page, block, head_dim, stride_token
        )
        weighted = tl.dot(weight, tl.reshape(value, (block, head_dim)), weighted * shrink[:, None])
    # the products' columns are elements r of each 8, thread by thread
    weighted = tl.permute(tl.reshape(weighted, (query_rows, head_dim // 8, 8)), (0, 2, 1))
    return highest, total, tl.reshape(weighted, (query_rows, head_dim))
