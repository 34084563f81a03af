"""``hbserve serve``: start a system with its HTTP server, or one part of it, in the foreground.

    hbserve serve MODEL
    hbserve serve MODEL --mode semi_pd --ttft-ms 400 --tpot-ms 40 --port 8080
    hbserve serve --config system.yaml --performance.max_num_seqs 64

The server runs until SIGTERM or Ctrl-C. SIGHUP reads keys, certificates and log level anew. An instance that is started
alone reads its log level.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hbserve.cli.options import SystemParser, effective_config
from hbserve.errors import HBServeError


def main(arguments: Sequence[str] | None = None, prog: str = "hbserve serve") -> int:
    """Parse the arguments and run until a signal; return the exit code."""
    parser = make_parser(prog)
    given = parser.parse(arguments)
    if given.instance_id is not None:
        _refuse_server_flags(parser, given)
    try:
        config = effective_config(given).config
        if given.instance_id is not None:
            from hbserve.process.child import exit_now
            from hbserve.rpc.instance_line import instance_address
            from hbserve.worker.process import run_instance

            instance = config.instance(given.instance_id)
            address = instance_address(instance, None)
            exit_now(run_instance(config, instance, address, read_again=lambda: effective_config(given).config))
        from hbserve.server.launch import serve_system

        return serve_system(
            config, with_instances=not given.no_instances, read_again=lambda: effective_config(given).config
        )
    except HBServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def make_parser(prog: str) -> SystemParser:
    """Return the parser of the command."""
    parser = SystemParser(prog, __doc__)
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--instance-id", help="start only this instance; the scheduler is started elsewhere")
    parts.add_argument(
        "--no-instances",
        action="store_true",
        help="start scheduler and HTTP server; the instances are started elsewhere",
    )
    return parser


def _refuse_server_flags(parser: SystemParser, given: argparse.Namespace) -> None:
    for key, flag in given.flags.items():
        if key.startswith("server."):
            parser.error(f"{flag.name} is for the HTTP server, which --instance-id does not start")
