"""Calls of the CUDA driver that torch has no way to."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

_HOPPER = (9, 0)


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def call(name: str, *arguments: Any) -> None:
    """Call a function of the driver; the calling thread's context must be torch's.

    Raises:
        RuntimeError: if it fails.
    """
    driver = _driver()
    code = getattr(driver, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")


def upload_graph(graph: Any, stream: Any) -> None:
    """Bring a captured graph to the device without running it; else its first replay does that.

    Args:
        graph: a `torch.cuda.CUDAGraph`, captured.
        stream: a `torch.cuda.Stream`: what is launched into it next waits for the upload.

    Raises:
        RuntimeError: if the device says so.
    """
    call("cuGraphUpload", ctypes.c_void_p(graph.raw_cuda_graph_exec()), ctypes.c_void_p(stream.cuda_stream))


@cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on this device can be launched with ``launch_pdl``.

    Programmatic dependent launch (CUDA programming guide): a kernel starts while its predecessor ends.
    A kernel that takes part reads what nobody writes (weights) first, then waits for the kernels before
    it, and lets the next one start as soon as its own last blocks run. All kernels of a stream stay right
    as long as each one waits before it touches what another kernel writes, or reads.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _HOPPER
