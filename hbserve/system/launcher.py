"""Starts the processes of a system, watches over them, and ends them.

The only place that knows every kind of instance: rooms below this one do not know of each other.

Where instances go that nobody has placed.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import Callable

import msgspec

from hbserve.config import Config, InstanceRole
from hbserve.config.validation import default_instances
from hbserve.errors import StartupError
from hbserve.platform import mps
from hbserve.platform.mps import num_visible_gpus
from hbserve.process import exit_core
from hbserve.process.child import EXIT_DISMISSED
from hbserve.process.parent import ChildProcess, RestartBudget
from hbserve.process.supervision import InstanceSupervisor, Supervision
from hbserve.rpc.instance_line import instance_address, scheduler_address
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager

logger = logging.getLogger(__name__)


def fit_to_gpus(config: Config) -> Config:
    """The configuration for this machine: default instances share GPUs where there are too few for all of them.

    Instances that somebody has placed stay where they are, and say so themselves if there is no such GPU.
    """
    instances = config.gpu_instances
    if len(instances) == 1 or config.model.device == "cpu" or config.launcher == "ray":
        return config
    if instances != default_instances(config.mode, config.model.tensor_parallel_size):
        return config
    count = num_visible_gpus()
    largest = max(instance.num_ranks for instance in instances)
    if count < largest or all(instance.gpu_id + instance.num_ranks <= count for instance in instances):
        return config  # none at all is a CPU, and too few for one instance is what it will say
    names = " and ".join(instance.instance_id for instance in instances)
    logger.warning("%s share GPU 0: this machine has %d; mode semi_pd is made for that", names, count)
    shared = tuple(msgspec.structs.replace(instance, gpu_id=0) for instance in instances)
    # Each takes its part of what is free, and none knows whether the others have taken theirs.
    performance = msgspec.structs.replace(
        config.performance, memory_fraction=config.performance.memory_fraction / len(instances)
    )
    return msgspec.structs.replace(config, gpu_instances=shared, performance=performance)


_SUPERVISORS: dict[InstanceRole, type[InstanceSupervisor]] = {InstanceRole.SEMI_PD: ProcessRotationManager}


class Launcher:
    """The scheduler and, if they run here, the instances of one system.

    Args:
        config: of the system.
        with_instances: False where instances are started elsewhere.
        on_scheduler_exit: called with the reason if the scheduler ends on its own.
    """

    def __init__(self, config: Config, with_instances: bool, on_scheduler_exit: Callable[[str], None]) -> None:
        self.config = config
        self._with_instances = with_instances
        self._on_scheduler_exit = on_scheduler_exit
        self._run_dir: str | None = None
        self._children: list[ChildProcess] = []
        self._supervisions: dict[str, Supervision] = {}
        self._watchers: list[asyncio.Task[None]] = []

    async def start(self) -> str:
        """Start everything; returns the address for clients.

        Raises:
            StartupError: naming the process that failed and why. What had started is ended.
        """
        deadline = time.monotonic() + self.config.rpc.start_timeout_s
        if self._with_instances:
            self.config = await asyncio.to_thread(fit_to_gpus, self.config)
        self.make_run_dir()
        try:
            return await self._start(deadline)
        except BaseException:
            await self.stop()
            raise

    def set_core_apart(self) -> None:
        """Before anything is started, where workers will end while others serve; takes as long as asking for GPUs."""
        shares = any(instance.instance_type is InstanceRole.SEMI_PD for instance in self.config.gpu_instances)
        if self._with_instances and shares and self.config.model.device != "cpu" and mps.gpus():
            exit_core.set_apart()

    def make_run_dir(self) -> str:
        """The folder of the system's sockets; `stop` removes it, or the scheduler if the launcher is killed."""
        if self._run_dir is None:
            self._run_dir = tempfile.mkdtemp(prefix="hbserve-")
        return self._run_dir

    async def _start(self, deadline: float) -> str:
        run_dir = self._run_dir if self._with_instances else None
        client_address = scheduler_address(self.config, self._run_dir)
        plain = [i for i in self.config.gpu_instances if i.instance_type not in _SUPERVISORS]
        others = [i for i in self.config.gpu_instances if i.instance_type in _SUPERVISORS]
        by_ray = self.config.launcher == "ray"
        addresses = {} if by_ray else {i.instance_id: instance_address(i, run_dir) for i in plain}
        config = msgspec.to_builtins(self.config)
        scheduler = ChildProcess(
            "the scheduler",
            "hbserve.scheduler.process",
            {
                "config": config,
                "client_address": client_address,
                "instance_addresses": addresses,
                "run_dir": self._run_dir,
            },
        )
        self._children.append(scheduler)
        if self._with_instances:
            for name, address in addresses.items():
                orders = {"config": config, "instance_id": name, "address": address}
                self._children.append(ChildProcess(name, "hbserve.worker.process", orders))
            if by_ray:
                orders = {"config": config, "scheduler": client_address}
                self._children.append(ChildProcess("Ray's driver", "hbserve.system.ray_driver", orders))
        if others and not self._with_instances:
            raise StartupError(
                f"{others[0].instance_id}: a {others[0].instance_type} instance cannot be started elsewhere"
            )
        supervisors = {
            instance.instance_id: _SUPERVISORS[instance.instance_type].supervise(
                self.config, instance, self.make_run_dir(), client_address
            )
            for instance in others
        }  # before anything is started: they check what they are told
        for child in self._children:
            child.start()
        waits: list[asyncio.Future[None]] = [
            asyncio.create_task(child.wait_ready(deadline)) for child in self._children
        ]
        for name, supervisor in supervisors.items():
            self._supervisions[name] = Supervision(supervisor, deadline)
            waits.append(self._supervisions[name].ready)
        try:
            await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        self._watchers.append(asyncio.create_task(self._watch_scheduler(scheduler)))
        self._watchers += [asyncio.create_task(self._keep_alive(child)) for child in self._children[1:]]
        return client_address

    @property
    def supervisors(self) -> dict[str, InstanceSupervisor]:
        """Of the instances that have one, by name."""
        return {name: supervision.supervisor for name, supervision in self._supervisions.items()}

    async def _watch_scheduler(self, scheduler: ChildProcess) -> None:
        code = await scheduler.wait()
        self._on_scheduler_exit(f"the scheduler ended with exit code {code}")

    async def _keep_alive(self, child: ChildProcess) -> None:
        """Restart an instance that ends on its own; the scheduler meanwhile keeps its requests."""
        budget = RestartBudget(self.config.rpc.max_restarts)
        while True:
            code = await child.wait()
            if code == EXIT_DISMISSED:
                logger.info("%s has left", child.name)
                return
            if not budget.take():
                logger.error("%s ended with exit code %d, too often to restart it again", child.name, code)
                return
            logger.warning("%s ended with exit code %d; restarting it", child.name, code)
            await asyncio.sleep(budget.delay_s)
            child.start()
            try:
                await child.wait_ready(time.monotonic() + self.config.rpc.start_timeout_s)
            except StartupError as error:
                logger.error("%s", error)
                await child.stop()

    async def stop(self) -> None:
        """End everything that was started here, and remove the sockets."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        self._watchers.clear()
        for child in self._children[:1]:
            await child.stop()  # the scheduler first: nobody then misses the instances
        await asyncio.gather(*(each.stop() for each in self._supervisions.values()))
        self._supervisions.clear()
        await asyncio.gather(*(child.stop() for child in self._children[1:]))
        self._children.clear()
        if self._run_dir is not None:
            shutil.rmtree(self._run_dir, ignore_errors=True)
            self._run_dir = None
