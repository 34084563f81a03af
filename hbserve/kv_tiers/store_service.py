"""``hbserve store``: starts a Mooncake master and memory for it, and starts them again when they end.

Runs in a process of its own, in one event loop::

    StoreService ── mooncake_master    which blocks are there, and where; only if its address is this host's
                 └─ mooncake_client    kv_cache.store.bytes of memory; also on hosts whose master is another one

Both are binaries of the wheel. They end with this process, however it ends. They have no secrets on their command
lines, because Mooncake has none.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
from collections.abc import Callable

from hbserve.config import StoreTierConfig
from hbserve.errors import StartupError
from hbserve.kv_tiers.mooncake_library import binary, check_answers, local_address
from hbserve.process.parent import RestartBudget

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 5.0
_POLL_S = 0.05
_CLIENT_TTL_S = 5
"""Time after which the master forgets memory whose process has ended. Until then it sends some blocks there."""
_MIN_BYTES = 16 << 20
_MAX_RESTARTS = 10
"""Within ten minutes, of each part."""
_PR_SET_PDEATHSIG = 1


class StoreService:
    """The parts of the store on this host.

    Args:
        config: ``kv_cache.store``, with backend ``mooncake``.

    Raises:
        StartupError: if the master's address is taken, or the library is missing.
    """

    def __init__(self, config: StoreTierConfig) -> None:
        host, port = config.address
        address = local_address(config)
        _check_memory(config.bytes)
        self._parts = []
        self.has_master = _is_here(host, port)
        if self.has_master:
            master = [binary("mooncake_master"), f"--rpc_address={host}", f"--rpc_port={port}"]
            master += ["--metrics_host=127.0.0.1", "--metrics_port=0", "--enable_metric_reporting=false"]
            master += [f"--client_ttl={_CLIENT_TTL_S}", *_LOGGING]
            self._parts.append(_Part(f"the master at {config.master}", master, host, port))
        memory = [binary("mooncake_client"), f"--host={address}", "--port={port}", "--metadata_server=P2PHANDSHAKE"]
        memory += [f"--master_server_address={config.master}", f"--global_segment_size={config.bytes}"]
        memory += ["--protocol=tcp", *_LOGGING]
        self._parts.append(_Part(f"memory of {config.bytes} bytes", memory, address))
        self._config = config

    async def run(self, stop: asyncio.Event, on_ready: Callable[[], object] = lambda: None) -> None:
        """Run until ``stop`` is set.

        Raises:
            HBServeError: if a part does not start, or ends too often, or there is no master elsewhere.
        """
        if not self.has_master:
            check_answers(self._config)
        tasks = [asyncio.create_task(_wait(stop))]
        try:
            for part in self._parts:
                await part.start()
            tasks += [asyncio.create_task(part.keep_up()) for part in self._parts]
            on_ready()
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for part in reversed(self._parts):
                await part.end()


_LOGGING = ("--logtostderr=true", "--minloglevel=2")


class _Part:
    """One process, started again when it ends.

    Args:
        command: with ``{port}`` where the port stands.
        host, port: where it answers when it can be used; 0: at any free port, another one at each start.
    """

    def __init__(self, name: str, command: list[str], host: str, port: int = 0) -> None:
        self._name, self._command = name, command
        self._host, self._port = host, port
        self._budget = RestartBudget(_MAX_RESTARTS)
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "MC_LOG_DIR"}
        port = self._port or _free_port(self._host)
        self._process = process = await asyncio.create_subprocess_exec(
            *[word.replace("{port}", str(port)) for word in self._command],
            stdin=asyncio.subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which ends its parts in order
            preexec_fn=_end_with_parent,
        )
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _START_TIMEOUT_S
        await asyncio.sleep(_POLL_S)
        while process.returncode is None and not _answers(self._host, port):
            if loop.time() > deadline:
                await self.end()
                raise StartupError(f"{self._name} does not answer within {_START_TIMEOUT_S:g} s")
            await asyncio.sleep(_POLL_S)
        if process.returncode is not None:
            raise StartupError(f"{self._name} {_how(process.returncode)} at its start; its log is above")
        logger.info("%s: started, process %d", self._name, process.pid)

    async def keep_up(self) -> None:
        """Start the process again whenever it ends."""
        while True:
            assert self._process is not None
            code = await self._process.wait()
            if not self._budget.take():
                raise StartupError(f"{self._name} {_how(code)}, {_MAX_RESTARTS} times within ten minutes")
            logger.warning("%s %s; starting it again", self._name, _how(code))
            await asyncio.sleep(self._budget.delay_s)
            with contextlib.suppress(StartupError):  # it has ended again, which counts
                await self.start()

    async def end(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
                return


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _answers(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), 1.0):
        return True
    return False


def _free_port(host: str) -> int:
    family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind(address)
        port: int = probe.getsockname()[1]
        return port


def _check_memory(num_bytes: int) -> None:
    if num_bytes < _MIN_BYTES:
        raise StartupError(f"kv_cache.store.bytes: Mooncake gives no less than {_MIN_BYTES} bytes, got {num_bytes}")
    with open("/proc/meminfo", encoding="ascii") as file:
        [available] = [1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:")]
    if num_bytes > available:
        raise StartupError(f"kv_cache.store.bytes: this host has {available} bytes available, not {num_bytes}")


def _is_here(host: str, port: int) -> bool:
    """Whether an address is one of this host's.

    Raises:
        StartupError: if it is, and taken.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address[0], 0))
        except OSError:
            return False
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            hint = "; if a master runs there already, no second one is needed"
            raise StartupError(f"kv_cache.store.master: {host}:{port}: {error.strerror}{hint}") from None
    return True


_libc = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """Have the kernel end this process when its parent ends; between fork and exec."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
