"""Launcher: starts the processes of a system, watches them, and ends them.

It runs in the event loop of the API server (`hbserve.server`), or of the user's Python program. The processes of a
system, with the names that process lists show, in the order of their start:

    hbserve-api                         API server; with the Python API the user's program is in its place
    hbserve-auto-plan                   predictions for mode auto, on GPUs; ends before the others start
    hbserve-standby                     beside it: the later rank 0 of an instance, which imports already
    hbserve-scheduler                   CPU scheduler
    hbserve-<instance>-TP0              rank 0 of each instance that has one worker
        hbserve-<instance>-TP1, ...     its other ranks, which rank 0 starts and ends
        hbserve-grammars                of each rank: masks, from the first grammar on (`hbserve.grammar_process`)
    hbserve-ray                         with ``launcher: ray``, instead of these: Ray's actors start the instances
    for each semi_pd instance           by a thread of this process (`_SupervisorThread`):
        nvidia-cuda-mps-control         MPS daemon, on a GPU
        hbserve-<instance>-standby      standby processes, which import and then become workers
        hbserve-<instance>-resident     holder of weights and KV, one per rank
    hbserve-detokenizer                 text to HTTP clients        } only behind the API server, by `TextProcesses`;
    hbserve-tokenizer-0, -1, ...        text of HTTP clients        } they start while the others do, or
    hbserve-grammar-checker, ...        grammars of HTTP clients    } when they are first needed

They end in this order: text processes, scheduler, semi_pd instances, other instances. Every child also ends when its
parent ends, however that happens: see `hbserve.process.child`.

This is the only module that knows every kind of instance; rooms below this one do not know of each other.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec

from hbserve.config import Config, InstanceConfig, InstanceRole
from hbserve.config.validation import default_instances
from hbserve.errors import StartupError
from hbserve.kv_cache.host_memory import HostMemoryOwner
from hbserve.messages.rank import Standby
from hbserve.messages.supervisor import Predecessor
from hbserve.messages.tiers import HostMemory
from hbserve.platform import mps
from hbserve.policy.profile_file import LearntProfile
from hbserve.process import exit_core
from hbserve.process.child import EXIT_DISMISSED, EXIT_SUPERSEDED
from hbserve.process.events import OnEvent, log_event
from hbserve.process.parent import ChildProcess, RestartBudget
from hbserve.process.stopwatch import Start
from hbserve.rpc.instance_line import instance_address, scheduler_address
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager

logger = logging.getLogger(__name__)

_BUDGET = "rpc.max_restarts"
_CHECKS_OF_FROZEN = 8
_WORKER_MODULE = "hbserve.worker.process"

_FAULTS = frozenset(-number for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT))
"""Exit codes of a process that the kernel has ended for what it did; other signals come from outside."""


def fit_to_gpus(config: Config) -> Config:
    """Fit a configuration to this machine: default instances share GPU 0 if there is no GPU for each.

    Instances that the user has placed stay where they are, and fail at start if there is no such GPU.
    """
    instances = config.gpu_instances
    if len(instances) == 1 or config.model.device == "cpu" or config.launcher == "ray":
        return config
    if instances != default_instances(config.mode, config.model.tensor_parallel_size):
        return config
    num_gpus = mps.num_visible_gpus()
    if num_gpus < config.max_ranks or all(i.gpu_id + i.num_ranks <= num_gpus for i in instances):
        return config  # without a GPU the CPU serves; with too few for one instance, that instance reports it
    names = " and ".join(instance.instance_id for instance in instances)
    logger.warning("%s share GPU 0: this machine has %d; mode semi_pd is made for that", names, num_gpus)
    # Each takes its part of the free memory, and does not know whether the others have taken theirs.
    fraction = config.performance.memory_fraction / len(instances)
    return msgspec.structs.replace(
        config,
        gpu_instances=tuple(msgspec.structs.replace(instance, gpu_id=0) for instance in instances),
        performance=msgspec.structs.replace(config.performance, memory_fraction=fraction),
    )


class Launcher:
    """Launcher of the scheduler and, if they run here, the instances of one system. It restarts what ends on its own.

    Args:
        config: configuration of the system.
        with_instances: False if the instances are started elsewhere.
        on_scheduler_exit: called with the reason when the scheduler has ended and is not started again.
        on_dismissed: called with the name of an instance that has ended because an operator has removed it. A scheduler
            that was started again meanwhile does not know that.

    Attributes:
        profile_path: file of the model's step times on this kind of GPU; None: there is none.
        learnt_profile: where the scheduler keeps those that it learns; None: it learns none.
    """

    def __init__(
        self,
        config: Config,
        with_instances: bool,
        on_scheduler_exit: Callable[[str], None],
        on_dismissed: Callable[[str], None],
        on_event: OnEvent = log_event,
    ) -> None:
        self.config = config
        self.profile_path: str | None = None
        self.learnt_profile: LearntProfile | None = None
        self._on_event, self._on_dismissed = on_event, on_dismissed
        self._with_instances = with_instances
        self._on_scheduler_exit = on_scheduler_exit
        self._scheduler_restarts = RestartBudget(config.rpc.max_restarts)
        self._why_killed: str | None = None
        self._dismissed: set[str] = set()
        self._given_up: dict[str, str] = {}
        self._run_dir: str | None = None
        self._host_memory: dict[int, HostMemoryOwner] = {}
        self._children: list[ChildProcess] = []  # the scheduler first
        self._standbys: list[ChildProcess] = []
        self._supervisors: dict[str, _SupervisorThread] = {}
        self._watchers: list[asyncio.Task[None]] = []

    def stand_by(self, num_instances: int, num_ranks: int) -> None:
        """Start processes that import what workers need, while the plan is made; `start` makes instances of them.

        Those that no instance needs are ended by `start`, or by `stop`. Callable from any thread.

        Args:
            num_ranks: ranks of each instance.
        """
        if not self._with_instances:
            return
        how = Standby(model=self.config.model.path, on_gpu=True, yields=False)
        orders = {"standby": msgspec.to_builtins(how), "num_ranks": num_ranks}
        self._standbys = [ChildProcess("a standby", _WORKER_MODULE, dict(orders)) for _ in range(num_instances)]
        for standby in self._standbys:
            standby.start()

    def _end_standbys(self) -> None:
        while self._standbys:
            self._standbys.pop().kill()  # it has not touched a device

    async def start(self) -> str:
        """Start all processes, and return the scheduler's address for clients; `wait_ready` waits for the processes.

        Raises:
            StartupError: if an instance cannot be started here; `stop` then ends the others.
        """
        self._deadline = time.monotonic() + self.config.rpc.start_timeout_s
        if self._with_instances:
            self.config = await asyncio.to_thread(fit_to_gpus, self.config)
        return self._start(self.make_run_dir())

    def set_core_apart(self) -> None:
        """Reserve the exit core if workers will end while others serve; before any start. Waits for nvidia-smi."""
        shares = any(instance.instance_type is InstanceRole.SEMI_PD for instance in self.config.gpu_instances)
        if self._with_instances and shares and self.config.model.device != "cpu" and mps.gpus():
            exit_core.set_apart()

    def make_run_dir(self) -> str:
        """Make the folder of the system's sockets; `stop` removes it, or the scheduler if this process is killed."""
        if self._run_dir is None:
            self._run_dir = tempfile.mkdtemp(prefix="hbserve-")
        return self._run_dir

    def _start(self, run_dir: str) -> str:
        client_address = scheduler_address(self.config, run_dir)
        shared = [i for i in self.config.gpu_instances if i.instance_type is InstanceRole.SEMI_PD]
        if shared and not self._with_instances:
            raise StartupError(f"{shared[0].instance_id}: a semi_pd instance cannot be started elsewhere")
        if self._with_instances and self.config.launcher == "local":
            self._make_host_memory()
        self._children = self._new_children(client_address, run_dir)
        managers = {  # before any start, because they check their configuration
            instance.instance_id: ProcessRotationManager.supervise(
                self.config, instance, run_dir, client_address, self._host_memory_of(instance)
            )
            for instance in shared
        }
        for child in self._children:
            # Orders wake a standby; one that has died is started anew.
            if not (child.is_alive() and child.send(child.orders)):
                child.start()
        self._end_standbys()
        for name, manager in managers.items():
            self._supervisors[name] = _SupervisorThread(manager, self._deadline)
        return client_address

    def _make_host_memory(self) -> None:
        """Make the memory for KV blocks. Instances of another number of ranks lay blocks out differently, so they have
        memory of their own."""
        sizes = {instance.num_ranks for instance in self.config.gpu_instances}
        num_bytes = self.config.kv_cache.host_bytes // len(sizes)
        self._host_memory = {size: HostMemoryOwner(num_bytes) for size in sizes} if num_bytes else {}

    def _host_memory_of(self, instance: InstanceConfig) -> HostMemory | None:
        owner = self._host_memory.get(instance.num_ranks)
        return None if owner is None else owner.memory

    async def wait_ready(self) -> None:
        """Wait until all processes are ready.

        Raises:
            StartupError: naming the process that failed and why; `stop` then ends the others.
        """
        waits = [asyncio.create_task(child.wait_ready(self._deadline)) for child in self._children]
        waits += [asyncio.create_task(thread.wait_ready()) for thread in self._supervisors.values()]
        waits += [asyncio.create_task(asyncio.to_thread(owner.reserve)) for owner in self._host_memory.values()]
        try:
            await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        scheduler, *others = self._children
        self._watchers.append(asyncio.create_task(self._keep_scheduler(scheduler)))
        self._watchers += [asyncio.create_task(self._keep_alive(child)) for child in others]
        self._watchers += [asyncio.create_task(self._kill_if_frozen(child)) for child in others]

    def _new_children(self, client_address: str, run_dir: str) -> list[ChildProcess]:
        """Describe the scheduler and the instances that have one worker, or Ray's driver; nothing is started."""
        config = msgspec.to_builtins(self.config)
        by_ray = self.config.launcher == "ray"
        addresses = {
            instance.instance_id: instance_address(instance, run_dir if self._with_instances else None)
            for instance in self.config.gpu_instances
            if instance.instance_type is not InstanceRole.SEMI_PD and not by_ray
        }
        orders = {"config": config, "client_address": client_address, "predecessor": None}
        orders |= {"instance_addresses": addresses, "run_dir": run_dir, "profile": self.profile_path}
        orders["learnt_profile"] = msgspec.to_builtins(self.learnt_profile)
        children = [ChildProcess("the scheduler", "hbserve.scheduler.process", orders)]
        if self._with_instances and by_ray:
            orders = {"config": config, "scheduler": client_address}
            loop = asyncio.get_running_loop()

            def on_status(status: dict[str, Any]) -> None:
                if "given_up" in status:
                    loop.call_soon_threadsafe(self.give_up, status["given_up"], status["reason"])

            module = "hbserve.system.ray_driver"
            children.append(ChildProcess("Ray's driver", module, orders, on_status=on_status))
        elif self._with_instances:
            for name, address in addresses.items():
                host = msgspec.to_builtins(self._host_memory_of(self.config.instance(name)))
                orders = {"config": config, "instance_id": name, "address": address, "host": host}
                children.append(self._new_worker(name, orders))
        return children

    def _new_worker(self, name: str, orders: dict[str, Any]) -> ChildProcess:
        """Describe an instance's process; take a standby with as many ranks if there is one."""
        num_ranks = self.config.instance(name).num_ranks
        found = next((standby for standby in self._standbys if standby.orders["num_ranks"] == num_ranks), None)
        if found is None:
            return ChildProcess(name, _WORKER_MODULE, orders)
        self._standbys.remove(found)
        found.name, found.orders = name, orders
        return found

    @property
    def scheduler(self) -> ChildProcess:
        """The scheduler's process, once it was started; another process of this object takes its place if it ends."""
        return self._children[0]

    @property
    def supervisors(self) -> dict[str, ProcessRotationManager]:
        """Rotation managers of the ``semi_pd`` instances, by instance name."""
        return {name: thread.manager for name, thread in self._supervisors.items()}

    @property
    def latest_starts(self) -> list[Start | None]:
        """The latest start of each process, and of each ``semi_pd`` instance as a whole."""
        shared = [thread.latest_start for thread in self._supervisors.values()]
        return [child.latest_start for child in self._children] + shared

    # --- the scheduler's restarts ----------------------------------------------------------------

    def replace_scheduler(self, what: str) -> None:
        """Kill a scheduler that does not answer, so that it is started again.

        Args:
            what: it did, in words that follow its name.
        """
        for scheduler in self._children[:1]:
            if scheduler.is_alive():
                self._why_killed = what
                scheduler.kill()

    def forgive_scheduler(self) -> None:
        """Forget the scheduler's restarts so far: a request was their cause, and has been given up."""
        self._scheduler_restarts.clear()

    async def _keep_scheduler(self, scheduler: ChildProcess) -> None:
        """Restart the scheduler when it ends on its own. Clients then send it their open requests again."""
        for num_restarts in itertools.count(1):
            code = await scheduler.wait()
            how, failed = self._describe_end(code)
            logger.error("scheduler_lost: the scheduler: it %s", how)
            if code == EXIT_SUPERSEDED:
                self._on_scheduler_exit("the instances obey another scheduler, which was started later")
                return
            if not self._scheduler_restarts.take():
                why = f"{how}, too often to start it again ({_BUDGET})"
                logger.error("given_up: the scheduler: it %s", why)
                self._on_scheduler_exit(f"the scheduler {why}")
                return
            before = Predecessor(
                reason=f"it {how}",
                failed=failed,
                num_restarts=num_restarts,
                given_up=self._given_up,
                removed=sorted(self._dismissed),
            )
            scheduler.orders["predecessor"] = msgspec.to_builtins(before)
            try:
                scheduler.start()
                await scheduler.wait_ready(time.monotonic() + self.config.rpc.start_timeout_s)
                logger.warning("scheduler_restarted: the scheduler: it %s", how)
            except (StartupError, OSError) as error:
                self._on_event("start_failed", "the scheduler", f"{error}; it is tried again")
                await scheduler.stop()
                await asyncio.sleep(self._scheduler_restarts.delay_s)

    def _describe_end(self, code: int) -> tuple[str, bool]:
        """Return what the scheduler did, in words that follow its name, and whether it failed on its own."""
        why_killed, self._why_killed = self._why_killed, None
        if why_killed is not None:
            return why_killed, True
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return how, code > 0 or code in _FAULTS

    async def _keep_alive(self, child: ChildProcess) -> None:
        """Restart an instance that ends on its own; the scheduler meanwhile keeps its requests."""
        budget = RestartBudget(self.config.rpc.max_restarts)
        while True:
            code = await child.wait()
            if code == EXIT_DISMISSED:
                logger.info("%s has left", child.name)
                self._dismissed.add(child.name)
                self._on_dismissed(child.name)
                return
            if not budget.take():
                self.give_up(child.name, f"it ended with exit code {code}, too often to start it again ({_BUDGET})")
                return
            self._on_event("instance_restarted", child.name, f"it ended with exit code {code} and is started again")
            await asyncio.sleep(budget.delay_s)
            try:
                child.start()
                await child.wait_ready(time.monotonic() + self.config.rpc.start_timeout_s)
            except (StartupError, OSError) as error:
                self._on_event("start_failed", child.name, f"{error}; it is tried again")
                await child.stop()

    async def _kill_if_frozen(self, child: ChildProcess) -> None:
        """Kill an instance in which nothing runs any more, not even the thread that ends a step without end."""
        checks_in_a_row = 0
        while True:
            # Many short waits, because this process may have been stopped itself, and the children with it.
            await asyncio.sleep(self.config.rpc.step_timeout_s / _CHECKS_OF_FROZEN)
            if not child.is_ready() or not child.has_unread():
                checks_in_a_row = 0
                if child.is_ready():
                    child.send({})  # orders nothing; it is read, or lies there
                continue
            checks_in_a_row += 1
            if checks_in_a_row >= _CHECKS_OF_FROZEN:
                what = f"nothing has run in it for {self.config.rpc.step_timeout_s:g} s (rpc.step_timeout_s)"
                self._on_event("lost", child.name, f"{what}; it is killed")
                child.kill()
                checks_in_a_row = 0

    def give_up(self, instance_id: str, why: str) -> None:
        """Note that an instance does not come back; also a scheduler that is started later learns it."""
        self._given_up[instance_id] = why
        self._on_event("given_up", instance_id, why)

    async def stop(self) -> None:
        """End all processes that were started here, and remove the sockets."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        self._watchers.clear()
        for scheduler in self._children[:1]:
            await scheduler.stop()  # first, so that it does not report the instances as lost
        await asyncio.gather(*(thread.stop() for thread in self._supervisors.values()))
        self._supervisors.clear()
        await asyncio.gather(*(child.stop() for child in self._children[1:]))
        self._children.clear()
        self._end_standbys()
        for owner in self._host_memory.values():
            owner.close()
        self._host_memory.clear()
        if self._run_dir is not None:
            shutil.rmtree(self._run_dir, ignore_errors=True)
            self._run_dir = None


class _SupervisorThread:
    """Thread that starts the processes of a ``semi_pd`` instance, and at the end stops them: both may block.

    One thread does both, because an interpreter that is ending cannot start another one. It is a daemon, because
    interpreters join other threads before the launcher can stop it.
    """

    def __init__(self, manager: ProcessRotationManager, deadline: float) -> None:
        self.manager = manager
        self._deadline = deadline
        self.latest_start: Start | None = None
        self._stop = threading.Event()
        self._started: Future[None] = Future()
        self._stopped: Future[None] = Future()
        for future in (self._started, self._stopped):
            future.set_running_or_notify_cancel()  # a coroutine that is cancelled must not cancel it
        threading.Thread(target=self._run, name="semi-pd-start-stop", daemon=True).start()

    def _run(self) -> None:
        began = time.monotonic()
        try:
            self.manager.start_or_raise(self._deadline)
            self.latest_start = Start(self.manager.instance.instance_id, began, time.monotonic(), {})
            self._started.set_result(None)
        except BaseException as error:
            self._started.set_exception(error)
        self._stop.wait()
        try:
            self.manager.stop()
        finally:
            self._stopped.set_result(None)

    async def wait_ready(self) -> None:
        """Wait until the start is over; raises what the start has raised."""
        await asyncio.wrap_future(self._started)

    async def stop(self) -> None:
        """Stop the instance, in whatever state it is."""
        self._stop.set()
        self.manager.tell_to_stop()
        await asyncio.wrap_future(self._stopped)
