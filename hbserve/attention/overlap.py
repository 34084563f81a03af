"""Programmatic dependent launch (CUDA programming guide): a kernel starts while its predecessor ends.

A kernel that takes part reads what nobody writes (weights) first, then waits for the kernels before
it, and lets the next one start as soon as its own last blocks run. All kernels of a stream stay right
as long as each one waits before it touches what another kernel writes, or reads.
"""

from __future__ import annotations

from functools import cache

import torch

_HOPPER = (9, 0)


@cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on this device can be launched with ``launch_pdl``."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _HOPPER
