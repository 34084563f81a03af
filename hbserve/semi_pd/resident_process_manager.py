"""Start and supervision of the resident processes, and the attachments to their memory.

Each rank of an instance has a resident process (`hbserve.semi_pd.resident_process`). One `ResidentProcessManager` per
rank has a watcher thread and a heartbeat thread; `ResidentGroup` starts and ends them together.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from hbserve.config import Config, InstanceConfig
from hbserve.config.flat import PdDisaggConfig
from hbserve.errors import ConfigError, StartupError
from hbserve.lazy import lazy_attributes
from hbserve.process.parent import ChildProcess
from hbserve.semi_pd.switching import AsynchronousSwitchingController, DelayedSwitchingController
from hbserve.semi_pd.utils import semi_pd_system
from hbserve.slo.constraints import SMAllocation

if TYPE_CHECKING:
    from hbserve.platform.ipc import convert_ipc_handle_to_tensor, get_ipc_handle

__all__ = [
    "AsynchronousSwitchingController",
    "DelayedSwitchingController",
    "ResidentProcessManager",
    "SMAllocation",
    "convert_ipc_handle_to_tensor",
    "get_ipc_handle",
]

__getattr__: Any = lazy_attributes(
    {name: "hbserve.platform.ipc" for name in ("convert_ipc_handle_to_tensor", "get_ipc_handle")}, __name__
)

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 10.0
_END_TIMEOUT_S = 10.0


class ResidentGroup:
    """Resident processes of all ranks as one. The ranks' KV belongs together, so a lost rank is the loss of all.

    Args:
        config, instance: whose ranks these are.
        on_lost: called from a thread with the reason when one of them is lost.
        is_cancelled: whether a start must give up; looked at after each `notify_cancelled`.

    Attributes:
        ranks: the managers, by rank.
    """

    def __init__(
        self, config: Config, instance: InstanceConfig, on_lost: Callable[[str], None], is_cancelled: Callable[[], bool]
    ) -> None:
        self.ranks = [
            ResidentProcessManager(config, gpu_id=instance.gpu_id, tp_rank=rank, on_lost=on_lost)
            for rank in range(instance.num_ranks)
        ]
        for rank in self.ranks:
            rank.instance, rank.is_cancelled = instance, is_cancelled

    def configure(self, environment: dict[str, str], run_dir: str | None) -> None:
        """Set the attributes of each `ResidentProcessManager` before a start."""
        for rank in self.ranks:
            rank.environment, rank.run_dir = environment, run_dir

    def start(self, timeout: float) -> None:
        """Load on all ranks at once, and reserve as much KV as fits on each.

        Raises:
            StartupError: with the reason of the first that cannot; the others are ended.
        """
        deadline = time.monotonic() + timeout
        try:
            for rank in self.ranks:
                rank.begin()
            sizes = [rank.wait_sized(deadline) for rank in self.ranks]
            common = {key: min(size[key] for size in sizes) for key in sizes[0]}
            for rank in self.ranks:
                rank.reserve_kv(common)
            for rank in self.ranks:
                rank.wait_ready(deadline)
        except BaseException:
            self.stop()
            raise

    def notify_cancelled(self) -> None:
        """Make a start that waits in another thread look whether it is cancelled."""
        for rank in self.ranks:
            rank.notify_cancelled()

    def stop(self) -> None:
        """End all resident processes."""
        for rank in self.ranks:
            rank.stop()

    def find_attachments(self) -> list[dict[str, Any]] | None:
        """Return `attachments`; None if one of them is not running."""
        found = [rank.find_attachment() for rank in self.ranks]
        return None if None in found else [attachment for attachment in found if attachment is not None]

    @property
    def attachments(self) -> list[dict[str, Any]]:
        """`ResidentProcessManager.attachment` of each rank.

        Raises:
            StartupError: if one of them is not running.
        """
        attachments = self.find_attachments()
        if attachments is None:
            raise StartupError("the resident process is not running; start() it first")
        return attachments

    def is_healthy(self) -> bool:
        """Ask all of them now, and wait for the answers, which come after a touch of each device."""
        return all(rank.is_healthy() for rank in self.ranks)

    def get_status(self) -> dict[str, Any]:
        """Return the first rank's status, with those of all ranks under ``ranks``."""
        statuses = [rank.get_status() for rank in self.ranks]
        return statuses[0] | {"ranks": statuses}


class ResidentProcessManager:
    """One resident process: start, heartbeat, and restart when it is lost.

    Args:
        server_args: the system's configuration.
        port_args: see `hbserve.semi_pd.utils.semi_pd_system`.
        gpu_id: of the instance's first rank; the others' follow.
        tp_rank: the rank whose memory is held.
        on_lost: called from a thread with the reason when the process has ended on its own or does not answer; the
            owner then calls `start` again. Default: the manager restarts the process at once.

    Attributes:
        environment: variables for the process.
        run_dir: a folder to remove if the process outlives all other processes.
        is_cancelled: whether a start must give up.
        heartbeat_interval: seconds between heartbeats.

    Raises:
        ConfigError: naming what cannot be honoured.
    """

    def __init__(
        self,
        server_args: Config | PdDisaggConfig,
        port_args: Any = None,
        gpu_id: int = 0,
        tp_rank: int = 0,
        *,
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        self.config, self.instance = semi_pd_system(server_args, gpu_id, port_args)
        if not 0 <= tp_rank < self.instance.num_ranks:
            raise ConfigError(f"tp_rank: there are {self.instance.num_ranks} ranks, got {tp_rank}")
        self.tp_rank = tp_rank
        self.heartbeat_interval = self.config.semi_pd.heartbeat_interval_s
        self.environment: dict[str, str] = {}
        self.run_dir: str | None = None
        self.is_cancelled: Callable[[], bool] = lambda: False
        self._on_lost = on_lost or self._start_again
        self._condition = threading.Condition()
        self._process: ChildProcess | None = None
        self._status: dict[str, Any] = {}
        self._num_answers = 0
        self._free_bytes: int | None = None
        self._last_seen = 0.0
        self._num_starts = 0
        self._is_wanted = False
        self._heartbeat: threading.Thread | None = None

    def start(self, timeout: float | None = None) -> bool:
        """Start the process and wait until it has loaded.

        Args:
            timeout: seconds; default: ``rpc.start_timeout_s``.

        Raises:
            StartupError: with the process' reason, or at the deadline.
        """
        deadline = time.monotonic() + (self.config.rpc.start_timeout_s if timeout is None else timeout)
        self.begin()
        self.reserve_kv(self.wait_sized(deadline))
        self.wait_ready(deadline)
        return True

    def begin(self) -> None:
        """Start the process, which loads the weights. Call `wait_sized` next."""
        orders = {
            "config": msgspec.to_builtins(self.config),
            "gpu_id": self.instance.gpu_id,
            "tp_rank": self.tp_rank,
            "num_ranks": self.instance.num_ranks,
            "name": self._name,
            "run_dir": self.run_dir,
        }
        with self._condition:
            self._status, self._is_wanted = {}, True
            module = "hbserve.semi_pd.resident_process"
            self._process = ChildProcess(
                self._name,
                module,
                orders,
                environment=self.environment,
                on_status=self._on_status,
                on_exit=self._on_exit,
            )
            self._process.start()

    def wait_sized(self, deadline: float) -> dict[str, int]:
        """Wait until the weights are loaded; returns the KV that fits then, as ``num_blocks`` and ``max_model_len``.

        Args:
            deadline: on the monotonic clock.

        Raises:
            StartupError: with the process' reason, or at the deadline.
        """
        size: dict[str, int] = self._wait_for("fits", deadline)["fits"]
        return size

    def reserve_kv(self, size: dict[str, int]) -> None:
        """Tell the process how much KV to reserve. Call `wait_ready` next."""
        assert self._process is not None, "begin() comes first"
        self._process.send(size)  # if the process has ended, wait_ready says so

    def wait_ready(self, deadline: float) -> None:
        """Wait until workers can attach.

        Raises:
            StartupError: with the process' reason, or at the deadline.
        """
        self._wait_for("ready", deadline)
        self._num_starts += 1
        self._last_seen = time.monotonic()
        if self._heartbeat is None or not self._heartbeat.is_alive():
            self._heartbeat = threading.Thread(target=self._run_heartbeat, name="semi-pd-heartbeat", daemon=True)
            self._heartbeat.start()

    def _wait_for(self, word: str, deadline: float) -> dict[str, Any]:
        process = self._process
        assert process is not None, "begin() comes first"
        with self._condition:
            self._condition.wait_for(
                lambda: (
                    word in self._status or "error" in self._status or not process.is_alive() or self.is_cancelled()
                ),
                max(0.0, deadline - time.monotonic()),
            )
            status = dict(self._status)
        if word not in status:
            self.stop()
            why = status.get("error") or (
                f"ended at start with exit code {process.exit_code}; see its log"
                if process.exit_code is not None
                else "was not ready in time (rpc.start_timeout_s)"
            )
            raise StartupError(f"{self._name}: {why}")
        return status

    @property
    def _name(self) -> str:
        rank = f"-TP{self.tp_rank}" if self.instance.num_ranks > 1 else ""
        return f"{self.instance.instance_id}-resident{rank}"

    def notify_cancelled(self) -> None:
        """Make a start that waits in another thread look whether it is cancelled."""
        with self._condition:
            self._condition.notify_all()

    def stop(self) -> None:
        """End the process. Its memory is freed when the last attached process has ended."""
        with self._condition:
            self._is_wanted = False
            self._condition.notify_all()
            process = self._process
        if process is not None:
            process.end(_END_TIMEOUT_S)
        if self._heartbeat is not None and threading.current_thread() is not self._heartbeat:
            self._heartbeat.join()

    def find_attachment(self) -> dict[str, Any] | None:
        """Return `attachment`; None if no process is ready."""
        attachment: dict[str, Any] | None = self._status.get("attachment")
        return attachment

    @property
    def attachment(self) -> dict[str, Any]:
        """`hbserve.engine.arenas.ArenaAttachment` of the running process, as plain data.

        Raises:
            StartupError: if no process is ready.
        """
        attachment = self.find_attachment()
        if attachment is None:
            raise StartupError("the resident process is not running; start() it first")
        return attachment

    @property
    def device(self) -> str:
        """Device in words."""
        return str(self._status.get("device", "unknown"))

    def get_ipc_info_for_prefill(self) -> dict[str, Any]:
        """Return the attachment for a prefill worker: the same as for a decode worker."""
        return self.attachment

    def get_ipc_info_for_decode(self) -> dict[str, Any]:
        """Return the attachment for a decode worker."""
        return self.attachment

    def is_healthy(self, timeout_s: float = _ANSWER_TIMEOUT_S) -> bool:
        """Ask now, and wait for the answer, which comes after a touch of the device."""
        process = self._process
        if process is None or not process.is_alive():
            return False
        with self._condition:
            before = self._num_answers
            if not process.send({}):
                return False
            self._condition.wait_for(
                lambda: self._num_answers > before or "error" in self._status or not process.is_alive(), timeout_s
            )
            return self._num_answers > before

    def get_status(self) -> dict[str, Any]:
        """Return ``resident_process`` (``pid``, ``is_alive``, seconds since its last sign of life), sizes and starts.

        ``free_bytes_at_start`` is the device's free memory after the load, ``free_bytes`` that at the last sign of
        life. Other processes have taken the difference.
        """
        process, status = self._process, self._status
        return {
            "resident_process": None
            if process is None or not process.has_started
            else {"pid": process.pid, "is_alive": process.is_alive(), "silence_s": time.monotonic() - self._last_seen},
            "is_ready": "attachment" in status,
            "device": self.device,
            "weights_bytes": status.get("weights_bytes"),
            "kv_bytes": status.get("kv_bytes"),
            "free_bytes_at_start": status.get("free_bytes"),
            "free_bytes": self._free_bytes,
            "load_s": status.get("seconds"),
            "starts": self._num_starts,
        }

    # --- watcher and heartbeat threads -------------------------------------------------------------

    def _on_status(self, status: dict[str, Any]) -> None:
        with self._condition:
            if "alive" in status:
                self._num_answers += 1
                self._free_bytes = status["free_bytes"]
                self._last_seen = time.monotonic()
            else:
                self._status = status
            self._condition.notify_all()

    def _on_exit(self, code: int) -> None:
        with self._condition:
            was_ready = "attachment" in self._status or "error" in self._status
            why = self._status.get("error") or f"the resident process ended with exit code {code}"
            self._status = {"error": why} if "error" in self._status else {}
            is_lost = self._is_wanted and was_ready and self._num_starts > 0
            self._condition.notify_all()
        if is_lost:
            logger.error("%s: %s", self.instance.instance_id, why)
            self._on_lost(why)

    def _run_heartbeat(self) -> None:
        while True:
            with self._condition:
                if self._condition.wait_for(lambda: not self._is_wanted, self.heartbeat_interval):
                    return
                process = self._process
            if process is None or "attachment" not in self._status or self.is_healthy():
                continue
            # A process that was told to end, or has reported a failed device, ends by itself. Any other is killed now.
            # Either way `_on_exit` handles its end.
            is_ending = not self._is_wanted or "error" in self._status
            if not process.join(_END_TIMEOUT_S if is_ending else 0.0):
                logger.error("%s does not answer; ending it", process.name)
                process.kill()

    def _start_again(self, why: str) -> None:
        def start() -> None:
            try:
                self.start()
            except StartupError as error:
                logger.error("%s", error)

        threading.Thread(target=start, name="semi-pd-resident-restart", daemon=True).start()
