"""Processes that import everything first and are told later what they are to be.

Orders come as one line on the standard input; then the process imports, says that it is asleep, and
waits for a second line, which wakes it. Until then it has not touched the device, so it can still
become a worker with any share of it. The end of the input ends it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from hbserve.pd_disagg import child
from hbserve.platform import mps

logger = logging.getLogger(__name__)

_ORDERS_VARIABLE, _WAKE_UP_VARIABLE = "HBSERVE_SLEEPER_ORDERS", "HBSERVE_SLEEPER_WAKE_UP"


def take_orders() -> dict[str, Any]:
    """The first line; or what it was, in a process that has begun anew."""
    if _WAKE_UP_VARIABLE in os.environ:
        orders: dict[str, Any] = json.loads(os.environ.pop(_ORDERS_VARIABLE))
        return orders
    return child.read_orders()


def sleep(module: str, orders: dict[str, Any], before_anew: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Import everything and wait for the second line; returns it. The process has its share of the device then.

    Args:
        module: what this process runs, should it have to begin anew: where an import has initialised
            the CUDA driver, a share of the device would come too late.
        orders: with ``on_gpu``: whether to import what only a GPU needs. The line that wakes has
            ``partition``: None, or the arguments of a `hbserve.platform.Partition`.
        before_anew: called before that.
    """
    from hbserve.platform import Partition, enter_partition

    started = time.monotonic()
    _import_everything(orders["on_gpu"])
    line = os.environ.pop(_WAKE_UP_VARIABLE, "")
    if line:
        return _parsed(line)
    child.report_status({"asleep": True, "seconds": time.monotonic() - started}, is_last=False)
    line = sys.stdin.buffer.readline().decode()
    if not line:
        child.exit_now(0)
    wake_up = _parsed(line)
    if wake_up["partition"] is not None:
        enter_partition(Partition(**wake_up["partition"]))
        if orders["on_gpu"] and mps.is_driver_initialised():
            logger.warning("an import has initialised the CUDA driver; starting anew to get the right share")
            before_anew()
            os.environ[_ORDERS_VARIABLE], os.environ[_WAKE_UP_VARIABLE] = json.dumps(orders), line
            os.execv(sys.executable, [sys.executable, "-m", module])
    return wake_up


def _parsed(line: str) -> dict[str, Any]:
    wake_up: dict[str, Any] = json.loads(line)
    return wake_up


def _import_everything(on_gpu: bool) -> None:
    """Seconds of work that do not depend on what the process will be."""
    import hbserve.engine.model_runner
    import hbserve.pd_disagg.gpu_instance
    import hbserve.pd_disagg.kv_transfer.torch_distributed

    if on_gpu:
        import flashinfer
        import triton

        import hbserve.engine.decode_graphs
        import hbserve.layers.fused  # noqa: F401

        logger.debug("asleep with FlashInfer %s and Triton %s", flashinfer.__version__, triton.__version__)
