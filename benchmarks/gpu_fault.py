"""A fault of the GPU: ``python -m benchmarks.gpu_fault`` runs a kernel that writes out of bounds.

All clients of its MPS server fail with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

_TIMEOUT_S = 60.0


def fault(environment: Mapping[str, str]) -> subprocess.CompletedProcess[bytes]:
    """Cause a fault from a process of its own.

    Args:
        environment: variables that lead the process to the MPS server.

    Returns:
        The ended process, with CUDA's error if there was a fault.
    """
    command = [sys.executable, "-m", "benchmarks.gpu_fault"]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, timeout=_TIMEOUT_S)


if __name__ == "__main__":  # at the module's level: Triton looks names up there
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def _write_far_out(pointer):  # type: ignore[no-untyped-def]
        tl.store(pointer + (1 << 44), 1.0)

    _write_far_out[(1,)](torch.zeros(1, device="cuda"))
    torch.cuda.synchronize()
