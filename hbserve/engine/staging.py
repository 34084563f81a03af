"""The copy of several host arrays to the device at once: small copies cost more in launches than in bytes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT_BYTES = 16
_NUM_BUFFERS_OF_SIZE = 3
"""More than there are steps in flight."""
_MAX_BUFFER_BYTES = 1 << 19


def reserve_pinned_memory() -> None:
    """Have torch keep pinned memory of the sizes that steps need, in powers of two: an allocation stops the device.

    Larger buffers are for prompts, whose steps are long anyway.
    """
    sizes = [1 << power for power in range(_MAX_BUFFER_BYTES.bit_length())]
    _ = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes for _ in range(_NUM_BUFFERS_OF_SIZE)]


def to_device(arrays: Mapping[str, npt.NDArray[np.generic]], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the arrays as tensors on the device, views of one buffer; do not wait for the copy."""
    offsets, end = {}, 0
    for name, array in arrays.items():
        offsets[name] = end
        end += array.nbytes + -array.nbytes % _ALIGNMENT_BYTES
    # torch does not reuse pinned memory until the copy that reads it is done
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = buffer.numpy()
    for name, array in arrays.items():
        host[offsets[name] : offsets[name] + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
    buffer = buffer.to(device, non_blocking=True)
    return {
        name: buffer[offsets[name] : offsets[name] + array.nbytes]
        .view(torch.from_numpy(np.empty(0, array.dtype)).dtype)
        .view(array.shape)
        for name, array in arrays.items()
    }
