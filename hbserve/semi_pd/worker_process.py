"""A worker of one phase, and before that a sleeper: a process that has imported everything it will need.

A sleeper has not touched the device, so it can still become a worker of any phase with any share of
it. One line on its standard input makes it that; the end of the input ends it.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from typing import Any

import msgspec

from hbserve.config import Config, InstanceConfig, KVTransferConfig
from hbserve.errors import HBServeError
from hbserve.pd_disagg import child
from hbserve.platform import mps

logger = logging.getLogger(__name__)


class WakeUp(msgspec.Struct, frozen=True, kw_only=True):
    """What a sleeper becomes.

    Attributes:
        instance: with the worker's own name and its phase as type.
        address: where it listens for the scheduler.
        percentage, priority: see `hbserve.platform.Partition`.
        attachment: an `hbserve.engine.arenas.ArenaAttachment`, as plain data.
    """

    instance: InstanceConfig
    address: str
    percentage: int
    priority: int
    attachment: dict[str, Any]


def _import_everything(on_gpu: bool) -> None:
    """Seconds of work that do not depend on what the process will be."""
    import hbserve.engine.model_runner
    import hbserve.pd_disagg.gpu_instance
    import hbserve.pd_disagg.kv_transfer.torch_transfers

    if on_gpu:
        import flashinfer
        import triton

        import hbserve.engine.decode_graphs
        import hbserve.layers.fused  # noqa: F401

        logger.debug("asleep with FlashInfer %s and Triton %s", flashinfer.__version__, triton.__version__)


def _work(config: Config, order: WakeUp) -> int:
    from hbserve.engine.arenas import ArenaAttachment
    from hbserve.pd_disagg.gpu_instance import run_worker
    from hbserve.platform import set_priority
    from hbserve.semi_pd.utils import partition_of

    if order.priority and mps.is_driver_initialised():
        logger.warning("something has initialised the CUDA driver already, so this worker has normal priority")
    set_priority(order.priority)
    partition = partition_of(order.instance.instance_type, order.percentage, order.priority)
    attachment = msgspec.convert(order.attachment, ArenaAttachment)
    config = msgspec.structs.replace(
        config,
        kv_transfer=KVTransferConfig(),  # nobody sends to this worker, or receives from it
        model=msgspec.structs.replace(config.model, device=attachment.device),
    )
    return run_worker(config, order.instance, order.address, attachment, partition)


def main() -> None:
    """Entry of the process that a `ProcessRotationManager` starts."""
    orders = child.read_orders()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = msgspec.convert(orders["config"], Config)
    name = f"{orders['name']}-sleeper"
    child.set_process_title(f"hbserve-{name}")
    child.configure_logging(config.logging, name)
    started = time.monotonic()
    _import_everything(orders["on_gpu"])
    child.report_status({"asleep": True, "seconds": time.monotonic() - started}, is_last=False)
    line = sys.stdin.buffer.readline()
    if not line:
        child.exit_now(0)
    code = 1
    try:
        code = _work(config, msgspec.json.decode(line, type=WakeUp))
    except HBServeError as error:
        child.report_status({"error": str(error)})
        logger.error("%s", error)
    except Exception as error:  # the one who woke it must hear why, not only that
        child.report_status({"error": repr(error)})
        logger.exception("the worker failed")
    child.exit_now(code)


if __name__ == "__main__":
    main()
