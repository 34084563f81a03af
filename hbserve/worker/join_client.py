"""The side of an instance that joins a running system: where it is found, and what it asks of the scheduler."""

from __future__ import annotations

import asyncio
import logging
import socket
import time

import msgspec
import zmq

from hbserve.config import Config, InstanceConfig, from_dict
from hbserve.errors import StartupError
from hbserve.messages.membership import Join, Joined
from hbserve.rpc.cluster_key import ClusterKey

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 10.0
_ASK_AGAIN_S = 1.0


class NobodyThereError(StartupError):
    """No scheduler answers."""


def ask_to_join(scheduler: str, join: Join, key: ClusterKey | None, patience_s: float = 0.0) -> Joined:
    """Ask a scheduler to take an instance; blocks.

    Args:
        scheduler: where it listens for clients.
        key: of the cluster, if there is one.
        patience_s: wait so long for a scheduler that is not there yet, and ask again for so long while the
            instance's name is in use: one that has just died may not have been missed yet.

    Raises:
        StartupError: if it does not answer, or says no.
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
                raise NobodyThereError(f"no scheduler answers at {scheduler}{what}")
            answer = msgspec.msgpack.decode(line.recv(), type=Joined)
            if answer.error is None:
                return answer
            if not answer.is_taken or time.monotonic() > deadline:
                raise StartupError(f"the system at {scheduler} does not take {join.instance_id}: {answer.error}")
            time.sleep(_ASK_AGAIN_S)


class JoinClient:
    """That an instance is one of a system's though its configuration does not have it.

    Args:
        scheduler: where it listens for clients.
        join: with which it has joined, its ``kv_rank`` included.
        key: of the cluster, if there is one.
    """

    def __init__(self, scheduler: str, join: Join, key: ClusterKey | None) -> None:
        self._scheduler, self._join, self._key = scheduler, join, key
        self._is_alone = False

    async def join_again(self) -> None:
        """Join once more: the scheduler has given the instance up, or is another one; does nothing if there is none.

        Raises:
            StartupError: if it says no.
        """
        try:
            await asyncio.to_thread(ask_to_join, self._scheduler, self._join, self._key)
            self._is_alone = False
        except NobodyThereError:
            if not self._is_alone:
                logger.warning("no scheduler at %s; waiting for one", self._scheduler)
            self._is_alone = True


def config_of(answer: Joined, instance: InstanceConfig, model_path: str | None, key_file: str | None) -> Config:
    """The system's configuration as it holds on this host, with the instance in it.

    Args:
        model_path: where the model is here, if not where the scheduler has it.
        key_file: where the cluster's key is here.

    Raises:
        ConfigError: if something of it cannot be honoured here.
    """
    document = {**answer.config, "launcher": "local"}
    document["model"] = {**document["model"], **({} if model_path is None else {"path": model_path})}
    document["rpc"] = {**document["rpc"], "key_file": key_file}
    mine = msgspec.to_builtins(msgspec.structs.replace(instance, kv_rank=answer.kv_rank))
    others = [one for one in document["gpu_instances"] if one["instance_id"] != instance.instance_id]
    return from_dict({**document, "gpu_instances": [*others, mine]})


def host_seen_by(scheduler: str) -> str:
    """The address of this host on the way to the scheduler.

    Raises:
        StartupError: if there is no way.
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
    """A port of this host that nobody listens on now.

    Raises:
        StartupError: if the host's address is not one of this machine's.
    """
    try:
        with socket.create_server((host, 0)) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        raise StartupError(f"cannot listen on {host}: {error}") from None
