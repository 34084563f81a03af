"""Calls of the CUDA driver that torch does not offer, and programmatic dependent launch."""

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
    """Call a function of the driver; torch's context must be current in the calling thread.

    Raises:
        RuntimeError: the function fails; the text holds the driver's error.
    """
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

    Raises:
        RuntimeError: the driver reports an error.
    """
    call("cuGraphUpload", ctypes.c_void_p(graph.raw_cuda_graph_exec()), ctypes.c_void_p(stream.cuda_stream))


@cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on this device can be launched with ``launch_pdl``: from Hopper on.

    With programmatic dependent launch (CUDA programming guide) a kernel starts while its predecessor ends. The kernel
    first loads data that no kernel writes, such as weights. ``gdc_wait`` then waits for the end of all kernels before
    it, and ``gdc_launch_dependents`` lets the next kernel start once all blocks of this one run. Results stay right
    as long as every kernel calls ``gdc_wait`` before it reads what another kernel writes, or writes what another
    kernel reads.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _HOPPER
