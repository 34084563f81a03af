"""``python -m hbserve.kv_tiers.mooncake_probe OWN_ADDRESS MASTER``: end with 0 if a client can connect."""

import os
import sys

from mooncake.store import MooncakeDistributedStore

os._exit(bool(MooncakeDistributedStore().setup(sys.argv[1], "P2PHANDSHAKE", 0, 0, "tcp", "", sys.argv[2])))
