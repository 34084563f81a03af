"""``hbserve store``: run a Mooncake Store for the KV blocks of systems, in the foreground.

    hbserve store --config system.yaml
    hbserve store --config system.yaml --kv_cache.store.bytes 68719476736

It starts a master at kv_cache.store.master, if that is an address of this host, and gives it kv_cache.store.bytes of
this host's memory. On other hosts the same command gives memory alone. It starts both again when they end, until
SIGTERM or Ctrl-C. Blocks in this memory outlive the systems that use them. See docs/kv_tiers.md.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence

from hbserve.cli.options import SystemParser, effective_config
from hbserve.config import StoreTierConfig
from hbserve.errors import ConfigError, HBServeError
from hbserve.process import child


def main(arguments: Sequence[str] | None = None, prog: str = "hbserve store") -> int:
    """Parse the arguments and run until a signal; return the exit code."""
    given = SystemParser(prog, __doc__).parse(arguments)
    try:
        config = effective_config(given).config
        store = config.kv_cache.store
        if store is None or store.backend != "mooncake":
            raise ConfigError("kv_cache.store: give {master: host:port, bytes: ...}; hbserve store starts Mooncake")
        child.set_process_title("hbserve-store")
        child.configure_logging(config.logging, "store")
        asyncio.run(_serve(store))
    except HBServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(config: StoreTierConfig) -> None:
    from hbserve.kv_tiers.store_service import StoreService

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    service = StoreService(config)
    where = f"the store at {config.master}" if service.has_master else f"memory for the store at {config.master}"
    await service.run(stop, lambda: print(f"{where} is ready", flush=True))
