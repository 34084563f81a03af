"""A worker of one phase, and before that a standby (`hbserve.worker.standby`), with the other ranks of its group."""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

import msgspec

from hbserve.config import Config, InstanceConfig, KVTransferConfig
from hbserve.errors import HBServeError
from hbserve.messages.rank import Standby
from hbserve.platform import Partition
from hbserve.process import child
from hbserve.process.stopwatch import Stopwatch
from hbserve.worker.rank_group import RankGroup
from hbserve.worker.standby import sleep

logger = logging.getLogger(__name__)

_EXIT_RANK_LOST = 72


class WakeUp(msgspec.Struct, frozen=True, kw_only=True):
    """What a standby becomes.

    Attributes:
        instance: with the worker's own name and its phase as type.
        address: where it listens for the scheduler.
        partition: its share of the device.
        attachments: by rank, an `hbserve.engine.arenas.ArenaAttachment`, as plain data.
    """

    instance: InstanceConfig
    address: str
    partition: Partition
    attachments: list[dict[str, Any]]


def _work(config: Config, order: WakeUp, ranks: RankGroup, stopwatch: Stopwatch) -> int:
    from hbserve.engine.arenas import ArenaAttachment
    from hbserve.worker.gpu_instance import SharedDevice
    from hbserve.worker.process import run_worker

    attachments = msgspec.convert(order.attachments, list[ArenaAttachment])
    config = msgspec.structs.replace(
        config,
        kv_transfer=KVTransferConfig(),  # nobody sends to this worker, or receives from it
        model=msgspec.structs.replace(config.model, device=attachments[0].device),
    )
    shared = SharedDevice(attachments=attachments, partition=order.partition, ranks=ranks, stopwatch=stopwatch)
    return run_worker(config, order.instance, order.address, shared)


def main() -> None:
    """Entry of the process that a `ProcessRotationManager` starts."""
    orders = child.read_orders()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = msgspec.convert(orders["config"], Config)
    name = orders["name"]
    child.set_process_title(f"hbserve-{name}")
    child.configure_logging(config.logging, name)
    # The other ranks fall asleep at the same time. A standby that has lost one is of no use.
    how = msgspec.convert(orders["sleep"], Standby)
    ranks = RankGroup(orders["num_ranks"], name, how, lambda why: os._exit(_EXIT_RANK_LOST))
    order = sleep(how)
    stopwatch = Stopwatch()
    code = 1
    try:
        code = _work(config, msgspec.convert(order, WakeUp), ranks, stopwatch)
    except HBServeError as error:
        child.report_status({"error": str(error)})
        logger.error("%s", error)
    except Exception as error:  # the one who woke it must hear why, not only that
        child.report_status({"error": repr(error)})
        logger.exception("the worker failed")
    child.exit_now(code)


if __name__ == "__main__":
    main()
