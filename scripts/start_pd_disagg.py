"""Start a whole system from one YAML file, or one of its instances.

python scripts/start_pd_disagg.py --config configs/pd_disagg_cpu.yaml
python scripts/start_pd_disagg.py --config configs/pd_disagg_config.yaml --instance-id prefill-0
"""

from __future__ import annotations

import argparse
import sys

from hbserve.config.options import add_options, load_with_options, refuse_server_options
from hbserve.errors import HBServeError


def main() -> int:
    """Parse the arguments and run until SIGTERM or Ctrl-C; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--instance-id", help="start only this instance; the scheduler is started elsewhere")
    arguments = parser.parse_args()
    if arguments.instance_id is not None:
        refuse_server_options(parser, arguments)
    try:
        config = load_with_options(arguments)
        if arguments.instance_id is not None:
            from hbserve.process.child import exit_now
            from hbserve.rpc.instance_line import instance_address
            from hbserve.worker.process import run_instance

            instance = config.instance(arguments.instance_id)
            exit_now(run_instance(config, instance, instance_address(instance, None)))
        from hbserve.server.launch import serve_system

        return serve_system(config, with_instances=True, read_again=lambda: load_with_options(arguments))
    except HBServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
