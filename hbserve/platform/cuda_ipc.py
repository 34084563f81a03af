"""Device memory that other processes can open, by the interprocess calls of the CUDA driver.

torch's own sharing does not fit: its allocator puts several tensors into one allocation, and it counts references in
files under /dev/shm. A handle here is 64 plain bytes and refers to one whole allocation. torch's context must be
current in the calling thread; `CudaPlatform` ensures that.
"""

from __future__ import annotations

import ctypes

from hbserve.platform.cuda_driver import call

_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1
_GRANULARITY_BYTES = 2 << 20
"""Granularity of allocations: smaller ones may share a page, and a handle would open their neighbours too."""


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
    """Make one allocation.

    Raises:
        RuntimeError: the device has too little memory.
    """
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


def copy(target: int, source: int, num_bytes: int, stream: ctypes.c_void_p) -> None:
    """Enqueue a copy from one device address to another, on the same GPU or between peers.

    Raises:
        RuntimeError: the driver reports an error.
    """
    call("cuMemcpyDtoDAsync_v2", ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(num_bytes), stream)
