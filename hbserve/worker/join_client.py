"""The join client: asks the scheduler of a running system to take this worker, and finds out where it listens."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time

import msgspec
import zmq

from hbserve.config import Config, InstanceConfig, from_dict
from hbserve.errors import ConfigError, StartupError
from hbserve.hints import shown
from hbserve.messages.membership import Join, Joined
from hbserve.model_store import name_of
from hbserve.rpc.cluster_key import ClusterKey

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 10.0
_ASK_AGAIN_S = 1.0


class NoSchedulerError(StartupError):
    """No scheduler answers."""


def ask_to_join(scheduler: str, join: Join, key: ClusterKey | None, patience_s: float = 0.0) -> Joined:
    """Ask a scheduler to take an instance, and return its answer; blocks.

    Args:
        scheduler: where the scheduler listens for clients.
        key: of the cluster, if there is one.
        patience_s: how long to wait for a scheduler that is not there yet, and how long to ask again while the
            instance's name is in use: the scheduler may not have noticed yet that its former holder died.

    Raises:
        StartupError: if the scheduler does not answer, or refuses.
    """
    deadline = time.monotonic() + patience_s
    with zmq.Context() as context, context.socket(zmq.DEALER) as line:
        line.setsockopt(zmq.LINGER, 0)
        if key is not None:
            key.for_connecting(line, scheduler)
        line.connect(scheduler)
        while True:
            line.send(msgspec.msgpack.encode(join))
            if not line.poll(int(1000 * max(ANSWER_TIMEOUT_S, deadline - time.monotonic()))):
                what = "; is it the address of rpc.host and rpc.port, and is the key the cluster's?"
                raise NoSchedulerError(f"no scheduler answers at {scheduler}{what}")
            answer = msgspec.msgpack.decode(line.recv(), type=Joined)
            if answer.error is None:
                return answer
            if not answer.is_taken or time.monotonic() > deadline:
                raise StartupError(f"the system at {scheduler} does not take {join.instance_id}: {answer.error}")
            time.sleep(_ASK_AGAIN_S)


class JoinClient:
    """The client that keeps a worker in a running system whose configuration does not have the worker.

    Args:
        scheduler: where the scheduler listens for clients.
        join: the message with which the worker has joined, with its ``kv_rank``.
        key: of the cluster, if there is one.
    """

    def __init__(self, scheduler: str, join: Join, key: ClusterKey | None) -> None:
        self._scheduler, self._join, self._key = scheduler, join, key
        self._has_no_scheduler = False

    async def join_again(self) -> None:
        """Join again, after the scheduler has given the worker up or was replaced; without a scheduler do nothing.

        Raises:
            StartupError: if the scheduler refuses.
        """
        try:
            await asyncio.to_thread(ask_to_join, self._scheduler, self._join, self._key)
            self._has_no_scheduler = False
        except NoSchedulerError:
            if not self._has_no_scheduler:
                logger.warning("no scheduler at %s; waiting for one", self._scheduler)
            self._has_no_scheduler = True


def config_of(answer: Joined, instance: InstanceConfig, model_path: str | None, key_file: str | None) -> Config:
    """Return the system's configuration as it holds on this host, with the instance in it.

    Args:
        model_path: folder or name of the model on this host; None: the folder of the scheduler's host, if this host
            has it too, else the name with which that host has fetched it.
        key_file: of the cluster's key on this host.

    Raises:
        ConfigError: if this host cannot fulfil a part of it.
    """
    document = {**answer.config, "launcher": "local"}
    model = document["model"]
    if model_path is None:
        model_path = model["path"] if os.path.isdir(model["path"]) else name_of(model["path"])
    if model_path is None:
        what = "which this host does not have; name the model's folder here"
        raise ConfigError(f"--model: the system's model is {shown(model['path'])} on the scheduler's host, {what}")
    document["model"] = {**model, "path": model_path}
    document["rpc"] = {**document["rpc"], "key_file": key_file}
    joined = msgspec.to_builtins(msgspec.structs.replace(instance, kv_rank=answer.kv_rank))
    others = [other for other in document["gpu_instances"] if other["instance_id"] != instance.instance_id]
    return from_dict({**document, "gpu_instances": [*others, joined]})


def host_seen_by(scheduler: str) -> str:
    """Return the address of this host that the scheduler's host can reach.

    Raises:
        StartupError: if there is no route to the scheduler.
    """
    scheme, _, rest = scheduler.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme == "ipc":
        return "127.0.0.1"
    if scheme != "tcp" or not port.isdecimal():
        raise StartupError(f"{scheduler!r} is no address of a scheduler; it looks like tcp://host:port")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise StartupError(f"{host} cannot be reached: {error}") from None


def free_port(host: str) -> int:
    """Return a port of this host that is free now.

    Raises:
        StartupError: if ``host`` is not an address of this machine.
    """
    try:
        with socket.create_server((host, 0)) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        raise StartupError(f"cannot listen on {host}: {error}") from None
