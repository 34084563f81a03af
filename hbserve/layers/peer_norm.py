"""The sum over ranks that ends a layer's product, and the norm that follows, in one Triton kernel.

Each GPU reads all ranks' summands of a row, its neighbours' through NVLink, so it has the whole sum ("one shot") and
goes on with the residual and the norm: no sums travel back, and nobody waits at the end. For two ranks that is as much
to read as to sum half of the rows and to exchange the sums. Between H200s, in µs, without the products:

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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.layers.fused import add_residual, store_rms_norm
from hbserve.platform.cuda_driver import overlaps

MAX_PROGRAMS = 264
"""Two for each multiprocessor of an H200; each has a flag per rank."""


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
    # The summands of this rank are there, as the kernels in front have ended; say so, and wait for the others to.
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
        for peer in tl.static_range(num_ranks):  # in the same order on all ranks, so that all get the same
            rows = tl.multiple_of(tl.load(summands + peer).to(tl.pointer_type(out.dtype.element_ty)), 16)
            # Not by the first cache, which does not know what others write.
            part = tl.load(rows + row * size + columns, mask=mask, other=0.0, cache_modifier=".cg")
            total += part.to(tl.float32)
        rounded = total.to(out.dtype.element_ty).to(tl.float32)
        values = add_residual(rounded, residual + row * size + columns, mask, out.dtype.element_ty)
        store_rms_norm(values, weights, out + row * size + columns, mask, eps, size)


def sum_add_rms_norm_(
    summands: torch.Tensor, flags: torch.Tensor, rank: int, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Add the ranks' summands to ``residual`` in place and return the norm of the sum; a collective operation.

    A rank may overwrite its summand when its next kernel of this kind, on another piece of memory, has ended: by then
    all others have ended this one.

    Args:
        summands: int64 ``[ranks]``, addresses of the ranks' ``[rows, size]``, of the dtype of ``residual``, contiguous
            and aligned to 16 bytes.
        flags: int64 ``[ranks]``, addresses of the ranks' int32 ``[MAX_PROGRAMS, ranks]``, which are zero between steps.
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
