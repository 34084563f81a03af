"""Where users find the scheduler that they subclass; it lives in `hbserve.scheduler`."""

from hbserve.scheduler.scheduler import CpuScheduler

__all__ = ["CpuScheduler"]
