"""Device memory that other processes can open, by the driver's own interprocess calls.

Not torch's: its caching allocator puts several tensors into one allocation, and its sharing keeps
count in files under /dev/shm. A handle here is 64 plain bytes and refers to one whole allocation.
The calling thread's context must be torch's (`CudaPlatform` sees to it).
"""

from __future__ import annotations

import ctypes

from hbserve.platform.cuda_driver import call

_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1
_GRANULARITY_BYTES = 2 << 20
"""Smaller allocations may share a page with others, and a handle would open those too."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


class DeviceMemory:
    """A piece of device memory as torch and others take it: by ``__cuda_array_interface__``.

    Freed by the end of the process, never before: step after step of other processes may use it.
    """

    def __init__(self, address: int, num_bytes: int) -> None:
        self.address = address
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def allocate(num_bytes: int) -> DeviceMemory:
    """An allocation of its own.

    Raises:
        RuntimeError: if the device has not that much memory.
    """
    address = ctypes.c_uint64()
    allocated_bytes = num_bytes + -num_bytes % _GRANULARITY_BYTES
    call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(allocated_bytes))
    return DeviceMemory(address.value, num_bytes)


def export_handle(memory: DeviceMemory) -> str:
    """What `open_handle` takes in another process; hexadecimal."""
    handle = _Handle()
    call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(memory.address))
    return bytes(handle).hex()


def open_handle(handle: str, num_bytes: int) -> DeviceMemory:
    """Another process' memory in this one's address space.

    Raises:
        RuntimeError: if it is gone, or smaller than ``num_bytes``.
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
    """Undo one `open_handle`; the driver counts them."""
    call("cuIpcCloseMemHandle", ctypes.c_uint64(memory.address))


def copy(target: int, source: int, num_bytes: int, stream: ctypes.c_void_p) -> None:
    """Copy from one device address to another, on the same GPU or between peers; returns before it is done.

    Raises:
        RuntimeError: if the device says so.
    """
    call("cuMemcpyDtoDAsync_v2", ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(num_bytes), stream)
