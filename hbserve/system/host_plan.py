"""Plan of instances and hosts, for `scripts/run_multi_node.sh`.

    python -m hbserve.system.host_plan FILE

prints one line for each instance: host, ``here`` or ``there``, and name, separated by tabs.
"""

from __future__ import annotations

import socket
import sys

from hbserve.config import Config, load
from hbserve.config.limits import is_loopback
from hbserve.errors import HBServeError
from hbserve.rpc.instance_line import instance_address


def is_this_host(host: str) -> bool:
    """Whether a host's address belongs to this machine: only then can a socket be bound to it."""
    if is_loopback(host) or host == socket.gethostname():
        return True
    try:
        address = socket.getaddrinfo(host, 0, socket.AF_INET, socket.SOCK_STREAM)[0][4]
        with socket.socket() as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def host_plan(config: Config) -> list[tuple[str, str, str]]:
    """Return host, ``here`` or ``there``, and name of every instance.

    Raises:
        StartupError: if an instance has no address at which the scheduler can find it.
    """
    for instance in config.gpu_instances:
        instance_address(instance, None)
    return [(i.host, "here" if is_this_host(i.host) else "there", i.instance_id) for i in config.gpu_instances]


def main() -> int:
    """Entry point of ``python -m``; returns the exit code."""
    try:
        for line in host_plan(load(sys.argv[1])):
            print("\t".join(line))
    except HBServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
