"""What a device needs before several processes can share it: MPS on a GPU, threads that do not spin on a CPU."""

from __future__ import annotations

from typing import Any

from hbserve.config import Config, InstanceConfig
from hbserve.platform import mps
from hbserve.process import exit_core


class DeviceSharing:
    """Started before the first process that uses the device, stopped after the last.

    Attributes:
        on_gpu: whether the device is a GPU; known from `start` on.
    """

    def __init__(self, config: Config, instance: InstanceConfig) -> None:
        self._config, self._instance = config, instance
        self.on_gpu = False
        self._daemon: mps.MpsDaemon | None = None

    def start(self) -> dict[str, str]:
        """Get the device ready; returns the variables that its processes need in their environment.

        Raises:
            StartupError: saying why MPS cannot run here, where it is needed.
        """
        self.on_gpu = self._config.model.device != "cpu" and bool(mps.gpus())
        if not self.on_gpu:
            # Idle OpenMP threads spin otherwise, on cores that the other phase's workers need: steps took
            # ten times as long.
            return {"OMP_WAIT_POLICY": "passive"}
        exit_core.set_apart()
        self._daemon = mps.MpsDaemon()
        self._daemon.start()
        environment = self._daemon.environment | {
            # Whoever asks for GPUs while it sleeps wakes no driver.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            # Importing NumPy, and SciPy again, starts a thread for every core, each of which spins for some 50 ms
            # before it sleeps, on cores that those who serve want: see docs/benchmarks.md.
            "OPENBLAS_NUM_THREADS": "1",
        }
        capability = mps.compute_capability(self._instance.gpu_id)
        if capability is not None:
            # Importing FlashInfer asks the device for this, unless it is told.
            environment["FLASHINFER_CUDA_ARCH_LIST"] = "9.0a" if capability == "9.0" else capability
        return environment

    def restart(self) -> None:
        """After a fault that has ended every process on the device.

        Raises:
            StartupError: if MPS does not start again.
        """
        if self._daemon is not None:
            self._daemon.restart()

    def stop(self) -> None:
        """End what was started; its users are gone."""
        if self._daemon is not None:
            self._daemon.stop()
            self._daemon = None

    def get_status(self) -> dict[str, Any] | None:
        """Of MPS: whether it is ours, and its variables; None where there is none."""
        return None if self._daemon is None else {"is_ours": self._daemon.is_ours} | self._daemon.environment
