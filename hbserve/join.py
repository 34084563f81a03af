"""Start an instance that joins a running system. The system's configuration need not have the instance.

    python -m hbserve.join tcp://scheduler-host:50050 --role decode --key-file /etc/hbserve/cluster.key

The scheduler must listen on TCP (``rpc.host``, ``rpc.port``). It tells the instance the system's model, sizes and KV
backend. The instance gets requests as soon as it is ready. At SIGTERM or Ctrl-C it finishes its requests and leaves; at
a second signal it leaves at once.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from hbserve.config import InstanceConfig, InstanceRole
from hbserve.errors import HBServeError
from hbserve.messages.membership import Join
from hbserve.process.child import exit_now, report_status
from hbserve.rpc.cluster_key import ClusterKey
from hbserve.worker.join_client import JoinClient, ask_to_join, config_of, free_port, host_seen_by


def main(arguments: Sequence[str] | None = None, prog: str = "python -m hbserve.join") -> int:
    """Parse the arguments and run until the instance ends; return the exit code."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scheduler", help="where the scheduler listens: tcp://host:port")
    parser.add_argument("--role", required=True, choices=["prefill", "decode", "unified"])
    parser.add_argument("--instance-id", help="its name; default: made of role, host and process id")
    parser.add_argument("--key-file", help="the cluster's key, if the system has one")
    parser.add_argument("--model", help="the model here; default: as on the scheduler's host, or fetched again")
    parser.add_argument("--gpu-id", type=int, default=0, help="its first GPU")
    parser.add_argument("--tensor-parallel-size", type=int, help="its ranks; default: the system's")
    parser.add_argument("--num-threads", type=int, help="threads of each rank, on CPU")
    parser.add_argument("--host", help="address to listen on; default: the one that the scheduler can reach")
    parser.add_argument("--port", type=int, help="port to listen on; default: any free one")
    parser.add_argument("--kv-ip", help="address for KV transfers; default: that of --host")
    parser.add_argument("--patience-s", type=float, default=0.0, help="how long to wait for scheduler or name")
    parsed = parser.parse_args(arguments)
    try:
        exit_now(_join(parsed))
    except HBServeError as error:
        report_status({"error": str(error)})
        print(f"error: {error}", file=sys.stderr)
        return 1


def _join(arguments: argparse.Namespace) -> int:
    role = InstanceRole(arguments.role)
    host = arguments.host or host_seen_by(arguments.scheduler)
    instance = InstanceConfig(
        instance_id=arguments.instance_id or f"{role}-{socket.gethostname().partition('.')[0]}-{os.getpid()}",
        instance_type=role,
        gpu_id=arguments.gpu_id,
        host=host,
        port=arguments.port or free_port(host),
        kv_ip=arguments.kv_ip,
        num_threads=arguments.num_threads,
        tensor_parallel_size=arguments.tensor_parallel_size,
    )
    key_file = None if arguments.key_file is None else str(Path(arguments.key_file).expanduser().resolve())
    key = None if key_file is None else ClusterKey.load(key_file)
    address = f"tcp://{instance.host}:{instance.port}"
    join = Join(
        instance_id=instance.instance_id,
        role=role,
        address=address,
        kv_rank=None,
        num_ranks=instance.tensor_parallel_size,
    )
    answer = ask_to_join(arguments.scheduler, join, key, arguments.patience_s)
    config = config_of(answer, instance, arguments.model, key_file)
    joined = config.instance(instance.instance_id)
    join_client = JoinClient(arguments.scheduler, msgspec.structs.replace(join, kv_rank=joined.kv_rank), key)

    from hbserve.worker.process import run_instance  # imports torch, after the scheduler has answered

    return run_instance(config, joined, address, join_client)


if __name__ == "__main__":
    sys.exit(main())
