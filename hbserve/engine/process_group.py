"""The tensor-parallel group of an instance's ranks, over torch.distributed."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from hbserve.errors import StartupError
from hbserve.layers.parallel import TensorParallel
from hbserve.platform import Platform
from hbserve.platform.base import SmallSum
from hbserve.platform.cuda_driver import has_triton

dist: Any = torch.distributed  # its stubs lack the process groups, which are made directly here

_HOST = "127.0.0.1"


def join_group(
    platform: Platform, rank: int, size: int, port: int, listen_fd: int | None, timeout_s: float
) -> TensorParallel:
    """Meet the other ranks of the instance, which are all on this host.

    It makes no global process group, so one process can run several instances, one after the other.

    Args:
        platform: activated already.
        port: on the loopback interface, where rank 0 listens.
        listen_fd: rank 0's listening socket, which this takes over; None on the others.
        timeout_s: of the meeting, and of each collective operation.

    Raises:
        StartupError: if a rank does not come.
    """
    if size == 1:
        return TensorParallel()
    timeout = timedelta(seconds=timeout_s)
    try:
        if listen_fd is not None:
            store = dist.TCPStore(_HOST, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listen_fd)
        else:
            store = dist.TCPStore(_HOST, port, None, False, timeout, wait_for_workers=False)
        group = platform.make_process_group(store, rank, size, timeout)
        small_sum = platform.make_small_sum(dist.PrefixStore("small_sum", store), rank, size)
    except RuntimeError as error:  # the store's and the libraries' errors are subclasses of it
        raise StartupError(f"rank {rank} of {size} cannot join its tensor-parallel group: {error}") from error
    return _GroupOverTorch(group, small_sum, rank, size, platform).as_tensor_parallel()


class _GroupOverTorch:
    """The collectives over torch.distributed; on a GPU they are enqueued on the current stream."""

    def __init__(self, group: Any, small_sum: SmallSum | None, rank: int, size: int, platform: Platform) -> None:
        device = platform.device
        self._small_sum = small_sum
        # The fused sum and norm pays for two ranks; with more ranks each has more to read. Its programs wait for those
        # of the other rank on all multiprocessors at once. With two such workers on the same devices, each worker could
        # wait on one device for a kernel that the other worker keeps from starting on the next device: a deadlock.
        self._sums_with_norm = small_sum is not None and size == 2 and not platform.is_shared and has_triton(device)
        self._group, self._rank, self._size, self._device = group, rank, size, device
        self._reduce_options = dist.AllreduceOptions()
        self._gather_options = torch._C._distributed_c10d.AllgatherOptions()
        for options in (self._reduce_options, self._gather_options):
            # On a GPU: run on the current stream itself, which saves two events per operation.
            options.asyncOp = device.type != "cuda"

    def as_tensor_parallel(self) -> TensorParallel:
        place = None if self._small_sum is None else self._small_sum.place
        sum_and_norm = self._sum_and_norm if self._sums_with_norm else None
        return TensorParallel(self._rank, self._size, self._all_reduce, self._all_gather, place, sum_and_norm)

    def _all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum in place: callers pass a tensor that they have just computed."""
        if self._small_sum is not None and self._small_sum.holds(x):
            return self._small_sum(x)
        _wait(self._group.allreduce([x], self._reduce_options))
        return x

    def _sum_and_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        from hbserve.layers.peer_norm import sum_add_rms_norm_

        assert self._small_sum is not None, "without a place there is nothing to sum"
        summands, flags = self._small_sum.addresses(x), self._small_sum.flags
        return sum_add_rms_norm_(summands, flags, self._rank, residual, weight, eps)

    def _all_gather(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        parts = x.new_empty(self._size * x.shape[0], *x.shape[1:])
        _wait(self._group._allgather_base(parts, x, self._gather_options))
        # `flatten` returns a view of columns side by side, but kernels need contiguous rows.
        return parts.view(self._size, *x.shape).movedim(0, -2).flatten(-2).contiguous()


def _wait(work: Any) -> None:
    """Wait for the operation on CPU. On a GPU the stream orders it, and there may be no ``work``."""
    if work is not None:
        work.wait()
