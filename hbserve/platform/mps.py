"""The CUDA Multi-Process Service (MPS), with which processes share a GPU by percentages.

A running daemon of the user is used as it is. If none runs, `MpsDaemon` starts one in a private folder, under a guard
process. The guard ends the daemon and removes the folder when this process ends, for whatever reason. The card's
settings stay as they are: MPS does not need another compute mode (https://docs.nvidia.com/deploy/mps).
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
_TAKEN_SHARE = 0.1
_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 40.0
# The guard runs until its standard input closes. $1: the folder of pipes and logs.
_GUARD = """
mkdir -p "$1/pipe" "$1/log" && nvidia-cuda-mps-control -d && echo ready
cat > /dev/null
echo quit | timeout 20 nvidia-cuda-mps-control || kill "$(cat "$1/pipe/nvidia-cuda-mps-control.pid")"
rm -rf "$1"
"""
_ALTERNATIVE = "use mode unified, which needs none"


def gpus() -> list[str]:
    """List the names of the driver's GPUs without making a context; empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    result = _run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    return result.stdout.split("\n")[:-1] if result is not None and result.returncode == 0 else []


def num_visible_gpus() -> int:
    """Count the GPUs that a process started now would find; `CUDA_VISIBLE_DEVICES` may hide some."""
    count = len(gpus())
    visible = os.environ.get(_VISIBLE_VARIABLE)
    if visible is None or not count:
        return count
    names = [name.strip() for name in visible.split(",")]
    return next((index for index, name in enumerate(names) if name in ("", "-1")), len(names))


def free_gpus() -> list[int]:
    """Return the numbers of the GPUs to use: all that `CUDA_VISIBLE_DEVICES` names, else those that are not taken.

    A GPU counts as taken if others hold more than a tenth of its memory.
    """
    numbers = list(range(num_visible_gpus()))
    if os.environ.get(_VISIBLE_VARIABLE) is not None:
        return numbers
    memory = _memory()
    return [number for number in numbers if not _is_taken(memory[number : number + 1])]


def smallest_gpu_bytes() -> int | None:
    """Return the memory of the driver's smallest GPU; None if it is unknown."""
    return min((int(total * 2**20) for _, total in filter(None, _memory())), default=None)


def _memory() -> list[tuple[float, float] | None]:
    """Return MiB used and MiB in all of each of the driver's GPUs; None where they cannot be read."""
    result = _run(["nvidia-smi", "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"])
    lines = result.stdout.split("\n")[:-1] if result is not None and result.returncode == 0 else []
    parts = [[float(part) for part in line.split(",") if part.strip().isdecimal()] for line in lines]
    return [(part[0], part[1]) if len(part) == 2 else None for part in parts]


def _is_taken(memory: list[tuple[float, float] | None]) -> bool:
    """Whether the one entry of used and total memory says so; one that cannot be read does not."""
    return any(used > _TAKEN_SHARE * total for used, total in filter(None, memory))


def compute_capability(gpu_id: int) -> str | None:
    """Return a GPU's compute capability, such as ``9.0``, without making a context; None if it is unknown."""
    result = _run(["nvidia-smi", f"--id={gpu_id}", "--query-gpu=compute_cap", "--format=csv,noheader"])
    return result.stdout.strip() if result is not None and result.returncode == 0 else None


def is_driver_initialised() -> bool:
    """Whether this process has called the driver's cuInit; from then on its priority is fixed.

    ``torch.cuda.is_initialized()`` may say False then: counting the GPUs is enough to initialise the driver.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return bool(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _NOT_INITIALISED)


class MpsDaemon:
    """A running MPS daemon, the user's or one that this process started.

    Attributes:
        environment: environment variables that make a process its client.
        is_ours: whether this process started it, so that `stop` ends it.
    """

    def __init__(self) -> None:
        self.environment: dict[str, str] = {}
        self.is_ours = False
        self._guard: subprocess.Popen[str] | None = None
        self._folder: str | None = None

    def start(self) -> None:
        """Find a daemon, or start one.

        Raises:
            StartupError: MPS cannot run here; the text gives the reason.
        """
        if shutil.which(_CONTROL) is None:
            raise StartupError(f"semi_pd on a GPU needs CUDA MPS, but there is no program {_CONTROL}; {_ALTERNATIVE}")
        directory = os.environ.get(_PIPE_VARIABLE, _DEFAULT_PIPE_DIRECTORY)
        if _is_running(directory):
            self.environment = {_PIPE_VARIABLE: directory}
            return
        self._folder = folder = tempfile.mkdtemp(prefix="hbserve-mps-")
        self.environment = {_PIPE_VARIABLE: f"{folder}/pipe", _LOG_VARIABLE: f"{folder}/log"}
        self.is_ours = True
        self._start_guard()

    def restart(self) -> None:
        """Restart a daemon of ours after a fault that killed all clients; the user's daemon recovers by itself.

        Raises:
            StartupError: it does not start again.
        """
        if self.is_ours:
            self._end_guard()
            self._start_guard()

    def stop(self) -> None:
        """End a daemon that `start` started; its clients must have ended."""
        if self.is_ours:
            self._end_guard()

    def _start_guard(self) -> None:
        assert self._folder is not None
        # The daemon renumbers the GPUs that it sees. Its clients would apply CUDA_VISIBLE_DEVICES a second time.
        environment = {name: value for name, value in os.environ.items() if name != _VISIBLE_VARIABLE}
        guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "hbserve-mps-guard", self._folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment | self.environment,
            start_new_session=True,  # Ctrl-C must reach only the launcher
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
    environment = os.environ | {_PIPE_VARIABLE: directory}
    result = _run([_CONTROL], "get_default_active_thread_percentage\n", environment, timeout_s)
    return result is not None and result.returncode == 0


def _run(
    command: list[str], stdin: str = "", env: dict[str, str] | None = None, timeout_s: float = _QUERY_TIMEOUT_S
) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(command, input=stdin, env=env, capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired):
        return None
