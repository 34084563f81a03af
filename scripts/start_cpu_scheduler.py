"""Start the CPU scheduler and the HTTP server of a system whose instances are started elsewhere.

    python scripts/start_cpu_scheduler.py --config configs/pd_disagg_config.yaml

Instances and scheduler may start in any order. This is the same as ``hbserve serve --no-instances``.
"""

import sys

from hbserve.cli.serve import main

if __name__ == "__main__":
    sys.exit(main(["--no-instances", *sys.argv[1:]], "start_cpu_scheduler.py"))
