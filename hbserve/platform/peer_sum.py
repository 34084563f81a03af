"""Sums of small tensors over the GPUs of a host, through each other's memory.

Each layer has two sums over the ranks. NCCL's all-reduce is slow for the few MB of a decode step. This sum takes two
shots; a part is one of ``size`` equal slices of the tensor::

    barrier     all ranks have written their summands
    shot 1      rank r reads part r of all ranks' summands through NVLink and adds them up
    shot 2      rank r writes the sum of part r to all ranks
    barrier     all ranks have all parts

torch's symmetric memory has a kernel for this that a CUDA graph can replay. Between two H200s, in µs, each value the
mean of 200:

    rows of 5120 in bfloat16     1     16     64    256    512    800
    NCCL                       7.4    7.4   11.0   28.2   35.6   44.2
    two shots, in place        6.4    7.2    8.4   15.0   22.8   32.0
    the same with a copy      10.2   11.5   13.4   21.4   30.3   41.1

A copy would cost most of the gain, so layers compute their products directly in a `PeerSum.place`.
"""

from __future__ import annotations

import math
import uuid
from typing import Any

import torch
from torch._C import _distributed_c10d

from hbserve.platform.base import SmallSum

_MAX_BYTES = 8 << 20
"""Size of a place; each GPU has two. NCCL sums larger tensors; they were not measured."""
_FLAGS_BYTES = 64 << 10
_ALIGNMENT_BYTES = 16
_DTYPES = (torch.bfloat16, torch.float32)
_operators: Any = torch.ops.symm_mem
_memory: Any = _distributed_c10d._SymmetricMemory


class PeerSum(SmallSum):
    """Sums of small tensors over ranks whose GPUs read each other's memory; collective, also to construct.

    The memory of each GPU is ``[place 0, 8 MiB | place 1, 8 MiB | flags, 64 KiB of zeros]``.

    Args:
        store: store that only these ranks use.
    """

    def __init__(self, store: Any, rank: int, size: int, device: torch.device) -> None:
        if rank == 0:
            store.set("name", f"hbserve-{uuid.uuid4()}")  # torch finds groups by name
        self._name = name = store.get("name").decode()
        self._group = _distributed_c10d.ProcessGroup(store, rank, size)  # holds only a name, ranks and a store
        _distributed_c10d._register_process_group(name, self._group)
        _memory.set_group_info(name, rank, size, store)
        self._memory: torch.Tensor = _memory.empty_strided_p2p(
            (2 * _MAX_BYTES + _FLAGS_BYTES,), (1,), torch.uint8, device
        )
        self._memory[2 * _MAX_BYTES :].zero_()
        torch.cuda.current_stream(device).synchronize()
        addresses = torch.tensor(_memory.rendezvous(self._memory, name).buffer_ptrs, device=device)
        self._places: list[torch.Tensor] = [self._memory[begin : begin + _MAX_BYTES] for begin in (0, _MAX_BYTES)]
        self._addresses = {place.data_ptr(): addresses + turn * _MAX_BYTES for turn, place in enumerate(self._places)}
        self.flags = addresses + 2 * _MAX_BYTES
        self._turn = 0
        self._alignment_bytes = _ALIGNMENT_BYTES * size  # every part must be aligned

    def place(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        num_bytes = math.prod(shape) * dtype.itemsize
        if not 0 < num_bytes <= _MAX_BYTES or num_bytes % self._alignment_bytes or dtype not in _DTYPES:
            return None
        self._turn = 1 - self._turn
        return self._places[self._turn][:num_bytes].view(dtype).view(shape)

    def holds(self, x: torch.Tensor) -> bool:
        return x.data_ptr() in self._addresses

    def addresses(self, x: torch.Tensor) -> torch.Tensor:
        return self._addresses[x.data_ptr()]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = _operators.two_shot_all_reduce_(x, "sum", self._name)
        return total


def can_reach_each_other(store: Any, rank: int, size: int, device: torch.device) -> bool:
    """Find out whether all ranks' GPUs can read each other's memory; all ranks get the same answer."""
    store.set(f"device/{rank}", str(device.index))
    others = {int(store.get(f"device/{other}")) for other in range(size)} - {device.index}
    can_access = torch.cuda.can_device_access_peer
    reaches = len(others) == size - 1 and all(can_access(device.index, other) for other in others)
    return holds_for_all(store, "reaches", rank, size, reaches)


def holds_for_all(store: Any, question: str, rank: int, size: int, answer: bool) -> bool:
    """Collect all ranks' answers to a question; all ranks get the same result, True if all answers are."""
    store.set(f"{question}/{rank}", str(int(answer)))
    return all(int(store.get(f"{question}/{other}")) for other in range(size))
