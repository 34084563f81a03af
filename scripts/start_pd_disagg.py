"""Start a whole system from one YAML file, or one of its instances: the same as ``hbserve serve``.

python scripts/start_pd_disagg.py --config configs/pd_disagg_cpu.yaml
python scripts/start_pd_disagg.py --config configs/pd_disagg_config.yaml --instance-id prefill-0
"""

import sys

from hbserve.cli.serve import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "start_pd_disagg.py"))
