"""``python -m hbserve.bench``: one sub-command per kind of benchmark."""

from __future__ import annotations

import argparse
import sys

from hbserve.bench import front, offline
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
    front.add_arguments(
        commands.add_parser(
            "front", help="what HTTP, tokenizing and detokenizing cost, with an engine that costs nothing"
        )
    )
    arguments = parser.parse_args()
    try:
        if arguments.command == "front":
            front.run(arguments)
        else:
            offline.run(OfflineOptions.from_arguments(arguments))
    except HBServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
