"""Start the CPU scheduler and the HTTP server of a system whose instances are started elsewhere.

    python scripts/start_cpu_scheduler.py --config configs/pd_disagg_config.yaml

Instances and scheduler may start in any order.
"""

from __future__ import annotations

import argparse
import sys

from hbserve.config.options import add_options, load_with_options
from hbserve.errors import HBServeError


def main() -> int:
    """Parse the arguments and run until SIGTERM or Ctrl-C; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    arguments = parser.parse_args()
    try:
        config = load_with_options(arguments)
        from hbserve.server.launch import serve_system

        return serve_system(config, with_instances=False, read_again=lambda: load_with_options(arguments))
    except HBServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
