"""``python -m hbserve.bench``: one sub-command per kind of benchmark."""

from __future__ import annotations

import argparse
import sys

from hbserve.bench import offline, transfer
from hbserve.bench.offline_options import OfflineOptions, add_arguments
from hbserve.errors import HBServeError


def main() -> int:
    """Parse the arguments and run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hbserve.bench", description="Benchmarks of HBServe.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_arguments(
        commands.add_parser(
            "offline",
            help="throughput of a batch that is there at once, and its share of what the device could do",
        )
    )
    transfer.add_arguments(
        commands.add_parser("transfer", help="how fast KV moves between two processes, and how fast the library could")
    )
    arguments = parser.parse_args()
    try:
        if arguments.command == "transfer":
            transfer.run(transfer.options_from(arguments))
        else:
            offline.run(OfflineOptions.from_arguments(arguments))
    except HBServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
