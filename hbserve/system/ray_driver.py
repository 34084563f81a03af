"""Ray's driver: process through which Ray starts, watches and restarts instances, with ``launcher: ray``.

Ray only decides on which host an instance runs, and restarts it. Plans, results and KV
go over our own sockets, as with every launcher. Ray's library stays in this process and in Ray's workers.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import msgspec

from hbserve.config import Config, InstanceConfig
from hbserve.config.limits import is_loopback
from hbserve.errors import StartupError
from hbserve.process import child
from hbserve.system.ray_actor import InstanceActor

logger = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 0.5
_CONNECT_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 15.0
_START_SHARE = 0.9
"""Share of the start timeout after which this process gives up, while the launcher still waits for the reason."""
_NODE_SHARE = 0.001
"""Amount of a host's ``node:`` resource, of which it has 1, that binds an instance to the host."""


@dataclass
class _Placed:
    """Instance with its reserved resources and its actor."""

    instance: InstanceConfig
    group: Any
    actor: Any = None
    run: Any = None


class RayInstances:
    """Instances of a system, as Ray actors, which find the scheduler at the address ``scheduler``.

    Raises:
        StartupError: if Ray is not installed, or there is no cluster.
    """

    def __init__(self, config: Config, scheduler: str) -> None:
        try:
            import ray
        except ImportError:
            raise StartupError("launcher: ray needs Ray: pip install 'hbserve[ray]'") from None
        self._ray = ray
        self._config = config
        try:
            _check_reachable(os.environ.get("RAY_ADDRESS", ""))
            ray.init("auto", logging_level=logging.WARNING)
        except (OSError, RuntimeError, ValueError) as error:
            raise StartupError(f"there is no Ray cluster (ray start --head, or RAY_ADDRESS): {error}") from None
        self._scheduler = scheduler.replace("://0.0.0.0:", f"://{ray.util.get_node_ip_address()}:")
        self._placed: list[_Placed] = []

    def start(self, deadline: float, stop: threading.Event) -> None:
        """Place and start all instances; returns when all are ready, or when ``stop`` is set.

        Raises:
            StartupError: if no host has room for an instance, or one cannot start; saying why.
        """
        for instance in self._config.gpu_instances:
            bundle = self._needs(instance)
            # One bundle puts all ranks on one host; it stays reserved while the actor is restarted.
            group = self._ray.util.placement_group([bundle], strategy="STRICT_PACK", name=instance.instance_id)
            self._placed.append(_Placed(instance, group))
        for placed in self._placed:
            self._wait_for_room(placed, deadline, stop)
            if not stop.is_set():
                self._start_actor(placed)
        names = {placed.actor.wait_started.remote(): placed.instance.instance_id for placed in self._placed}
        waiting = list(names)
        while waiting and not stop.is_set():
            if time.monotonic() > deadline:
                late = ", ".join(names[ref] for ref in waiting)
                raise StartupError(f"not ready in time (rpc.start_timeout_s): {late}")
            done, waiting = self._ray.wait(waiting, timeout=_WATCH_INTERVAL_S)
            for ref in done:
                try:
                    error = self._ray.get(ref)
                except self._ray.exceptions.RayError as failure:
                    error = str(failure)
                if error is not None:
                    raise StartupError(f"{names[ref]}: {error}")

    def _needs(self, instance: InstanceConfig) -> dict[str, float]:
        """Return the resources that an instance needs on its host, in Ray's names."""
        num_ranks = instance.num_ranks
        device = self._config.model.device
        if device == "auto":
            device = "cuda" if self._ray.cluster_resources().get("GPU") else "cpu"
        needs: dict[str, float] = {"CPU": num_ranks * (instance.num_threads or 1)}
        if device == "cuda":
            needs["GPU"] = num_ranks
        if not is_loopback(instance.host):
            needs[f"node:{instance.host}"] = _NODE_SHARE
        return needs

    def _wait_for_room(self, placed: _Placed, deadline: float, stop: threading.Event) -> None:
        while not stop.is_set() and not placed.group.wait(_WATCH_INTERVAL_S):
            if time.monotonic() > deadline:
                needs, free = placed.group.bundle_specs[0], self._ray.available_resources()
                raise StartupError(
                    f"no host of the Ray cluster has room for {placed.instance.instance_id}, which needs {needs}; "
                    f"free on all together are { {name: free.get(name, 0) for name in needs} }"
                )

    def _start_actor(self, placed: _Placed) -> None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        instance, rpc = placed.instance, self._config.rpc
        options = {
            "--role": instance.instance_type,
            "--instance-id": instance.instance_id,
            "--key-file": rpc.key_file,
            "--tensor-parallel-size": instance.num_ranks,
            "--num-threads": instance.num_threads,
            "--kv-ip": instance.kv_ip,
            "--patience-s": rpc.heartbeat_timeout_s + 5.0,  # until the scheduler has noticed a predecessor's loss
        }
        arguments = [self._scheduler]
        for name, value in options.items():
            arguments += [] if value is None else [name, str(value)]
        needs = placed.group.bundle_specs[0]
        kind = self._ray.remote(
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU", 0),
            max_restarts=rpc.max_restarts,
            max_task_retries=-1,  # a restarted actor runs again
            scheduling_strategy=PlacementGroupSchedulingStrategy(placed.group),
        )(InstanceActor)
        placed.actor = kind.remote(instance.instance_id, arguments, rpc.start_timeout_s)
        placed.run = placed.actor.run.remote()

    def watch(self, stop: threading.Event) -> None:
        """Free the resources of instances that Ray does not start again, and log them, until ``stop`` is set."""
        while not stop.wait(_WATCH_INTERVAL_S):
            running = {placed.run: placed for placed in self._placed}
            done, _ = self._ray.wait(list(running), timeout=0) if running else ([], [])
            for ref in done:
                name = running[ref].instance.instance_id
                try:
                    self._ray.get(ref)
                    logger.info("%s has left", name)
                except self._ray.exceptions.RayError as error:
                    child.report_status({"given_up": name, "reason": f"Ray does not start it again: {error}"}, False)
                self._ray.util.remove_placement_group(running[ref].group)
                self._placed.remove(running[ref])

    def close(self) -> None:
        """End all instances and free all resources of the cluster."""
        started = [placed for placed in self._placed if placed.actor is not None]
        stops = [placed.actor.stop.options(max_task_retries=0).remote() for placed in started]
        ends = [*stops, *(placed.run for placed in started)]
        if ends:
            self._ray.wait(ends, num_returns=len(ends), timeout=_STOP_TIMEOUT_S)
        for placed in started:
            self._ray.kill(placed.actor)
        for placed in self._placed:
            self._ray.util.remove_placement_group(placed.group)
        self._ray.shutdown()


def _check_reachable(address: str) -> None:
    """Check that a cluster listens at the address, because Ray itself would try for minutes.

    Raises:
        OSError: if no process listens there.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "://" not in address:
        socket.create_connection((host, int(port)), _CONNECT_TIMEOUT_S).close()


def main() -> None:
    """Entry point of the process that the launcher starts."""
    orders = child.read_orders()
    config = msgspec.convert(orders["config"], Config)
    child.set_process_title("hbserve-ray")
    child.configure_logging(config.logging, "ray")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Ray prints; standard output is the server's
    started = time.monotonic()
    stop = threading.Event()
    child.watch_parent(stop.set)

    def serve() -> int:
        instances = RayInstances(config, orders["scheduler"])
        for number in (signal.SIGTERM, signal.SIGINT):  # after Ray has set its own
            signal.signal(number, lambda *_: stop.set())
        try:
            instances.start(started + _START_SHARE * config.rpc.start_timeout_s, stop)
            child.report_status({"ready": True}, is_last=False)
            instances.watch(stop)
        finally:
            instances.close()
        return 0

    child.exit_after(serve)


if __name__ == "__main__":
    main()
