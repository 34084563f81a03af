"""``hbserve plan``: find the system that serves a load within its targets with the fewest GPUs, by simulation.

hbserve plan 200 --goodput ttft:400,tpot:25 --trace azure.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hbserve.bench.arguments import positive_float, run_command
from hbserve.simulate.__main__ import add_system_arguments, run


def main(arguments: Sequence[str] | None = None, prog: str = "hbserve plan") -> int:
    """Parse the arguments and search; return the exit code."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=positive_float, metavar="RATE", help="requests per second to serve")
    add_system_arguments(parser)
    parser.set_defaults(rate=None, sweep=False)
    return run_command(run, parser.parse_args(arguments))
