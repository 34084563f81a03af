"""The processes of a profile: the resident process that holds the memory, and a stepper per phase and percentage.

This code runs in the process of ``python -m hbserve.profile``, which starts and ends the others.
"""

from __future__ import annotations

import queue
import time
from typing import Any

import msgspec

from hbserve.config import Config, InstanceConfig, InstanceRole
from hbserve.errors import StartupError
from hbserve.platform import mps
from hbserve.process.parent import ChildProcess
from hbserve.profile.stepper import Measured, Stepper, Work
from hbserve.semi_pd.resident_process_manager import ResidentProcessManager
from hbserve.semi_pd.utils import semi_pd_system

_MEASURE_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 20.0


class StepperProcess:
    """A process that runs `hbserve.profile.stepper`, and what it reports."""

    def __init__(self, orders: Stepper, environment: dict[str, str]) -> None:
        self.name = f"{orders.instance.instance_type} at {orders.percentage} %"
        self._reports: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.process = ChildProcess(
            self.name,
            "hbserve.profile.stepper",
            msgspec.to_builtins(orders),
            environment=environment,
            on_status=self._reports.put,
            on_exit=lambda code: self._reports.put({"error": f"ended with exit code {code}"}),
        )
        self.process.start()

    def next_report(self, timeout_s: float) -> dict[str, Any]:
        """Wait for the next report.

        Raises:
            StartupError: if the process reports an error, or nothing within the time.
        """
        try:
            report = self._reports.get(timeout=max(0.01, timeout_s))
        except queue.Empty:
            raise StartupError(f"{self.name}: no answer within {timeout_s:.0f} s") from None
        if "error" in report:
            raise StartupError(f"{self.name}: {report['error']}")
        return report

    def begin(self, work: Work) -> None:
        """Start measuring; `finish` waits for the result."""
        self.process.send(msgspec.to_builtins(work))

    def finish(self, work: Work) -> Measured:
        """Wait for the result of the work begun."""
        return msgspec.convert(self.next_report(work.seconds + work.lead_s + _MEASURE_TIMEOUT_S), Measured)


class ProfiledDevice:
    """All processes on one device, as a context manager: ready when entered, ended when left.

    Args:
        config: of any mode; its model, sizes and ``semi_pd.prefill_priority`` are used.
        prefill, decode: percentages of each phase.

    Attributes:
        mixed: process for both phases, at 100 %.

    Raises:
        StartupError: if a process cannot start.
    """

    mixed: StepperProcess

    def __init__(self, config: Config, prefill: list[int], decode: list[int]) -> None:
        self.config, self._instance = semi_pd_system(config)
        self._percentages = {InstanceRole.PREFILL: prefill, InstanceRole.DECODE: decode}
        self._resident = ResidentProcessManager(self.config)
        self._mps: mps.MpsDaemon | None = None
        self._environment: dict[str, str] = {}
        self._steppers: dict[tuple[InstanceRole, int], StepperProcess] = {}
        self.device = "unknown"
        self.num_blocks = 0
        self.block_size = 0

    def __enter__(self) -> ProfiledDevice:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        deadline = time.monotonic() + self.config.rpc.start_timeout_s
        if self.config.model.device != "cpu" and mps.gpus():
            self._mps = mps.MpsDaemon()
            self._mps.start()
            self._environment = dict(self._mps.environment)
        else:
            self._environment = {"OMP_WAIT_POLICY": "passive"}  # as in serving: idle threads must not hold cores
        self._resident.environment = self._environment
        self._resident.start()
        attachment = self._resident.attachment
        self.num_blocks, self.block_size = attachment["num_blocks"], attachment["block_size"]
        for role, percentages in self._percentages.items():
            priority = self.config.semi_pd.prefill_priority if role is InstanceRole.PREFILL else 0
            for percentage in percentages:
                self._add_stepper(role, percentage, priority)
        self.mixed = self._add_stepper(InstanceRole.UNIFIED, 100, 0)
        for process in self._steppers.values():
            process.next_report(deadline - time.monotonic())
        self.device = self._resident.device

    def _add_stepper(self, role: InstanceRole, percentage: int, priority: int) -> StepperProcess:
        instance: InstanceConfig = msgspec.structs.replace(
            self._instance, instance_id=f"{role}-{percentage}", instance_type=role
        )
        orders = Stepper(
            config=self.config,
            instance=instance,
            percentage=percentage,
            priority=priority,
            attachment=self._resident.attachment,
        )
        process = self._steppers[role, percentage] = StepperProcess(orders, self._environment)
        return process

    def __exit__(self, *_: object) -> None:
        for process in self._steppers.values():
            process.process.terminate()
        for process in self._steppers.values():
            process.process.end(_END_TIMEOUT_S)
        self._resident.stop()  # last, because the steppers are attached to its memory
        if self._mps is not None:
            self._mps.stop()

    def prefill(self, percentage: int) -> StepperProcess:
        """Return the process for prefill at a percentage."""
        return self._steppers[InstanceRole.PREFILL, percentage]

    def decode(self, percentage: int) -> StepperProcess:
        """Return the process for decode at a percentage."""
        return self._steppers[InstanceRole.DECODE, percentage]
