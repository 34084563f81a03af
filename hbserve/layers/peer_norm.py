"""The sum over ranks behind a row-parallel product, and the norm that follows, in one Triton kernel.

Each GPU reads all ranks' summands of a row, those of its peers through NVLink. It so has the whole sum ("one shot")
and continues with the residual and the norm: no sums travel back, and no rank waits at the end. Two ranks read as much
this way as if each summed half of the rows and they exchanged the sums. One program, between two ranks::

    rank 0                                             rank 1
    summand 0 written (by earlier kernels)             summand 1 written (by earlier kernels)
    flags[1][program, 0]: 0 ─► 1   (release)   ───►    waits for 1, sets it to 0    (acquire)
    waits for 1, sets it to 0    (acquire)     ◄───    flags[0][program, 1]: 0 ─► 1   (release)
    reads summands 0 and 1 of its rows                 reads summands 0 and 1 of its rows
    residual 0 += sum; out 0 = norm(residual 0)        residual 1 += sum; out 1 = norm(residual 1)

``flags[r]`` lies on rank r's GPU: peers set it and rank r clears it. A rank sets a flag only when the peer has cleared
it after the sum before. Programs with the same index wait for each other, so the grid is small enough for all programs
to run at once. Measured between H200s, in µs, without the products:

    rows of 5120 in bfloat16                       1     16     64    256    512    800
    two ranks: `PeerSum` and a norm              8.4    9.3   10.4   17.9   28.9   41.4
    this kernel                                  4.9    5.5    7.0   14.1   22.2   32.3
    four ranks: `PeerSum` and a norm             8.8   11.9   12.2   22.9   39.5   58.8
    this kernel                                 10.4   15.5   19.4   57.0   87.9  109.3
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.layers.fused import add_residual, store_rms_norm
from hbserve.platform.cuda_driver import overlaps

MAX_PROGRAMS = 264
"""Maximum number of programs: two for each multiprocessor of an H200. Each program has a flag per rank."""


@triton.jit
def _sum_add_rms_norm_kernel(  # type: ignore[no-untyped-def]
    summands, flags, residual, weight, out, num_rows, eps,
    size: tl.constexpr, block: tl.constexpr, rank: tl.constexpr, num_ranks: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, block)
    mask = columns < size
    weights = tl.load(weight + columns, mask=mask, other=0.0)
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    # The kernels in front have ended, so this rank's summands are written: tell all peers, then wait for theirs.
    for peer in tl.static_range(num_ranks):
        if peer != rank:
            peer_flag = tl.load(flags + peer).to(tl.pointer_type(tl.int32)) + program * num_ranks + rank
            while tl.atomic_cas(peer_flag, 0, 1, sem="release", scope="sys") != 0:
                pass
    for peer in tl.static_range(num_ranks):
        if peer != rank:
            local_flag = tl.load(flags + rank).to(tl.pointer_type(tl.int32)) + program * num_ranks + peer
            while tl.atomic_cas(local_flag, 1, 0, sem="acquire", scope="sys") != 1:
                pass
    for row in range(program, num_rows, tl.num_programs(0)):
        total = tl.zeros((block,), tl.float32)
        for peer in tl.static_range(num_ranks):  # same order on all ranks, so all get the same sum
            rows = tl.multiple_of(tl.load(summands + peer).to(tl.pointer_type(out.dtype.element_ty)), 16)
            # .cg bypasses the L1 cache, which does not see what peers write.
            part = tl.load(rows + row * size + columns, mask=mask, other=0.0, cache_modifier=".cg")
            total += part.to(tl.float32)
        rounded = total.to(out.dtype.element_ty).to(tl.float32)
        values = add_residual(rounded, residual + row * size + columns, mask, out.dtype.element_ty)
        store_rms_norm(values, weights, out + row * size + columns, mask, eps, size)


def sum_add_rms_norm_(
    summands: Tensor, flags: Tensor, rank: int, residual: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """Add the ranks' summands to ``residual`` in place and return the RMS norm of the sum; a collective operation.

    A rank may overwrite its summand when its next kernel of this kind, with summands elsewhere, has ended: all peers
    have then ended this kernel.

    Args:
        summands: int64 ``[ranks]``, addresses of the ranks' summands: ``[rows, size]``, contiguous, aligned to
            16 bytes, of the dtype of ``residual``.
        flags: int64 ``[ranks]``, addresses of the ranks' flags: int32 ``[MAX_PROGRAMS, ranks]``, zero between steps.
        residual: contiguous ``[rows, size]``.
    """
    num_rows, size = residual.shape
    block = triton.next_power_of_2(size)
    overlap = overlaps(residual.device)
    out = torch.empty_like(residual)
    kernel: Any = _sum_add_rms_norm_kernel
    kernel[(min(num_rows, MAX_PROGRAMS),)](
        summands, flags, residual, weight, out, num_rows, eps, size, block, rank, len(summands), overlap,
        num_warps=max(1, min(16, block // 256)), launch_pdl=overlap,
    )  # fmt: skip
    return out
