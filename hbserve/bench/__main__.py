"""``python -m hbserve.bench``: one sub-command per kind of benchmark."""

from __future__ import annotations

import argparse
import signal
import sys

from hbserve.bench import compare, front, handover, offline, semi_pd, serve, serve_options, transfer
from hbserve.bench.offline_options import OfflineOptions, add_arguments
from hbserve.errors import HBServeError
from hbserve.simulate import command as simulate


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
    serve_options.add_arguments(
        commands.add_parser(
            "serve", help="latency under open-loop load, and the highest rate at which latency targets are kept"
        )
    )
    front.add_arguments(
        commands.add_parser(
            "front", help="what HTTP, tokenizing and detokenizing cost, with an engine that costs nothing"
        )
    )
    simulate.add_arguments(
        commands.add_parser("simulate", help="the same load on a simulated clock, for any number of GPUs")
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
        if arguments.command == "offline":
            offline.run(OfflineOptions.from_arguments(arguments))
        elif arguments.command == "serve":
            serve.run(serve_options.ServeOptions.from_arguments(arguments))
        elif arguments.command == "simulate":
            simulate.run(arguments)
        elif arguments.command == "compare":
            compare.run(arguments)
        elif arguments.command == "transfer":
            if arguments.model is not None:
                handover.run(handover.options_from(arguments))
            else:
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
