"""The limits of a device: its copy bandwidth and its rate of matrix multiplication.

As a program this module measures and prints JSON. `measure` starts that program, so that the caller's
process never touches the device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from hbserve.errors import StartupError

_ROUNDS = 5
_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class DeviceLimits:
    """Measured limits of a device.

    Attributes:
        device: ``cuda`` or ``cpu``.
        name: the device in words.
        dtype: type of the matrices; ``fp8`` on a GPU: FP8 (e4m3) with results in bfloat16.
        copy_gb_s: 10^9 bytes per second, bytes read and bytes written added up.
        matmul_tflop_s: 10^12 floating point operations per second of large square matrices.
        cuda_version: CUDA version of torch; None on a CPU.
    """

    device: str
    name: str
    dtype: str
    copy_gb_s: float
    matmul_tflop_s: float
    cuda_version: str | None


def measure(device: str, dtype: str) -> DeviceLimits:
    """Measure in a process of its own. This takes seconds, most of them for starting the process.

    Args:
        device: ``auto``, ``cpu`` or ``cuda`` (the first GPU).
        dtype: such as ``bfloat16``, or ``fp8``, which a CPU multiplies in float32.

    Raises:
        StartupError: if the measurement fails.
    """
    command = [sys.executable, "-m", "hbserve.bench.device_limits", "--device", device, "--dtype", dtype]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise StartupError(f"measuring the device took more than {_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise StartupError(f"cannot measure the device: {lines[-1]}")
    return DeviceLimits(**json.loads(done.stdout))


def _measure_here(device: str, dtype: str) -> DeviceLimits:
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device == "cuda"
    copy_bytes, matrix_size, iterations = (1 << 30, 8192, 20) if on_gpu else (128 << 20, 768, 2)
    synchronize = torch.cuda.synchronize if on_gpu else torch.cpu.synchronize

    source, target = (torch.zeros(copy_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    copy_s = _best_seconds(lambda: target.copy_(source), synchronize, iterations)
    # Random matrices, because a GPU multiplies zeros faster.
    in_fp8 = dtype == "fp8" and on_gpu
    torch_dtype = torch.float8_e4m3fn if in_fp8 else torch.float32 if dtype == "fp8" else getattr(torch, dtype)
    a, b = (torch.randn(matrix_size, matrix_size, device=device).to(torch_dtype) for _ in range(2))
    if in_fp8:
        one = torch.ones((), device=device)

        def multiply() -> object:
            return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    else:
        product = torch.empty_like(a)

        def multiply() -> object:
            return torch.matmul(a, b, out=product)

    matmul_s = _best_seconds(multiply, synchronize, iterations)
    return DeviceLimits(
        device=device,
        name=torch.cuda.get_device_name() if on_gpu else f"cpu ({torch.get_num_threads()} threads)",
        dtype=dtype,
        copy_gb_s=2 * copy_bytes / copy_s / 1e9,
        matmul_tflop_s=2 * matrix_size**3 / matmul_s / 1e12,
        cuda_version=torch.version.cuda if on_gpu else None,
    )


def _best_seconds(work: Callable[[], object], synchronize: Callable[[], None], iterations: int) -> float:
    """Return the seconds of one call in the best of `_ROUNDS` rounds: a limit is the best value, not the mean."""
    work()
    best = float("inf")
    for _ in range(_ROUNDS):
        synchronize()
        start = time.perf_counter()
        for _ in range(iterations):
            work()
        synchronize()
        best = min(best, (time.perf_counter() - start) / iterations)
    return best


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32", "fp8"])
    arguments = parser.parse_args()
    print(json.dumps(dataclasses.asdict(_measure_here(arguments.device, arguments.dtype))))


if __name__ == "__main__":
    _main()
