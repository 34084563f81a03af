"""A system and its HTTP server in the foreground: what the start scripts run."""

from __future__ import annotations

import asyncio
import logging
import signal

import msgspec

from hbserve import event_loop
from hbserve.config import Config
from hbserve.errors import ConfigError
from hbserve.pd_disagg import child
from hbserve.pd_disagg.disaggregated_llm import DisaggregatedLLM
from hbserve.server.app import create_app
from hbserve.server.serve import bind, serve

logger = logging.getLogger(__name__)


def serve_system(config: Config, with_instances: bool, port: int | None = None) -> int:
    """Start everything, serve HTTP until SIGTERM or SIGINT, end everything; returns the exit code.

    Args:
        with_instances: False where instances are started elsewhere.
        port: instead of ``server.port``.

    Raises:
        HBServeError: if the system cannot start.
    """
    if port is not None:
        if not 0 <= port <= 65535:
            raise ConfigError(f"--port must be in 0..65535, got {port}", "server.port")
        config = msgspec.structs.replace(config, server=msgspec.structs.replace(config.server, port=port))
    child.set_process_title("hbserve-api")
    child.configure_logging(config.logging.level, "api")
    return event_loop.run(_serve(config, with_instances))


async def _serve(config: Config, with_instances: bool) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    listener = bind(config.server)
    llm = DisaggregatedLLM(config, with_instances, text_in_processes=True)
    starting = asyncio.create_task(llm.start())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([starting, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():  # told to stop while starting
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return 0
        await starting
        app = create_app(llm.engine, llm.client, config.served_name)

        def on_listening(actual_port: int) -> None:
            # For people and for programs that start us: the one line on standard output.
            print(
                f"HBServe is ready: http://{config.server.host}:{actual_port} (model {config.served_name})", flush=True
            )

        await serve(app, listener, stop, on_listening)
        return 0
    finally:
        stopped.cancel()
        await llm.stop()
        listener.close()
