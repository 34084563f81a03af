"""``python -m benchmarks``, in the root of the repository: one sub-command per experiment."""

from __future__ import annotations

import argparse
import signal
import sys

from benchmarks import compare, front, handover, semi_pd, transfer
from hbserve.errors import HBServeError


def main() -> int:
    """Parse the arguments and run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Experiments with HBServe.")
    commands = parser.add_subparsers(dest="command", required=True)
    front.add_arguments(
        commands.add_parser(
            "front", help="what HTTP, tokenizing and detokenizing cost, with an engine that costs nothing"
        )
    )
    compare.add_arguments(
        commands.add_parser("compare", help="the highest rates of several systems, beside the simulator's")
    )
    transfer.add_arguments(
        commands.add_parser("transfer", help="how fast KV moves between two processes, and how fast the library could")
    )
    semi_pd.add_arguments(
        commands.add_parser("semi_pd", help="prefill and decode that share a device: rotations, losses, gaps")
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is ended
    try:
        if arguments.command == "compare":
            compare.run(arguments)
        elif arguments.command == "transfer" and arguments.model is not None:
            handover.run(handover.options_from(arguments))
        elif arguments.command == "transfer":
            transfer.run(transfer.options_from(arguments))
        elif arguments.command == "semi_pd":
            semi_pd.run(arguments)
        else:
            front.run(arguments)
    except HBServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
