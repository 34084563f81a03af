"""The resident processes of an instance, one for each rank: started, watched and ended together."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from hbserve.config import Config, InstanceConfig
from hbserve.semi_pd.resident_process_manager import ResidentProcessManager


class ResidentGroup:
    """As one resident process: the ranks' KV belongs together, so a lost rank is the loss of all.

    Args:
        config, instance: whose ranks these are.
        gpu_id: of the first rank.
        on_lost: called from a thread with the reason when one of them is lost.

    Attributes:
        ranks: their managers, in order.
    """

    def __init__(self, config: Config, instance: InstanceConfig, gpu_id: int, on_lost: Callable[[str], None]) -> None:
        self.ranks = [
            ResidentProcessManager(config, gpu_id=gpu_id, tp_rank=rank, on_lost=on_lost)
            for rank in range(instance.num_ranks)
        ]
        for rank in self.ranks:
            rank.instance = instance

    def configure(self, environment: dict[str, str], run_dir: str | None) -> None:
        """See `ResidentProcessManager`; before a start."""
        for rank in self.ranks:
            rank.environment, rank.run_dir = environment, run_dir

    def start(self, timeout: float, is_cancelled: Callable[[], bool]) -> None:
        """Load on all ranks at once, and reserve as much KV as fits on each.

        Raises:
            StartupError: with the reason of the first that cannot; the others are ended.
        """
        deadline = time.monotonic() + timeout
        try:
            for rank in self.ranks:
                rank.begin()
            sizes = [rank.wait_sized(deadline, is_cancelled) for rank in self.ranks]
            common = {key: min(size[key] for size in sizes) for key in sizes[0]}
            for rank in self.ranks:
                rank.settle(common)
            for rank in self.ranks:
                rank.wait_ready(deadline, is_cancelled)
        except BaseException:
            self.stop()
            raise

    def give_up_start(self) -> None:
        """Make a `start` that another thread is in look whether it is cancelled."""
        for rank in self.ranks:
            rank.give_up_start()

    def stop(self) -> None:
        """End all of them."""
        for rank in self.ranks:
            rank.stop()

    @property
    def attachments(self) -> list[dict[str, Any]]:
        """By rank, see `ResidentProcessManager.attachment`.

        Raises:
            StartupError: if one of them is not running.
        """
        return [rank.attachment for rank in self.ranks]

    def is_healthy(self) -> bool:
        """Ask all of them now, and wait for the answers, which come after a touch of each device."""
        return all(rank.is_healthy() for rank in self.ranks)

    def get_status(self) -> dict[str, Any]:
        """The first rank's, and in ``ranks`` everybody's."""
        statuses = [rank.get_status() for rank in self.ranks]
        return statuses[0] | {"ranks": statuses}
