"""What follows the loss of the memory: everything begins anew, and every request is computed again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from hbserve.errors import StartupError
from hbserve.semi_pd.instance_state import InstanceState, State
from hbserve.semi_pd.utils import ROLES
from hbserve.semi_pd.worker_pool import WorkerState

logger = logging.getLogger(__name__)

_END_TIMEOUT_S = 20.0


class Recovery:
    """Recovers, and counts how often.

    Args:
        restart_device: called when nothing uses the device any more: after a fault MPS begins anew.
        start_timeout_s: for the memory and the workers together.
        num_sleepers: to have again afterwards.
    """

    def __init__(
        self, workforce: InstanceState, restart_device: Callable[[], None], start_timeout_s: float, num_sleepers: int
    ) -> None:
        self._workforce, self._restart_device = workforce, restart_device
        self._start_timeout_s, self._num_sleepers = start_timeout_s, num_sleepers
        self.num_done = 0

    def recover(self, why: str) -> None:
        """End every worker, start the memory and the workers of the split in force.

        Raises:
            StartupError: if that fails; it is tried again as long as ``rpc.max_restarts`` allows.
        """
        workforce = self._workforce
        logger.warning("%s: %s; starting again", workforce.instance.instance_id, why)
        self._end_workers(why)
        workforce.residents.stop()
        self._restart_device()
        deadline = time.monotonic() + self._start_timeout_s
        with workforce.changed:
            workforce.memory_lost = None
            workforce.check_going()
            assert workforce.workers is not None
            # Sleepers have not touched the device and are still there; more of them import while the memory is loaded.
            workforce.workers.keep_sleepers(len(workforce.rungs(workforce.allocation)), True)
        try:
            workforce.start_memory(deadline)
            workforce.prepare(workforce.allocation, deadline)
        except StartupError as error:
            workforce.discard()
            with workforce.changed:
                if workforce.state is State.RUNNING and workforce.may_try_again():
                    workforce.memory_lost = str(error)
            raise
        with workforce.changed:
            workforce.activate(ROLES)
            self.num_done += 1
            workforce.workers.keep_sleepers(self._num_sleepers)

    def _end_workers(self, why: str) -> None:
        workforce = self._workforce
        with workforce.changed:
            assert workforce.workers is not None
            workers = list(workforce.workers.workers.values())
            for worker in workers:
                worker.state = WorkerState.RETIRING
            workforce.publish(why)
        for worker in workers:
            worker.process.kill()  # nothing of what it could still compute is of use
        for worker in workers:
            worker.process.join(_END_TIMEOUT_S)
