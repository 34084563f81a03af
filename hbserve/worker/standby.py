"""Standby: a process imports everything before it is told what it will be.

Its first orders are one line on the standard input. The process imports, reports that it is on standby, and waits for a
second line, which wakes it. Until then it has not touched the device, so its share of the device and its priority can
still be chosen. The end of the input ends the process. `stand_by` is in the main thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hbserve.cache_folder.transformers_import import leave_out_torch
from hbserve.errors import HBServeError
from hbserve.messages.rank import Standby
from hbserve.platform import Partition, mps
from hbserve.process import child
from hbserve.process.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

_NICENESS = 5


def stand_by(how: Standby, stopwatch: Stopwatch | None = None) -> dict[str, Any]:
    """Import everything, wait for the second line of orders, and return it.

    Its ``partition``, if there is one, has the fields of a `hbserve.platform.Partition`. Its priority is set here.

    Args:
        stopwatch: measures the parts ``imports`` and ``orders``, the wait for them.
    """
    started = time.monotonic()
    with ThreadPoolExecutor(1, "imports") as importer:
        importer.submit(_import_everything, how).result()
    child.report_status({"on_standby": True, "seconds": time.monotonic() - started}, is_last=False)
    if stopwatch is not None:
        stopwatch.lap("imports")
    wake_up = child.next_order()
    if wake_up is None:
        child.exit_now(0)
    if stopwatch is not None:
        stopwatch.lap("orders")
    from hbserve.platform import set_priority  # imports torch; the API server imports this module and needs none

    if wake_up.get("partition") is not None:
        priority = Partition(**wake_up["partition"]).priority
        if priority and mps.is_driver_initialised():
            logger.warning("an import has initialised the CUDA driver already, so this worker has normal priority")
        set_priority(priority)
    return wake_up


def _import_everything(how: Standby) -> None:
    """Do the seconds of work that do not depend on what the process will be.

    This is in a thread of its own, because on Linux each thread has its own niceness, and cannot lower it again.
    """
    leave_out_torch()  # of transformers
    if how.yields:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
    import numpy.ma  # noqa: F401 - `numpy.unique` imports it at its first call

    import hbserve.engine.model_runner
    import hbserve.engine.process_group
    import hbserve.kv_transfer.two_sided.torch_transfers
    import hbserve.models.loader
    import hbserve.worker.worker_process
    from hbserve.model_spec import ModelSpec

    if how.model is not None:
        with contextlib.suppress(HBServeError):  # the process that wakes this one gets this error
            ModelSpec.load(how.model)  # transformers imports the modules of this model
    if how.on_gpu:
        with contextlib.suppress(ImportError):  # optional; the attention backend says what is missing
            import flashinfer  # noqa: F401
        with contextlib.suppress(ImportError):
            import hbserve.attention.paged_decode
            import hbserve.engine.decode_graphs
            import hbserve.engine.prefill_graphs
            import hbserve.layers.fused  # noqa: F401
