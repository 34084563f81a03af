"""The CUDA Multi-Process Service: what lets processes share a GPU by percentages.

A daemon of the user's is used as it is. Where none runs, one is started in a private folder, under a
guard that ends it and removes the folder when this process ends, whatever ended it. The card's
settings are never touched: MPS needs no change of the compute mode (https://docs.nvidia.com/deploy/mps).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from hbserve.errors import StartupError

_CONTROL = "nvidia-cuda-mps-control"
_PIPE_VARIABLE, _LOG_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
_VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
_DEFAULT_PIPE_DIRECTORY = "/tmp/nvidia-mps"
_NOT_INITIALISED = 3  # CUDA_ERROR_NOT_INITIALIZED
_QUERY_TIMEOUT_S = 10.0
_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 40.0
# Its standard input is the life line. $1: the folder of pipes and logs.
_GUARD = """
mkdir -p "$1/pipe" "$1/log" && nvidia-cuda-mps-control -d && echo ready
cat > /dev/null
echo quit | timeout 20 nvidia-cuda-mps-control || kill "$(cat "$1/pipe/nvidia-cuda-mps-control.pid")"
rm -rf "$1"
"""
_ALTERNATIVE = "use mode unified, which needs none"


def gpus() -> list[str]:
    """The names of the GPUs that the driver has, without making a context; empty where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    result = _run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    return result.stdout.split("\n")[:-1] if result is not None and result.returncode == 0 else []


def num_visible_gpus() -> int:
    """How many GPUs a process started now would find, by `CUDA_VISIBLE_DEVICES` where that is set."""
    count = len(gpus())
    visible = os.environ.get(_VISIBLE_VARIABLE)
    if visible is None or not count:
        return count
    names = [name.strip() for name in visible.split(",")]
    return next((index for index, name in enumerate(names) if name in ("", "-1")), len(names))


def compute_capability(gpu_id: int) -> str | None:
    """Of a GPU, such as ``9.0``, without making a context; None if it cannot be found out."""
    result = _run(["nvidia-smi", f"--id={gpu_id}", "--query-gpu=compute_cap", "--format=csv,noheader"])
    return result.stdout.strip() if result is not None and result.returncode == 0 else None


def is_driver_initialised() -> bool:
    """Whether something in this process has called the driver's cuInit: from then on its share is fixed.

    That need not show in ``torch.cuda.is_initialized()``: asking how many GPUs there are is enough.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return bool(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _NOT_INITIALISED)


class MpsDaemon:
    """A running MPS daemon, the user's or one of ours.

    Attributes:
        environment: what processes need to become its clients.
        is_ours: whether `stop` ends it.
    """

    def __init__(self) -> None:
        self.environment: dict[str, str] = {}
        self.is_ours = False
        self._guard: subprocess.Popen[str] | None = None
        self._folder: str | None = None

    def start(self) -> None:
        """Find a daemon, or start one.

        Raises:
            StartupError: saying why MPS cannot run here.
        """
        if shutil.which(_CONTROL) is None:
            raise StartupError(f"semi_pd on a GPU needs CUDA MPS, but there is no program {_CONTROL}; {_ALTERNATIVE}")
        directory = os.environ.get(_PIPE_VARIABLE, _DEFAULT_PIPE_DIRECTORY)
        if _is_running(directory):
            self.environment = {_PIPE_VARIABLE: directory}
            return
        self._folder = tempfile.mkdtemp(prefix="hbserve-mps-")
        self.environment = {
            _PIPE_VARIABLE: str(Path(self._folder, "pipe")),
            _LOG_VARIABLE: str(Path(self._folder, "log")),
        }
        self.is_ours = True
        self._start_guard()

    def restart(self) -> None:
        """After a fault that has killed every client: begin anew. The user's own daemon recovers by itself.

        Raises:
            StartupError: if it does not start again.
        """
        if self.is_ours:
            self._end_guard()
            self._start_guard()

    def stop(self) -> None:
        """End what `start` started; its clients must be gone."""
        if self.is_ours:
            self._end_guard()

    def _start_guard(self) -> None:
        assert self._folder is not None
        # The daemon numbers the GPUs that it sees anew, and its clients would choose among those once more.
        environment = {name: value for name, value in os.environ.items() if name != _VISIBLE_VARIABLE}
        guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "hbserve-mps-guard", self._folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment | self.environment,
            start_new_session=True,  # Ctrl-C is for the launcher
            text=True,
        )
        self._guard = guard
        assert guard.stdout is not None
        output = guard.stdout.readline()
        if output.strip() != "ready" or not _is_running(self.environment[_PIPE_VARIABLE], _START_TIMEOUT_S):
            log = Path(self._folder, "log", "control.log")
            with contextlib.suppress(OSError):
                output += log.read_text()[-500:]
            self._end_guard()
            raise StartupError(f"semi_pd on a GPU needs CUDA MPS; its daemon does not run: {output!r}; {_ALTERNATIVE}")

    def _end_guard(self) -> None:
        guard, self._guard = self._guard, None
        if guard is None:
            return
        assert guard.stdin is not None
        assert guard.stdout is not None
        guard.stdin.close()
        try:
            guard.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            guard.kill()
            guard.wait()
        guard.stdout.close()


def _is_running(directory: str, timeout_s: float = _QUERY_TIMEOUT_S) -> bool:
    if not Path(directory).is_dir():
        return False
    result = _run(
        [_CONTROL],
        stdin="get_default_active_thread_percentage\n",
        env=os.environ | {_PIPE_VARIABLE: directory},
        timeout_s=timeout_s,
    )
    return result is not None and result.returncode == 0


def _run(
    command: list[str], stdin: str = "", env: dict[str, str] | None = None, timeout_s: float = _QUERY_TIMEOUT_S
) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(command, input=stdin, env=env, capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired):
        return None
