"""A share of a GPU's multiprocessors, by the driver's green contexts.

A green context has some of the multiprocessors and shares everything else with the device's usual
context, memory included; what is launched into a stream of it stays on those
(https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__GREEN__CONTEXTS.html). Which ones is ours to
choose: the first ones or the last ones, so that two processes meet only where their shares add up to
more than the device.

Not by MPS's own ``CUDA_MPS_ACTIVE_THREAD_PERCENTAGE``: in a process limited by that, cuBLAS 13.0 leaves
whole tiles of its products unwritten (docs/semi_pd.md has the measurement).
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import torch

from hbserve.errors import StartupError
from hbserve.platform.cuda_driver import call

_RESOURCE_TYPE_SM = 1  # CU_DEV_RESOURCE_TYPE_SM
_DEFAULT_STREAM = 1  # CU_GREEN_CTX_DEFAULT_STREAM, the only flag there is, and it must be given
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, likewise
_RESOURCE_BYTES = 1024  # a CUdevResource is smaller: 144 bytes in CUDA 13.0
_COUNT_OFFSET = 96  # in it, behind its type and padding: unsigned int smCount
_GROUP_MULTIPROCESSORS = 8
"""Multiprocessors that Hopper hands out together, so that a cluster of blocks finds its place."""


class CudaShare:
    """Some of a GPU's multiprocessors, and a stream whose work stays on them.

    It lives as long as the process: captured graphs refer to it.

    Args:
        end: whether the device's first multiprocessors, or its last.

    Attributes:
        num_multiprocessors: how many there are: the nearest number to the percentage that the device
            can set apart.
        stream: a `torch.cuda.Stream`.

    Raises:
        StartupError: if the driver has no green contexts.
    """

    def __init__(self, device: torch.device, percentage: int, end: Literal["first", "last"]) -> None:
        ordinal = ctypes.c_int()
        _call("cuDeviceGet", ctypes.byref(ordinal), ctypes.c_int(device.index))
        whole, group, rest = (ctypes.create_string_buffer(_RESOURCE_BYTES) for _ in range(3))
        _call("cuDeviceGetDevResource", ordinal, whole, ctypes.c_int(_RESOURCE_TYPE_SM))
        total = _count(whole)
        first = size_of_first(total, percentage if end == "first" else 100 - percentage)
        num_groups = ctypes.c_uint(1)
        no_flags = ctypes.c_uint(0)
        _call(
            "cuDevSmResourceSplitByCount", group, ctypes.byref(num_groups), whole, rest, no_flags, ctypes.c_uint(first)
        )
        part = group if end == "first" else rest
        description, context, stream = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        _call("cuDevResourceGenerateDesc", ctypes.byref(description), part, ctypes.c_uint(1))
        _call("cuGreenCtxCreate", ctypes.byref(context), description, ordinal, ctypes.c_uint(_DEFAULT_STREAM))
        _call("cuGreenCtxStreamCreate", ctypes.byref(stream), context, ctypes.c_uint(_NON_BLOCKING), ctypes.c_int(0))
        self.num_multiprocessors = _count(part)
        self.stream: Any = torch.cuda.ExternalStream(stream.value, device=device)  # type: ignore[no-untyped-call]


def size_of_first(total: int, percentage: int) -> int:
    """How many of a device's multiprocessors the first part has, if it shall have that percentage.

    Whole groups, at least one, and something is left for the other part.
    """
    wanted = round(total * percentage / 100 / _GROUP_MULTIPROCESSORS) * _GROUP_MULTIPROCESSORS
    return max(_GROUP_MULTIPROCESSORS, min(wanted, (total - 1) // _GROUP_MULTIPROCESSORS * _GROUP_MULTIPROCESSORS))


def is_whole(total: int, percentage: int, end: Literal["first", "last"]) -> bool:
    """Whether a percentage is nearer to all of a device's multiprocessors than to the largest part of them."""
    largest = size_of_first(total, 100) if end == "first" else total - _GROUP_MULTIPROCESSORS
    return 2 * total * percentage / 100 > total + largest


def _count(resource: Any) -> int:
    return int.from_bytes(resource.raw[_COUNT_OFFSET : _COUNT_OFFSET + 4], "little")


def _call(name: str, *arguments: Any) -> None:
    try:
        call(name, *arguments)
    except AttributeError:
        raise StartupError(f"no share of the GPU: the driver has no {name}, which came with CUDA 12.4") from None
    except RuntimeError as error:
        raise StartupError(f"no share of the GPU: {error}") from None
