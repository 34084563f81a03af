"""Calls of the CUDA driver that torch does not offer: graph uploads, and device memory that other processes can open;
and whether a device has Triton.

torch's own sharing of memory does not fit: its allocator puts several tensors into one allocation, and it counts
references in files under /dev/shm. A handle here is 64 plain bytes and refers to one whole allocation. torch's context
must be current in the calling thread; `CudaPlatform` ensures that. If the driver reports an error, all functions raise
RuntimeError with its text.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from typing import Any

import torch

_HOPPER = (9, 0)
_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1
_PORTABLE = 1
_GRANULARITY_BYTES = 2 << 20
"""Granularity of allocations: smaller ones may share a page, and a handle would open their neighbours too."""


@cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton can compile for ``device``."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def call(name: str, *arguments: Any) -> None:
    """Call a function of the driver."""
    driver = _driver()
    code = getattr(driver, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")


def upload_graph(graph: Any, stream: Any) -> None:
    """Copy a captured graph to the device without running it; otherwise its first replay copies it.

    Args:
        graph: a captured `torch.cuda.CUDAGraph`.
        stream: a `torch.cuda.Stream`; later launches into it wait for the upload.
    """
    call("cuGraphUpload", ctypes.c_void_p(graph.raw_cuda_graph_exec()), ctypes.c_void_p(stream.cuda_stream))


@cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on this device can be launched with ``launch_pdl``: from Hopper on.

    With programmatic dependent launch (CUDA programming guide) a kernel starts while its predecessor ends. The kernel
    first loads data that no kernel writes, such as weights. ``gdc_wait`` then waits for the end of all kernels before
    it, and ``gdc_launch_dependents`` lets the next kernel start once all blocks of this one run. Results stay right
    as long as every kernel calls ``gdc_wait`` before it reads what another kernel writes, or writes what another
    kernel reads. One exception: what the kernel before its predecessor has written is there when the predecessor lets
    this one start, because the predecessor has waited for it.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _HOPPER


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors this process has: its share, where CUDA MPS gives it one."""
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


class DeviceMemory:
    """A piece of device memory that torch and others can read through ``__cuda_array_interface__``.

    Only the end of the process frees it: other processes may use it in every step.
    """

    def __init__(self, address: int, num_bytes: int) -> None:
        self.address = address
        data = (address, False)
        self.__cuda_array_interface__ = {"shape": (num_bytes,), "typestr": "|u1", "data": data, "version": 3}


def allocate(num_bytes: int) -> DeviceMemory:
    """Make one allocation."""
    address = ctypes.c_uint64()
    allocated_bytes = num_bytes + -num_bytes % _GRANULARITY_BYTES
    call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(allocated_bytes))
    return DeviceMemory(address.value, num_bytes)


def export_handle(memory: DeviceMemory) -> str:
    """Return the hexadecimal argument of `open_handle` in another process."""
    handle = _Handle()
    call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(memory.address))
    return bytes(handle).hex()


def open_handle(handle: str, num_bytes: int) -> DeviceMemory:
    """Map another process's memory into this one's address space.

    Raises:
        RuntimeError: the memory is gone, or smaller than ``num_bytes``.
    """
    address = ctypes.c_uint64()
    exported = _Handle.from_buffer_copy(bytes.fromhex(handle))
    call("cuIpcOpenMemHandle_v2", ctypes.byref(address), exported, ctypes.c_uint(_LAZY_PEER_ACCESS))
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
    if base.value + size.value - address.value < num_bytes:
        raise RuntimeError(f"the shared memory has {size.value} bytes, fewer than {num_bytes}")
    return DeviceMemory(address.value, num_bytes)


def close_handle(memory: DeviceMemory) -> None:
    """Undo one `open_handle`; the driver counts the calls."""
    call("cuIpcCloseMemHandle", ctypes.c_uint64(memory.address))


def pin(address: int, num_bytes: int) -> None:
    """Pin memory of the host that was mapped from a file; the end of the process undoes it."""
    call("cuMemHostRegister_v2", ctypes.c_uint64(address), ctypes.c_size_t(num_bytes), ctypes.c_uint(_PORTABLE))


def copy(target: int, source: int, num_bytes: int, stream: ctypes.c_void_p) -> None:
    """Enqueue a copy from one device address to another, on the same GPU or between peers."""
    call("cuMemcpyDtoDAsync_v2", ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(num_bytes), stream)
