"""The entry of the process of an instance's rank 0, in its main thread: from its orders to its exit code.

torch is imported after the orders have come, so that the other ranks' processes import it at the same time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from hbserve.cache_folder.transformers_import import leave_out_torch
from hbserve.config import Config, InstanceConfig
from hbserve.errors import HBServeError
from hbserve.messages.rank import Standby
from hbserve.messages.tiers import HostMemory
from hbserve.model_store import with_model_folder
from hbserve.process import child
from hbserve.process.stopwatch import Stopwatch, process_start
from hbserve.rpc.cluster_key import ClusterKey
from hbserve.rpc.instance_line import RpcServer, bind_address
from hbserve.worker.join_client import JoinClient
from hbserve.worker.rank_group import EXIT_RANK_LOST, RankGroup
from hbserve.worker.standby import stand_by

if TYPE_CHECKING:
    from hbserve.worker.worker_process import SharedDevice

logger = logging.getLogger(__name__)


def run_instance(
    config: Config,
    instance: InstanceConfig,
    address: str,
    join_client: JoinClient | None = None,
    read_again: Callable[[], Config] | None = None,
    host: HostMemory | None = None,
    ranks: RankGroup | None = None,
    stopwatch: Stopwatch | None = None,
) -> int:
    """Run a worker that has this process for itself until it has to end; return the exit code.

    A worker that a launcher started stops with the launcher, and at SIGTERM and SIGINT. A worker that was started alone
    leaves its system at these signals: it finishes its requests first, and stops at a second signal. At SIGHUP it takes
    the level of its log from ``read_again``. Other arguments as `WorkerProcess`.

    Args:
        address: where to listen for the scheduler; an address in use is an error before anything slow is imported.
        ranks: the instance's other ranks, on standby; None: they are started here.
        stopwatch: running since the start of the process.

    Raises:
        HBServeError: if it cannot start.
    """
    stopwatch = stopwatch or Stopwatch(process_start())
    leave_out_torch()
    is_launched = child.STATUS_FD_VARIABLE in os.environ
    config = with_model_folder(config)
    _name_process(config, instance)
    rpc = _listen(config, instance, address)
    if ranks is None:
        how = Standby(model=config.model.path, on_gpu=False, yields=False)
        ranks = RankGroup(instance.num_ranks, instance.instance_id, how, _end_without_rank)
    stopwatch.lap("orders")
    from hbserve.worker.worker_process import WorkerProcess

    stopwatch.lap("imports")
    worker = WorkerProcess(config, instance, rpc, ranks, stopwatch=stopwatch, join_client=join_client, host=host)
    if is_launched:
        child.watch_parent(worker.stop)
        child.watch_signals(worker.stop)
    else:
        child.watch_signals(worker.leave, lambda: _read_level(read_again or (lambda: config)))
    code = worker.run()
    return child.EXIT_DISMISSED if worker.was_dismissed and is_launched else code


def run_worker(
    config: Config,
    instance: InstanceConfig,
    address: str,
    shared: SharedDevice,
    host: HostMemory | None,
    ranks: RankGroup,
    stopwatch: Stopwatch,
) -> int:
    """Run one of the workers of an instance that has several, as `run_instance`; arguments as `WorkerProcess`."""
    from hbserve.worker.worker_process import WorkerProcess

    _name_process(config, instance)
    worker = WorkerProcess(config, instance, _listen(config, instance, address), ranks, stopwatch, shared, host=host)
    child.watch_parent(worker.stop)
    child.watch_signals(worker.stop)
    return worker.run()


def _listen(config: Config, instance: InstanceConfig, address: str) -> RpcServer:
    return RpcServer(bind_address(instance, address), ClusterKey.of(config), instance.instance_id)


def _end_without_rank(why: str) -> None:
    """End this process, one of whose ranks has ended before it could serve; in a watcher's thread."""
    child.report_status({"error": why})
    os._exit(EXIT_RANK_LOST)


def _name_process(config: Config, instance: InstanceConfig) -> None:
    child.set_process_title(f"hbserve-{instance.instance_id}-TP0")
    child.configure_logging(config.logging, instance.instance_id)


def _read_level(read_again: Callable[[], Config]) -> None:
    try:
        level = read_again().logging.level
    except HBServeError as error:
        logger.error("SIGHUP: nothing is changed: %s", error)
        return
    child.set_log_level(level)
    logger.info("SIGHUP: the log level is %s", level)


def main() -> None:
    """Entry of the process that a launcher starts; with ``standby`` in its orders it gets others later."""
    orders = child.read_orders()
    stopwatch, ranks = Stopwatch(process_start()), None
    if "standby" in orders:
        child.set_process_title("hbserve-standby")
        how = msgspec.convert(orders["standby"], Standby)
        ranks = RankGroup(orders["num_ranks"], "standby", how, _end_without_rank)
        orders = stand_by(how, stopwatch)
    config = msgspec.convert(orders["config"], Config)
    instance = config.instance(orders["instance_id"])
    host = msgspec.convert(orders["host"], HostMemory | None)
    child.exit_after(
        lambda: run_instance(config, instance, orders["address"], host=host, ranks=ranks, stopwatch=stopwatch)
    )


if __name__ == "__main__":
    main()
