"""A scheduler that tries drafts from the first step on, and whatever they gain: short tests would see none else."""

from __future__ import annotations

from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.scheduler import CpuScheduler
from hbserve.speculation.measured_gain import GainMeter


class Permissive(GainMeter):
    def may_look(self, size: tuple[int, bool]) -> bool:
        return True

    def permits(self, size: tuple[int, bool], gain: float) -> bool:
        return True


class EagerDrafts(CpuScheduler):
    """Whatever is drafted, the answers are the same."""

    def _fill_pipelines(self, instance: InstanceHandle) -> None:
        for worker in instance.workers.values():
            if type(worker.gain) is GainMeter:
                worker.gain = Permissive()
            worker.timing.gap_s = worker.timing.round_gap_s = 0.0  # a busy machine makes waits for results long
        super()._fill_pipelines(instance)
