"""A share of a GPU's multiprocessors, by the driver's green contexts.

A green context has some of the multiprocessors and shares everything else, memory included, with the device's primary
context. Work launched into its stream stays on its multiprocessors
(https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__GREEN__CONTEXTS.html). A process takes the first or the last
ones, so two processes overlap only where their shares add up to more than the device::

    multiprocessor   0 .................................. 131
    60 %, first      ████████████████████░░░░░░░░░░░░░░
    60 %, last       ░░░░░░░░░░░░░░████████████████████

MPS's own ``CUDA_MPS_ACTIVE_THREAD_PERCENTAGE`` is not used: in a process with that limit cuBLAS 13.0 leaves whole
tiles of its products unwritten (docs/semi_pd.md has the measurement).
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import torch

from hbserve.errors import StartupError
from hbserve.platform.cuda_driver import call

_RESOURCE_TYPE_SM = 1  # CU_DEV_RESOURCE_TYPE_SM
_DEFAULT_STREAM = 1  # CU_GREEN_CTX_DEFAULT_STREAM, the only flag; required
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, the only flag; required
_RESOURCE_BYTES = 1024  # room for a CUdevResource, which has 144 bytes in CUDA 13.0
_COUNT_OFFSET = 96  # of unsigned int smCount in it, behind its type and padding
_GROUP_MULTIPROCESSORS = 8
"""Multiprocessors that Hopper assigns together, so that a cluster of blocks fits."""


class CudaShare:
    """A share of a GPU's multiprocessors, and a stream whose work stays on it.

    It lives as long as the process, because captured graphs refer to it.

    Args:
        end: whether the share has the device's first or last multiprocessors.

    Attributes:
        num_multiprocessors: size of the share: the number nearest to the percentage that the device can set apart.
        stream: a `torch.cuda.Stream`.

    Raises:
        StartupError: the driver has no green contexts.
    """

    def __init__(self, device: torch.device, percentage: int, end: Literal["first", "last"]) -> None:
        ordinal = ctypes.c_int()
        _call("cuDeviceGet", ctypes.byref(ordinal), ctypes.c_int(device.index))
        whole, group, rest = (ctypes.create_string_buffer(_RESOURCE_BYTES) for _ in range(3))
        _call("cuDeviceGetDevResource", ordinal, whole, ctypes.c_int(_RESOURCE_TYPE_SM))
        total = _count(whole)
        first = size_of_first(total, percentage if end == "first" else 100 - percentage)
        num_groups, flags, min_count = ctypes.c_uint(1), ctypes.c_uint(0), ctypes.c_uint(first)
        _call("cuDevSmResourceSplitByCount", group, ctypes.byref(num_groups), whole, rest, flags, min_count)
        part = group if end == "first" else rest
        description, context, stream = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        _call("cuDevResourceGenerateDesc", ctypes.byref(description), part, ctypes.c_uint(1))
        _call("cuGreenCtxCreate", ctypes.byref(context), description, ordinal, ctypes.c_uint(_DEFAULT_STREAM))
        _call("cuGreenCtxStreamCreate", ctypes.byref(stream), context, ctypes.c_uint(_NON_BLOCKING), ctypes.c_int(0))
        self.num_multiprocessors = _count(part)
        self.stream: Any = torch.cuda.ExternalStream(stream.value, device=device)  # type: ignore[no-untyped-call]
        _STREAMS.add(self.stream.cuda_stream)


_STREAMS: set[int] = set()


def is_of_share(stream: Any) -> bool:
    """Whether a `torch.cuda.Stream` is that of a `CudaShare` of this process."""
    return stream.cuda_stream in _STREAMS


def size_of_first(total: int, percentage: int) -> int:
    """Return the number of multiprocessors in the first part of a device that is split at a percentage.

    The part has whole groups, at least one, and leaves at least one multiprocessor for the other part.
    """
    wanted = round(total * percentage / 100 / _GROUP_MULTIPROCESSORS) * _GROUP_MULTIPROCESSORS
    return max(_GROUP_MULTIPROCESSORS, min(wanted, (total - 1) // _GROUP_MULTIPROCESSORS * _GROUP_MULTIPROCESSORS))


def is_whole(total: int, percentage: int, end: Literal["first", "last"]) -> bool:
    """Whether a percentage is nearer to the whole device than to the largest part that can be set apart."""
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
