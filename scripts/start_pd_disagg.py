"""Start a whole system from one YAML file, or one of its instances.

python scripts/start_pd_disagg.py --config configs/pd_disagg_cpu.yaml
python scripts/start_pd_disagg.py --config configs/pd_disagg_config.yaml --instance-id prefill-0
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
    parser.add_argument("--instance-id", help="start only this instance; the scheduler is started elsewhere")
    parser.add_argument("--port", type=int, help="of the HTTP server, instead of server.port; 0: any free one")
    parser.add_argument("--log-level", choices=["DEBUG", "INFO", "WARNING", "ERROR"], help="instead of logging.level")
    arguments = parser.parse_args()
    if arguments.instance_id is not None and arguments.port is not None:
        parser.error("--port is for the HTTP server, which --instance-id does not start")
    try:
        config = load(arguments.config)
        if arguments.log_level is not None:
            logging = msgspec.structs.replace(config.logging, level=arguments.log_level)
            config = msgspec.structs.replace(config, logging=logging)
        if arguments.instance_id is not None:
            from hbserve.process.child import exit_now
            from hbserve.rpc.instance_line import instance_address
            from hbserve.worker.process import run_instance

            instance = config.instance(arguments.instance_id)
            exit_now(run_instance(config, instance, instance_address(instance, None)))
        from hbserve.server.launch import serve_system

        return serve_system(config, with_instances=True, port=arguments.port)
    except HBServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
