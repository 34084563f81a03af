"""Start of a whole system with its HTTP server in the foreground, for the start scripts.

The calling process becomes the API server (``hbserve-api``). `DisaggregatedLLM` starts the other processes. What takes
long to import, and is not needed for that, is imported while they start.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import signal
import ssl
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from hbserve.cache_folder.transformers_import import leave_out_torch
from hbserve.config import Config, ServerConfig
from hbserve.config.limits import is_loopback
from hbserve.errors import ConfigError, HBServeError, ShuttingDownError
from hbserve.model_store import with_model_folder
from hbserve.process import child, event_loop, exit_core
from hbserve.process.events import BugEvents, OnEvent, bugs, log_event
from hbserve.process.stopwatch import Start, Stopwatch, process_start, table
from hbserve.server.fair_gate import FairGate
from hbserve.server.keys import Keys, refuse_public
from hbserve.server.serve import bind, serve
from hbserve.system.disaggregated_llm import DisaggregatedLLM
from hbserve.tokenizer import Tokenizer

if TYPE_CHECKING:
    from hbserve.server.guard import Guard

logger = logging.getLogger(__name__)

EXIT_PART_LOST = 1
"""Exit code of a server whose scheduler, or one of whose text processes, has ended for good."""
_WATCH_INTERVAL_S = 0.2
_QUIET_SAMPLES = 256
"""Open samples with which a full garbage collection is short."""


def serve_system(config: Config, with_instances: bool, read_again: Callable[[], Config] | None = None) -> int:
    """Start all processes, serve HTTP until SIGTERM or SIGINT, and end all processes; return the exit code.

    Args:
        with_instances: False if the instances are started elsewhere.
        read_again: reads the configuration anew, at SIGHUP; default: ``config`` stays.

    Raises:
        HBServeError: if the system cannot start.
    """
    stopwatch = Stopwatch(process_start())
    stopwatch.lap("imports")
    config = with_model_folder(config)
    stopwatch.lap("model")
    child.set_process_title("hbserve-api")
    child.raise_descriptor_limit()
    child.configure_logging(config.logging, "api")
    return event_loop.run(_serve(config, with_instances, read_again or (lambda: config), stopwatch))


def _load_tokenizer(folder: str, model_folder: str) -> Tokenizer:
    """Load the tokenizer, and import the application; in a thread, while the other processes start."""
    leave_out_torch()
    importlib.import_module("hbserve.server.live_page")
    importlib.import_module("hbserve.server.guard")
    return Tokenizer(folder, model_folder)


class _Reload:
    """The settings that SIGHUP reads again: API keys, certificates, and the log level of all processes on this host.

    All of them are read before one changes. If one cannot be used, the log says why, and all stay as they were.

    Attributes:
        keys: the present keys.
        guard, tls, on_event: set once the server serves.
    """

    def __init__(self, config: Config, read_again: Callable[[], Config]) -> None:
        self._read_again = read_again
        self.on_event: OnEvent = log_event
        self.keys = Keys.load(config.server)
        self.guard: Guard | None = None
        self.tls: ssl.SSLContext | None = None

    def set_tls(self, context: ssl.SSLContext) -> None:
        """Take the context of the server's connections."""
        self.tls = context

    def on_signal(self) -> None:
        """Read everything anew."""
        try:
            config = self._read_again()
            keys, tls = Keys.load(config.server), _tls_files(config.server)
        except HBServeError as error:
            self.on_event("reload_failed", "the API server", f"SIGHUP changes nothing: {error}")
            return
        self.keys = keys
        if self.guard is not None:
            self.guard.keys = keys
        if self.tls is not None and tls is not None:
            self.tls.load_cert_chain(*tls)
        child.set_log_level(config.logging.level)
        logger.info("SIGHUP: read keys, certificates and log level anew")


async def _serve(config: Config, with_instances: bool, read_again: Callable[[], Config], stopwatch: Stopwatch) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    reload = _Reload(config, read_again)
    loop.add_signal_handler(signal.SIGHUP, reload.on_signal)
    tls = _tls_files(config.server)
    listener = bind(config.server)
    if not is_loopback(config.server.host) and not reload.keys.are_required:
        logger.warning("other hosts can reach %s, and no API key is set (server.api_keys_file)", config.server.host)
    llm = DisaggregatedLLM(config, with_instances, text_in_processes=True, load_tokenizer=_load_tokenizer)
    reload.on_event = llm.report_event
    bug_events = BugEvents(llm.report_event)
    bugs.addHandler(bug_events)
    starting = asyncio.create_task(llm.start())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([starting, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():  # a signal came during the start
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return 0
        await starting
        stopwatch.lap("processes")
        from hbserve.server import live_page  # `_load_tokenizer` has imported them
        from hbserve.server.app import create_app
        from hbserve.server.guard import Guard

        server = config.server
        gate = FairGate(
            max_open=server.max_open_requests,
            max_waiting=config.performance.max_waiting_requests,
            max_per_key=server.max_requests_per_key,
            rate_per_minute=server.requests_per_minute_per_key,
        )
        app = create_app(llm.engine, llm.client, config.served_name, server, llm.supervisors, llm.running_plan)
        live_page.install(app, llm.config, llm.running_plan, llm.engine, llm.client, gate, llm.text_processes, stop)

        def on_listening(actual_port: int) -> None:
            child.freeze_heap()
            exit_core.keep_off()
            stopwatch.lap("http")
            own = Start("the API server", stopwatch.began, time.monotonic(), stopwatch.parts)
            for line in table([own, *llm.latest_starts], stopwatch.began):
                logger.debug("%s", line)
            # The only line on standard output: for people, and for programs that start the server.
            scheme = "http" if tls is None else "https"
            print(f"HBServe is ready: {scheme}://{server.host}:{actual_port} (model {config.served_name})", flush=True)

        def hand_back() -> None:
            llm.engine.end_all(
                ShuttingDownError("the server is shutting down, and this request was not finished in time")
            )

        guard = reload.guard = Guard(app, server, reload.keys, gate, stop)
        watching = asyncio.create_task(_watch_parts(llm, stop))
        engine = llm.engine
        collecting = asyncio.create_task(child.collect_when_quiet(lambda: engine.num_open_samples <= _QUIET_SAMPLES))
        await serve(
            *(guard, listener, stop, on_listening, server.drain_timeout_s, hand_back),
            tls=tls,
            on_tls=reload.set_tls,
            on_event=llm.report_event,
        )
        watching.cancel()
        collecting.cancel()
        return EXIT_PART_LOST if watching.done() else 0
    finally:
        stopped.cancel()
        bugs.removeHandler(bug_events)
        await llm.stop()
        listener.close()


async def _watch_parts(llm: DisaggregatedLLM, stop: asyncio.Event) -> None:
    """Return when a part without which nothing is served has ended for good, and end the server then."""
    while (dead := llm.client.dead or llm.engine.text.dead) is None:  # noqa: ASYNC110 - several parts, no event
        await asyncio.sleep(_WATCH_INTERVAL_S)
    logger.error("the server ends: %s", dead)
    stop.set()


def _tls_files(config: ServerConfig) -> tuple[str, str] | None:
    cert, key = config.tls_cert_file, config.tls_key_file
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ConfigError("server.tls_cert_file and server.tls_key_file must be set together", "server.tls_key_file")
    refuse_public(key, "server.tls_key_file")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        message = f"server.tls_cert_file: cannot use {cert} with {key}: {error}"
        raise ConfigError(message, "server.tls_cert_file") from None
    return cert, key
