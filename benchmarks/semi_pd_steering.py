"""Actions of the benchmark of shared devices on a running system, and waits for their effects."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

from hbserve.errors import HBServeError
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager, SMAllocation
from hbserve.system.disaggregated_llm import DisaggregatedLLM

SETTLE_TIMEOUT_S = 120.0


async def rotate(manager: ProcessRotationManager, split: SMAllocation) -> None:
    """Change the split, and wait until the old workers have ended.

    Raises:
        HBServeError: if the split does not change.
    """
    manager.request_sm_reallocation(split)
    settled = await asyncio.to_thread(manager.wait_until_settled, SETTLE_TIMEOUT_S)
    if not settled or manager.current_sm_allocation != split:
        raise HBServeError(f"no rotation to {split}: {manager.get_status()['last_error']}")


async def end_standbys(manager: ProcessRotationManager) -> None:
    """Kill all standby workers, and wait until the manager has noticed."""
    for standby in manager.get_status()["sleepers"]:
        os.kill(standby["pid"], signal.SIGKILL)  # it holds nothing on the device
    await until(lambda: not manager.get_status()["sleepers"])


async def until_asleep(manager: ProcessRotationManager, number: int) -> None:
    """Wait for a number of standby workers that have imported everything."""
    await until(lambda: sum(standby["is_asleep"] for standby in manager.get_status()["sleepers"]) >= number)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition.

    Raises:
        TimeoutError: after `SETTLE_TIMEOUT_S`.
    """
    async with asyncio.timeout(SETTLE_TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - other processes set no event here
            await asyncio.sleep(0.05)


def current_pid(llm: DisaggregatedLLM, role: str) -> int:
    """Return the process id of the worker that gets a phase's plans now."""
    workers = llm.get_system_stats()["gpu_instances"]["semi-0"]["workers"].values()
    current = [worker for worker in workers if worker["role"] == role and worker["is_current"]]
    return int(current[0]["pid"])
