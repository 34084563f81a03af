"""The process of a worker of one phase: first a standby (`hbserve.worker.standby`), then a worker.

It starts the processes of the other ranks of its group.
"""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

import msgspec

from hbserve.config import Config, InstanceConfig, KVTransferConfig
from hbserve.errors import HBServeError
from hbserve.messages.rank import Standby
from hbserve.messages.tiers import HostMemory
from hbserve.platform import Partition
from hbserve.process import child
from hbserve.process.stopwatch import Stopwatch
from hbserve.worker.rank_group import EXIT_RANK_LOST, RankGroup
from hbserve.worker.standby import stand_by

logger = logging.getLogger(__name__)


class WakeUp(msgspec.Struct, frozen=True, kw_only=True):
    """Order that makes a standby a worker.

    Attributes:
        instance: the instance, with the worker's name and its phase as type.
        address: where the worker listens for the scheduler.
        partition: the worker's share of the device.
        attachments: by rank, an `hbserve.engine.arenas.ArenaAttachment`, as plain data.
        host: memory of the host for KV blocks; None: there is none.
        is_awaited: see `hbserve.worker.worker_process.SharedDevice`.
    """

    instance: InstanceConfig
    address: str
    partition: Partition
    attachments: list[dict[str, Any]]
    host: HostMemory | None
    is_awaited: bool


def _work(config: Config, order: WakeUp, ranks: RankGroup, stopwatch: Stopwatch) -> int:
    from hbserve.engine.arenas import ArenaAttachment
    from hbserve.worker.process import run_worker
    from hbserve.worker.worker_process import SharedDevice

    attachments = msgspec.convert(order.attachments, list[ArenaAttachment])
    config = msgspec.structs.replace(
        config,
        kv_transfer=KVTransferConfig(),  # this worker sends and receives no KV
        model=msgspec.structs.replace(config.model, device=attachments[0].device),
    )
    shared = SharedDevice(attachments=attachments, partition=order.partition, is_awaited=order.is_awaited)
    return run_worker(config, order.instance, order.address, shared, order.host, ranks, stopwatch)


def main() -> None:
    """Run the process that a `ProcessRotationManager` starts."""
    orders = child.read_orders()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = msgspec.convert(orders["config"], Config)
    name = orders["name"]
    child.set_process_title(f"hbserve-{name}")
    child.configure_logging(config.logging, name)
    # The other ranks become standbys at the same time. A standby that has lost one is useless.
    how = msgspec.convert(orders["standby"], Standby)
    ranks = RankGroup(orders["num_ranks"], name, how, lambda why: os._exit(EXIT_RANK_LOST))
    order = stand_by(how)
    stopwatch = Stopwatch()
    code = 1
    try:
        code = _work(config, msgspec.convert(order, WakeUp), ranks, stopwatch)
    except HBServeError as error:
        child.report_status({"error": str(error)})
        logger.error("%s", error)
    except Exception as error:  # the manager must learn the reason, not only that it failed
        child.report_status({"error": repr(error)})
        logger.exception("the worker failed")
    child.exit_now(code)


if __name__ == "__main__":
    main()
