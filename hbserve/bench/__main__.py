"""``python -m hbserve.bench``: one sub-command per kind of benchmark."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from hbserve.bench import offline, serve, serve_options
from hbserve.bench.arguments import run_command


def main(arguments: Sequence[str] | None = None, prog: str = "python -m hbserve.bench") -> int:
    """Parse the arguments and run; return the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description="Benchmarks of HBServe.")
    commands = parser.add_subparsers(dest="command", required=True)
    offline.add_arguments(
        commands.add_parser(
            "offline", help="throughput of a batch that is there at once, and its share of the device's limit"
        )
    )
    serve_options.add_arguments(
        commands.add_parser(
            "serve", help="latency under open-loop load, and the highest rate at which latency targets are kept"
        )
    )
    parsed = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that started processes are ended
    return run_command(_run, parsed)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.command == "offline":
        offline.run(offline.OfflineOptions.from_arguments(arguments))
    else:
        serve.run(serve_options.ServeOptions.from_arguments(arguments))


if __name__ == "__main__":
    sys.exit(main())
