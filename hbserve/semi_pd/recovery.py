"""Recovery from the loss of the memory: all processes start again, and every request is computed again.

Runs in the supervisor's thread of `hbserve.semi_pd.process_rotation_manager`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from hbserve.errors import StartupError
from hbserve.semi_pd.instance_state import InstanceState
from hbserve.semi_pd.utils import ROLES

logger = logging.getLogger(__name__)

_END_TIMEOUT_S = 20.0


class Recovery:
    """Recovery of an instance, and the count of recoveries.

    Args:
        restart_device: called when no process uses the device any more; restarts MPS after a fault.
        start_timeout_s: for the memory and the workers together.
    """

    def __init__(self, state: InstanceState, restart_device: Callable[[], None], start_timeout_s: float) -> None:
        self._state, self._restart_device, self._start_timeout_s = state, restart_device, start_timeout_s
        self.num_done = 0

    def recover(self, why: str) -> None:
        """End every worker, then start the memory and the workers of the split in force.

        Raises:
            StartupError: if that fails. The supervisor tries again as long as ``rpc.max_restarts`` allows.
        """
        state = self._state
        logger.warning("%s: %s; starting again", state.instance.instance_id, why)
        began = time.monotonic()
        workers = state.begin_recovery(why)
        for worker in workers:
            worker.process.kill()  # its results would be of no use
        for worker in workers:
            worker.process.join(_END_TIMEOUT_S)
        state.residents.stop()
        self._restart_device()
        deadline = time.monotonic() + self._start_timeout_s
        state.begin_restart()
        try:
            state.start_memory(deadline)
            state.prepare(state.allocation, deadline)
        except StartupError as error:
            state.discard()
            state.on_restart_failed(str(error))
            raise
        with state.changed:
            state.activate(ROLES)
            self.num_done += 1
            state.keep_standbys()
        state.on_recovered(f"memory and workers are there again after {time.monotonic() - began:.1f} s")
