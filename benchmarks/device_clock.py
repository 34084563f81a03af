"""Clock and power of a GPU while a program runs, read from NVIDIA's management library (NVML)."""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SM_CLOCK = 1
_REASONS = {0x4: "power", 0x20: "temperature, by software", 0x40: "temperature", 0x80: "power brake"}
"""Reasons for a lower clock that a load can cause: bits of NVML."""
_INTERVAL_S = 0.01


class DeviceClock:
    """Sampler of one GPU's clock and power.

    Args:
        uuid: as torch names it, without ``GPU-``.

    Raises:
        OSError: without the library.
        RuntimeError: if the library does not know the GPU.
    """

    def __init__(self, uuid: str) -> None:
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self._device = ctypes.c_void_p()
        if self._nvml.nvmlInit_v2() or self._nvml.nvmlDeviceGetHandleByUUID(
            f"GPU-{uuid}".encode(), ctypes.byref(self._device)
        ):
            raise RuntimeError(f"NVML does not know GPU-{uuid}")

    @contextmanager
    def record(self) -> Iterator[dict[str, Any]]:
        """Sample in a thread while the body runs; the dictionary has medians afterwards."""
        samples: list[tuple[int, int, int]] = []
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(_INTERVAL_S):
                samples.append((self._mhz(), self._milliwatts(), self._reasons()))

        found: dict[str, Any] = {}
        thread = threading.Thread(target=sample, name="device-clock")
        began = time.perf_counter()
        thread.start()
        try:
            yield found
        finally:
            ended.set()
            thread.join()
        found |= {"seconds": time.perf_counter() - began, "samples": len(samples)}
        if samples:
            clocks, powers, reasons = zip(*samples, strict=True)
            found |= {"mhz": statistics.median(clocks), "min_mhz": min(clocks), "max_mhz": max(clocks)}
            found |= {"watts": statistics.median(powers) / 1e3, "max_watts": max(powers) / 1e3}
            for bit, name in _REASONS.items():
                share = sum(bool(reason & bit) for reason in reasons) / len(reasons)
                if share:
                    found[f"slowed by {name}"] = share

    def _mhz(self) -> int:
        value = ctypes.c_uint()
        self._nvml.nvmlDeviceGetClockInfo(self._device, _SM_CLOCK, ctypes.byref(value))
        return value.value

    def _milliwatts(self) -> int:
        value = ctypes.c_uint()
        self._nvml.nvmlDeviceGetPowerUsage(self._device, ctypes.byref(value))
        return value.value

    def _reasons(self) -> int:
        value = ctypes.c_ulonglong()
        self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._device, ctypes.byref(value))
        return value.value
