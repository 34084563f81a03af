"""Preparation of a device that several processes share: MPS on a GPU, threads that do not spin on a CPU."""

from __future__ import annotations

from typing import Any

from hbserve.config import Config, InstanceConfig
from hbserve.platform import mps
from hbserve.process import exit_core


class DeviceSharing:
    """Sharing of one device: started before the first process that uses it, stopped after the last.

    Attributes:
        on_gpu: whether the device is a GPU; known from `start` on.
    """

    def __init__(self, config: Config, instance: InstanceConfig) -> None:
        self._config, self._instance = config, instance
        self.on_gpu = False
        self._daemon: mps.MpsDaemon | None = None

    def start(self) -> dict[str, str]:
        """Get the device ready; returns the environment variables that its processes need.

        Raises:
            StartupError: saying why MPS cannot run, if it is needed.
        """
        self.on_gpu = self._config.model.device != "cpu" and bool(mps.gpus())
        if not self.on_gpu:
            # Otherwise idle OpenMP threads spin on cores that the other phase's workers need: steps took ten times as
            # long.
            return {"OMP_WAIT_POLICY": "passive"}
        exit_core.set_apart()
        self._daemon = mps.MpsDaemon()
        self._daemon.start()
        environment = self._daemon.environment | {
            # A standby that asks for GPUs then initialises no driver.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            # Importing NumPy, and SciPy again, starts a thread for every core. Each thread spins for some 50 ms before
            # it sleeps, on cores that serving processes need: see docs/benchmarks.md.
            "OPENBLAS_NUM_THREADS": "1",
        }
        capability = mps.compute_capability(self._instance.gpu_id)
        if capability is not None:
            # Importing FlashInfer asks the device for its capability unless this says it.
            environment["FLASHINFER_CUDA_ARCH_LIST"] = "9.0a" if capability == "9.0" else capability
        return environment

    def restart(self) -> None:
        """Restart MPS after a fault that has ended every process on the device.

        Raises:
            StartupError: if MPS does not start again.
        """
        if self._daemon is not None:
            self._daemon.restart()

    def stop(self) -> None:
        """Stop MPS if it was started here; no process uses the device any more."""
        if self._daemon is not None:
            self._daemon.stop()
            self._daemon = None

    def get_status(self) -> dict[str, Any] | None:
        """Return whether MPS was started here, and its variables; None without MPS."""
        return None if self._daemon is None else {"is_ours": self._daemon.is_ours} | self._daemon.environment
