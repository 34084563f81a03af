"""The process of the CPU scheduler. It imports neither torch nor transformers, so it starts at once."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
import time

import msgspec

from hbserve.config import Config
from hbserve.errors import ConfigError, HBServeError, SupersededError
from hbserve.import_path import load_class
from hbserve.messages.supervisor import Predecessor
from hbserve.policy.profile_file import LearntProfile, load_profile
from hbserve.policy.step_profile import StepProfile
from hbserve.process import child
from hbserve.process.stopwatch import Stopwatch, process_start
from hbserve.scheduler.core_io import Start
from hbserve.scheduler.scheduler import CpuScheduler
from hbserve.scheduler.shell import SchedulerShell

logger = logging.getLogger(__name__)


async def run_scheduler(
    config: Config,
    client_address: str,
    instance_addresses: dict[str, str],
    predecessor: Predecessor | None,
    profile_path: str | None,
    learnt: LearntProfile | None,
    stopwatch: Stopwatch,
) -> bool:
    """Run the configured scheduler until SIGTERM, SIGINT or the launcher's end; returns whether the launcher ended.

    Args:
        predecessor: the scheduler whose place it takes; None: it is the first.
        profile_path: file of the step times from which predictions start, where the configuration names no other;
            None: there is none, and they begin without.
        learnt: where to keep step times that are learnt from the system's own steps; None: none are.
        stopwatch: of the start of this process.
    """
    scheduler_class: type[CpuScheduler] = CpuScheduler
    if config.performance.scheduler is not None:
        scheduler_class = load_class(config.performance.scheduler, CpuScheduler, "performance.scheduler")
    profile = load_profile_for(config, profile_path)
    start = Start(time.monotonic(), time.time_ns(), predecessor, profile, learns_profile=learnt is not None)
    scheduler = scheduler_class(config, instance_addresses, start)
    shell = SchedulerShell(scheduler, config, client_address, None if learnt is None else learnt.keep)
    loop, launcher_ended = asyncio.get_running_loop(), asyncio.Event()

    def on_launcher_exit() -> None:
        launcher_ended.set()
        shell.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, shell.stop)
    child.watch_parent(lambda: loop.call_soon_threadsafe(on_launcher_exit))
    child.freeze_heap()
    stopwatch.lap("scheduler")
    child.report_status({"ready": True, "start_s": stopwatch.parts})
    await shell.run()
    return launcher_ended.is_set()


def load_profile_for(config: Config, found: str | None) -> StepProfile | None:
    """Return the profile that is configured, else the one that was found for model and GPU.

    Raises:
        ConfigError: if the configured one cannot be read.
    """
    slo = config.semi_pd.slo
    if slo is not None and slo.profile is not None:
        return load_profile(slo.profile)
    try:
        return None if found is None else load_profile(found)
    except ConfigError as error:  # it was there when the system started
        logger.warning("predictions start without a profile: %s", error)
        return None


def main() -> None:
    """Run the process that a launcher starts."""
    orders = child.read_orders()
    stopwatch = Stopwatch(process_start())
    stopwatch.lap("imports")
    config = msgspec.convert(orders["config"], Config)
    child.set_process_title("hbserve-scheduler")
    child.configure_logging(config.logging, "scheduler")
    try:
        predecessor = msgspec.convert(orders["predecessor"], Predecessor | None)
        addresses, profile_path = orders["instance_addresses"], orders["profile"]
        learnt = msgspec.convert(orders["learnt_profile"], LearntProfile | None)
        has_no_launcher = asyncio.run(
            run_scheduler(config, orders["client_address"], addresses, predecessor, profile_path, learnt, stopwatch)
        )
    except HBServeError as error:
        child.report_status({"error": str(error)})
        logger.error("%s", error)
        sys.exit(child.EXIT_SUPERSEDED if isinstance(error, SupersededError) else 1)
    except BaseException:
        logger.exception("the scheduler failed")
        os._exit(1)
    if has_no_launcher:  # else it removes the sockets, or starts another scheduler, which needs them
        shutil.rmtree(orders["run_dir"], ignore_errors=True)
    sys.stderr.flush()
    os._exit(0)  # the life line's thread may be blocked in a read


if __name__ == "__main__":
    main()
