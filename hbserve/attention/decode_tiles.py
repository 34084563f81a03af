"""Parts of kernels for decode attention: conversion of FP8 values, and the merge of partial results."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def in_registers(values, operand: tl.constexpr):  # type: ignore[no-untyped-def]
    """Convert FP8 values as they were loaded.

    Triton converts what a product reads after it has changed hands between threads. Values of a transposed operand
    change hands one byte at a time then. It leaves assembler that has effects where it is.
    """
    if values.dtype == tl.float8e4nv:
        values = tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; mov.b32 {low, high}, $2;"
            " cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }",
            "=r,=r,r", [values], dtype=tl.float16, is_pure=False, pack=4,
        )  # fmt: skip
    return values.to(operand)


@triton.jit
def merge_parts(  # type: ignore[no-untyped-def]
    partial, partial_lse, first_row, num_parts, lane, in_head,
    group: tl.constexpr, head_dim: tl.constexpr, lanes: tl.constexpr, stride_part: tl.constexpr,
    group_lanes: tl.constexpr, merged_parts: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of one token's query heads, a few parts at a time.

    Returns:
        Sums of weighted values ``[group_lanes, lanes]``, sums of weights and highest scores ``[group_lanes]``.
    """
    member = tl.arange(0, group_lanes)
    highest = tl.full((group_lanes,), -1e30, tl.float32)
    total = tl.zeros((group_lanes,), tl.float32)
    merged = tl.zeros((group_lanes, lanes), tl.float32)
    for begin_part in tl.range(0, num_parts, merged_parts, num_stages=1):
        part = begin_part + tl.arange(0, merged_parts)
        used = (member < group)[:, None] & (part < num_parts)[None, :]
        rows = first_row + member[:, None] + part[None, :] * stride_part
        lse = tl.load(partial_lse + rows, mask=used, other=-1e30, cache_modifier=".cg")
        values = tl.load(
            partial + rows[:, :, None] * head_dim + lane[None, None, :],
            mask=used[:, :, None] & in_head[:, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_highest = tl.maximum(highest, tl.max(lse, axis=1))
        shrink = tl.exp2(highest - new_highest)
        share = tl.where(used, tl.exp2(lse - new_highest[:, None]), 0.0)
        total = total * shrink + tl.sum(share, axis=1)
        merged = merged * shrink[:, None] + tl.sum(values * share[:, :, None], axis=1)
        highest = new_highest
    return merged, total, highest
