"""Tensors that other processes of this host read and write in place, for programs with processes of their own.

The resident process of HBServe shares whole arenas (`hbserve.engine.arenas`); this shares single tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import torch

from hbserve.platform.cpu import CpuPlatform

__all__ = ["convert_ipc_handle_to_tensor", "get_ipc_handle"]


def get_ipc_handle(tensor: torch.Tensor) -> bytes:
    """Share a tensor's memory; returns a handle for `convert_ipc_handle_to_tensor` in another process.

    The tensor lives as long as this process. One on the CPU is moved into shared memory: views of it that were made
    before keep the old memory.

    Raises:
        ValueError: if the tensor is not contiguous, is empty, or is on neither a CPU nor a GPU.
    """
    if not tensor.is_contiguous() or not tensor.numel():
        raise ValueError("only a contiguous tensor with elements can be shared; call contiguous() first")
    if tensor.device.type == "cuda":
        storage = tensor.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
        return msgspec.msgpack.encode(["cuda", tensor.storage_offset() * tensor.element_size(), *storage])
    if tensor.device.type != "cpu":
        raise ValueError(f"a tensor on {tensor.device} cannot be shared")
    arena = CpuPlatform(1).allocate_shared_host(tensor.numel() * tensor.element_size())
    shared = arena.tensor.view(tensor.dtype).view(tensor.shape)
    with torch.no_grad():
        shared.copy_(tensor)
        tensor.set_(shared)  # type: ignore[call-overload]  # the stubs lack this form
    return msgspec.msgpack.encode(["cpu", 0, arena.handle, arena.tensor.numel()])


def convert_ipc_handle_to_tensor(
    ipc_handle: bytes, size: int | Sequence[int], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """Map the memory of another process's tensor, without a copy.

    Args:
        ipc_handle: of `get_ipc_handle`.
        size: shape, or number of elements.
        dtype: of the elements.
        device: where the tensor lies: the CPU, or the GPU.

    Raises:
        ValueError: if the handle is none, or the tensor is on another device or smaller.
        RuntimeError: if the other process has ended.
    """
    try:
        kind, offset_bytes, *parts = msgspec.msgpack.decode(ipc_handle)
    except (msgspec.DecodeError, TypeError, ValueError):
        raise ValueError("not a handle of get_ipc_handle") from None
    device, shape = torch.device(device), (size,) if isinstance(size, int) else tuple(size)
    if kind != device.type:
        raise ValueError(f"the handle is of a tensor on {kind}, not on {device}")
    if kind == "cpu":
        memory = CpuPlatform(1).attach_shared_host(*parts)
    else:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        storage = torch.UntypedStorage._new_shared_cuda(device.index or 0, *parts[1:])
        memory = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    num_bytes = math.prod(shape) * dtype.itemsize
    if offset_bytes + num_bytes > memory.numel():
        raise ValueError(f"the shared tensor has {memory.numel() - offset_bytes} bytes, and {num_bytes} are asked for")
    return memory[offset_bytes : offset_bytes + num_bytes].view(dtype).view(shape)
