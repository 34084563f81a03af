"""Start the CPU scheduler and the HTTP server of a system whose instances are started elsewhere.

    python scripts/start_cpu_scheduler.py --config configs/pd_disagg_config.yaml

Instances and scheduler may start in any order.
"""

from __future__ import annotations

import argparse
import sys

import msgspec

from hbserve.config import load
from hbserve.errors import HBServeError


def main() -> int:
    """Parse the arguments and run until SIGTERM or Ctrl-C; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the system")
    parser.add_argument("--port", type=int, help="of the HTTP server, instead of server.port; 0: any free one")
    parser.add_argument("--log-level", choices=["DEBUG", "INFO", "WARNING", "ERROR"], help="instead of logging.level")
    arguments = parser.parse_args()
    try:
        config = load(arguments.config)
        if arguments.log_level is not None:
            logging = msgspec.structs.replace(config.logging, level=arguments.log_level)
            config = msgspec.structs.replace(config, logging=logging)
        from hbserve.server.launch import serve_system

        return serve_system(config, with_instances=False, port=arguments.port)
    except HBServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
