"""KV transfer by the Mooncake Transfer Engine: one-sided writes over TCP, RDMA, or NVLink inside a host.

Each receive window is an engine of its own that has the arena registered. To close the window, the receiver ends the
engine: this cuts its connections and unregisters the memory, whatever the sender does. It takes about a second in which
no Python runs in the process, and happens only when a link has failed. Over NVLink it is not enough, because the sender
has the arena mapped by CUDA IPC: see `leases`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import json
import math
import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hbserve.errors import ConfigError, KVTransferError, StartupError
from hbserve.kv_transfer.base import KVTransferContext
from hbserve.kv_transfer.one_sided.base import OneSidedKVTransfer
from hbserve.kv_transfer.one_sided.leases import MappingLeases
from hbserve.messages.transfer import LinkKey, Peer
from hbserve.platform.remote_arena import ByteRun

NUM_PORTS = 1000
CONFIG_PATH_VARIABLE = "MOONCAKE_CONFIG_PATH"
_HANDSHAKE = "P2PHANDSHAKE"  # no metadata service: two engines exchange their metadata
_PROTOCOLS = ("tcp", "rdma", "nvlink")
_MAX_RUNS = 128  # in one call; thousands fail
_LOG_LEVEL_VARIABLE = "MC_LOG_LEVEL"
_LOG_LEVEL = "ERROR"
_FATAL = 3  # among glog's levels
_log_lock = threading.Lock()
_NEVER_SET = {
    "MC_TRANSFER_TIMEOUT": "the engine gives up on a transfer, but its bytes may arrive later",
    "MC_LOG_DIR": "with it the engine ends the process",
}


@dataclass(frozen=True)
class MooncakeSettings:
    """Settings of the engines.

    Attributes:
        protocol: one of ``tcp``, ``rdma``, ``nvlink``; None leaves it to the environment (``MC_*``).
        device_name: RDMA adapters, comma-separated; empty: all.
        host: address of the engines; None: the instance's.
    """

    protocol: str | None = None
    device_name: str = ""
    host: str | None = None

    @staticmethod
    def load(protocol: str | None, device_name: str | None) -> MooncakeSettings:
        """Load the configuration's settings, and missing ones from the file that ``MOONCAKE_CONFIG_PATH`` names.

        Raises:
            ConfigError: naming the file and the key that cannot be honoured.
        """
        document: dict[str, Any] = {}
        path = os.environ.get(CONFIG_PATH_VARIABLE)
        if path:
            try:
                document = json.loads(Path(path).expanduser().read_text())
            except (OSError, ValueError) as error:
                raise ConfigError(f"{CONFIG_PATH_VARIABLE}: cannot read {path}: {error}") from None
            if not isinstance(document, dict):
                raise ConfigError(f"{CONFIG_PATH_VARIABLE}: {path} does not hold a JSON object")
            valid = {"local_hostname", "metadata_server", "protocol", "device_name"}
            for key in document:
                if key not in valid:
                    raise ConfigError(f"{path}: unknown key {key!r}; valid are: {', '.join(sorted(valid))}")
            if document.get("metadata_server", _HANDSHAKE) != _HANDSHAKE:
                raise ConfigError(f"{path}: metadata_server must be {_HANDSHAKE!r}: instances find each other by it")
        protocol = protocol or document.get("protocol")
        if protocol is not None and protocol not in _PROTOCOLS:
            raise ConfigError(f"{path}: protocol must be one of {', '.join(_PROTOCOLS)}, got {protocol!r}")
        return MooncakeSettings(
            protocol, device_name or document.get("device_name", ""), document.get("local_hostname") or None
        )

    def prepare_environment(self, timeout_s: float, first_port: int | None) -> None:
        """Set the variables that the library reads when it is imported and when an engine is made.

        Args:
            first_port: first of the ``NUM_PORTS`` ports from which engines choose.

        Raises:
            StartupError: if a variable is set that makes transfers unsafe.
        """
        for name, why in _NEVER_SET.items():
            if name in os.environ:
                raise StartupError(f"kv_transfer.backend mooncake: unset {name}: {why}")
        os.environ.setdefault(_LOG_LEVEL_VARIABLE, _LOG_LEVEL)
        for name in ("MC_TCP_PROGRESS_TIMEOUT_SEC", "MC_TCP_STATUS_TIMEOUT_SEC"):
            os.environ.setdefault(name, str(math.ceil(timeout_s)))
        if first_port is not None:
            os.environ.setdefault("MC_MIN_RPC_PORT", str(first_port))
            os.environ.setdefault("MC_MAX_RPC_PORT", str(min(first_port + NUM_PORTS - 1, 65535)))
        if self.protocol is not None:  # builds for GPUs obey these, not their protocol argument
            for name, wanted in (("MC_FORCE_TCP", "tcp"), ("MC_INTRANODE_NVLINK", "nvlink")):
                if self.protocol == wanted:
                    os.environ[name] = "1"
                else:
                    os.environ.pop(name, None)


def quiet_log(library: Any) -> None:
    """Log only what is fatal from now on, in all of Mooncake's libraries of this process.

    With ``MC_LOG_LEVEL`` set to another level, all lines appear.
    """
    os.environ.setdefault(_LOG_LEVEL_VARIABLE, _LOG_LEVEL)
    level = _log_level(library)
    if level is not None:
        with _log_lock:
            level.value = _FATAL


def _log_level(library: Any) -> ctypes.c_int | None:
    """Return the log level of the process; None: the user has chosen it, or the build has none."""
    if os.environ.get(_LOG_LEVEL_VARIABLE) == _LOG_LEVEL:
        with contextlib.suppress(OSError, ValueError):  # a build without glog's symbol
            return ctypes.c_int.in_dll(ctypes.CDLL(library.__file__), "_ZN3fLI17FLAGS_minloglevelE")
    return None


@contextlib.contextmanager
def _without_log(library: Any) -> Iterator[None]:
    """Keep an engine's start from logging errors: a good one logs that its own metadata are not there yet.

    With ``MC_LOG_LEVEL`` set to another level, all lines appear. The engine has one log level for the whole process.
    """
    level = _log_level(library)
    if level is None:
        yield
        return
    with _log_lock:
        before, level.value = level.value, _FATAL
        try:
            yield
        finally:
            level.value = before


class MooncakeKVTransfer(OneSidedKVTransfer):
    """The ``mooncake`` backend of the configuration."""

    def __init__(self, context: KVTransferContext, kv_blocks: torch.Tensor) -> None:
        super().__init__(context, kv_blocks)
        self._settings = MooncakeSettings.load(context.mooncake_protocol, context.mooncake_device)
        self._host = context.host if context.host_is_given else self._settings.host or context.host
        self._windows: dict[tuple[LinkKey, ...], Any] = {}
        self._outbound: Any = None
        self._leases: MappingLeases | None = None
        self._mapping: dict[LinkKey, Any] = {}  # engines that have one receiver's arena mapped
        self._thread = threading.local()

    @property
    def writes_end_soon(self) -> bool:  # type: ignore[override]
        """Whether writes are copies over NVLink; others to a stopped peer last until the library's time limits."""
        return self._leases is not None

    @property
    def endpoint(self) -> str:
        """Endpoint of the leases, over NVLink; else empty."""
        return "" if self._leases is None else self._leases.endpoint

    async def start(self) -> None:
        """Make the engine that sends, or over NVLink the leases.

        Raises:
            StartupError: if the library or its transport is missing.
        """
        if self._settings.protocol == "nvlink" and not self.kv_blocks.is_cuda:
            raise StartupError("kv_transfer.mooncake_protocol nvlink: the KV cache is not on a GPU; use tcp")
        base_port = None if self.context.port is None else self.context.port - self.context.rank
        self._settings.prepare_environment(self.context.timeout_s, base_port)
        if "MC_INTRANODE_NVLINK" in os.environ and "MC_FORCE_TCP" not in os.environ:
            self._leases = MappingLeases("mooncake", self.context)
            await self._leases.start()
        else:
            self._outbound = await asyncio.to_thread(self._make_engine)

    def _make_engine(self) -> Any:
        """Make an engine that has the arena registered."""
        try:
            library = importlib.import_module("mooncake.engine")
        except ImportError as error:
            raise StartupError(
                f"kv_transfer.backend mooncake: {error}; install mooncake-transfer-engine-cuda13 (with a GPU) or "
                "mooncake-transfer-engine-non-cuda, and Debian's libibverbs1"
            ) from None
        self._enter_device()
        engine = library.TransferEngine()
        protocol = "rdma" if self._settings.protocol == "rdma" else "tcp"
        with _without_log(library):
            code = engine.initialize(self._host, _HANDSHAKE, protocol, self._settings.device_name)
        if code != 0:
            what = f"no engine at {self._host} over {protocol} (code {code}); MC_LOG_LEVEL=INFO tells why"
            raise StartupError(f"kv_transfer.backend mooncake: {what}")
        self._register(engine, self.kv_blocks)
        return engine

    def _register(self, engine: Any, memory: torch.Tensor) -> None:
        code = engine.register_memory(memory.data_ptr(), memory.nbytes)
        if code != 0:
            variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MC_")]
            raise StartupError(
                f"kv_transfer.backend mooncake: cannot register {memory.nbytes} bytes of {memory.device} memory at "
                f"{memory.data_ptr():#x} (code {code}; {' '.join(variables)}); MC_LOG_LEVEL=INFO tells why"
            )

    def _enter_device(self) -> None:
        """Make the device's CUDA context current in this thread: the library uses it by the driver and never sets it.

        To set the device is not enough: this does nothing in a thread that has the right device already.
        """
        if self.kv_blocks.is_cuda and not hasattr(self._thread, "has_context"):
            torch.cuda.set_device(self.kv_blocks.device)
            torch.zeros(1, device=self.kv_blocks.device)  # a launch makes it current
            self._thread.has_context = True

    async def open_receive_window(self, sources: list[Peer]) -> str:
        """Return ``session address``: address of the window's engine, and of the arena in this process."""
        if self._leases is not None:
            await self._leases.open_leases(sources)
        engine = await asyncio.to_thread(self._make_engine)
        self._windows[_link(sources)] = engine
        return f"{self._host}:{engine.get_rpc_port()} {self.kv_blocks.data_ptr()}"

    async def close_receive_window(self, sources: list[Peer], senders_done: bool) -> None:
        engines = {0: self._windows.pop(_link(sources), None)}
        await asyncio.to_thread(self._end, engines)
        if self._leases is not None:
            await self._leases.wait_until_over(sources, senders_done)

    def _engine_to(self, target: Peer) -> Any:
        """Return the engine for a target: one for all, but over NVLink one for each, because a mapping ends with its
        engine."""
        if self._leases is None:
            return self._outbound
        if target.link_key not in self._mapping:
            self._mapping[target.link_key] = self._make_engine()
        return self._mapping[target.link_key]

    def connect(self, target: Peer) -> None:
        """Make the engine that will map the arena."""
        self._engine_to(target)

    def disconnect(self, target: Peer) -> None:
        """End the mapping: the memory of a dead receiver is free only when no process has it mapped."""
        if self._leases is not None:
            if target.link_key in self._mapping:
                self._end({0: self._mapping.pop(target.link_key)})
            self._leases.end_lease(target)

    def make_staging(self, target: Peer, num_bytes: int) -> torch.Tensor:
        self._enter_device()
        staging, engine = super().make_staging(target, num_bytes), self._engine_to(target)
        try:
            self._register(engine, staging)
        except StartupError as error:
            raise KVTransferError(str(error)) from None
        # Unregister before the memory is free for others: the engine refuses to register a byte twice.
        weakref.finalize(staging, engine.unregister_memory, staging.data_ptr()).atexit = False
        return staging

    def write(self, target: Peer, source: torch.Tensor, runs: list[ByteRun]) -> None:
        self._enter_device()
        session, address = target.endpoint.split(" ")
        source_address, target_address = source.data_ptr(), int(address)
        engine = self._engine_to(target)
        for first in range(0, len(runs), _MAX_RUNS):
            batch = runs[first : first + _MAX_RUNS]
            code = engine.batch_transfer_sync_write(
                session,
                [source_address + here for here, _, _ in batch],
                [target_address + there for _, there, _ in batch],
                [num_bytes for _, _, num_bytes in batch],
            )
            if code != 0:
                raise KVTransferError(f"Mooncake could not write to {session} (code {code})")

    async def stop(self) -> None:
        self._outbound = None  # a write in flight keeps it alive
        await asyncio.to_thread(self._end, self._windows)
        if self._leases is not None:
            await self._leases.stop()

    def _end(self, engines: dict[Any, Any]) -> None:
        """Drop the last references to engines, which ends them."""
        self._enter_device()
        engines.clear()


def _link(sources: list[Peer]) -> tuple[LinkKey, ...]:
    return tuple(source.link_key for source in sources)
