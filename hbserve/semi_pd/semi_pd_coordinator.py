"""All parts of semi-PD on one GPU behind one object, for programs with a scheduler of their own.

The parts are the processes (`ProcessRotationManager`), the allocator of their KV pool (`UnifiedStorageManager`), and a
window of latencies with the controller that moves the split. In HBServe's own service the CPU scheduler owns the pool
and the window, and this object is not used.
"""

from __future__ import annotations

from typing import Any

from hbserve.config import Config, InstanceRole
from hbserve.config.flat import PdDisaggConfig
from hbserve.errors import ConfigError, EngineDeadError, OverloadedError
from hbserve.kv_cache.block_pool import BlockHandle
from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.metrics.window_metrics import SystemMetrics
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager
from hbserve.semi_pd.slo_algorithm import SLOAwareResourceController, SLOConstraints
from hbserve.semi_pd.slo_aware_resource_manager import ReportedMetrics, WorkloadMetrics
from hbserve.semi_pd.slo_service import check_slo
from hbserve.semi_pd.unified_storage_manager import UnifiedStorageManager
from hbserve.semi_pd.utils import semi_pd_system
from hbserve.slo.constraints import SMAllocation

__all__ = ["SemiPDCoordinator", "create_semi_pd_coordinator"]


class SemiPDCoordinator:
    """Coordinator that starts, joins and ends the parts. Any thread may call its methods.

    Args:
        rotation_manager: not started yet.
        slo_constraints: targets of the controller; None: the configuration's ``semi_pd.slo``. Without either there is
            no controller, and the split is the one that users ask for.
        window_size_seconds: length of the controller's window, without the time of rotations.

    Attributes:
        metrics_collector: the program reports its requests to it, and the controller reads it.
        storage_manager: allocator of the pool, from `start` on.

    Raises:
        ConfigError: if both the arguments and the configuration have targets.
    """

    def __init__(
        self,
        rotation_manager: ProcessRotationManager,
        slo_constraints: SLOConstraints | None = None,
        window_size_seconds: float = 30.0,
    ) -> None:
        self.rotation_manager = rotation_manager
        self.metrics_collector = SemiPDMetricsCollector(window_size_seconds=window_size_seconds)
        self._reports = ReportedMetrics(self.metrics_collector)
        self.slo_controller: SLOAwareResourceController | None = None
        rotation_manager.mark_rotation = self._mark_rotation
        configured = rotation_manager.config.semi_pd.slo
        if configured is not None:
            if slo_constraints is not None:
                raise ConfigError(
                    "semi_pd.slo: there are targets in the configuration and in the arguments; give one of them",
                    "semi_pd.slo",
                )
            slo_constraints = check_slo(configured)[0]
        if slo_constraints is not None:
            self.slo_controller = SLOAwareResourceController(
                slo_constraints=slo_constraints,
                metrics_collector=self._reports,
                process_rotation_manager=rotation_manager,
            )
            rotation_manager.attach_controller(self.slo_controller)
        self.storage_manager: UnifiedStorageManager | None = None

    def start(self) -> bool:
        """Start every process and the controller; returns False, with the reason in the log, if that fails."""
        if not self.rotation_manager.start():
            return False
        attachment = self.rotation_manager.resident_manager.attachment
        self.storage_manager = UnifiedStorageManager(
            attachment["num_blocks"],
            attachment["block_size"],
            enable_prefix_caching=self.rotation_manager.config.performance.enable_prefix_caching,
        )
        if self.slo_controller is not None:
            self.slo_controller.start_monitoring()
        return True

    def stop(self) -> None:
        """End everything. May be called twice."""
        if self.slo_controller is not None:
            self.slo_controller.stop_monitoring()
        self.rotation_manager.stop()
        self.storage_manager = None

    def allocate_kv_blocks(self, request_id: str, num_blocks: int, requester_role: InstanceRole) -> list[BlockHandle]:
        """Allocate blocks of the shared pool to a request, all or none.

        Raises:
            OverloadedError: if the pool has too few.
            EngineDeadError: if the coordinator is not running.
        """
        pool = self._pool()
        with pool.lock:  # so that the handles are those of this allocation
            if pool.allocate_blocks(request_id, num_blocks, requester_role) is None:
                raise OverloadedError(f"{num_blocks} KV blocks are asked for, and {pool.num_free_blocks} are free")
            return pool.get_block_handles(request_id)

    def deallocate_kv_blocks(self, request_id: str) -> None:
        """Free a request's blocks."""
        self._pool().deallocate_blocks(request_id)

    def request_sm_reallocation(self, new_allocation: SMAllocation) -> bool:
        """See `ProcessRotationManager.request_sm_reallocation`."""
        return self.rotation_manager.request_sm_reallocation(new_allocation)

    def report_workload_metrics(self, metrics: SystemMetrics | WorkloadMetrics) -> None:
        """Report the state of the program's queues; report single requests to `metrics_collector`.

        A program that does not report single requests reports `WorkloadMetrics`, by whose latencies the controller
        then judges.
        """
        if isinstance(metrics, WorkloadMetrics):
            self._reports.report(metrics)
        else:
            self.metrics_collector.record_system_metrics(metrics)

    def get_comprehensive_status(self) -> dict[str, Any]:
        """Return ``processes``, ``storage`` and ``slo_controller``, each as its part reports it."""
        pool = self.storage_manager
        return {
            "processes": self.rotation_manager.get_status(),
            "storage": None
            if pool is None
            else {
                "total_blocks": pool.total_blocks,
                "free_blocks": pool.num_free_blocks,
                "cached_blocks": pool.num_cached_blocks,
                "block_size": pool.block_size,
            },
            "slo_controller": None if self.slo_controller is None else self.slo_controller.get_controller_status(),
        }

    def health_check(self) -> dict[str, Any]:
        """Return ``healthy``, and for each part whether it runs."""
        status = self.rotation_manager.get_status()
        resident = status["resident_manager"]["resident_process"]
        parts = {
            "resident_process": bool(resident and resident["is_alive"]),
            "prefill": "prefill" in status["active_processes"],
            "decode": "decode" in status["active_processes"],
        }
        return {"healthy": status["state"] == "running" and all(parts.values()), "parts": parts}

    def _mark_rotation(self, begins: bool) -> None:
        if begins:
            self._reports.begin_exclusion()
        else:
            self._reports.end_exclusion()

    def _pool(self) -> UnifiedStorageManager:
        if self.storage_manager is None:
            raise EngineDeadError("the coordinator is not running; start() it first")
        return self.storage_manager


def create_semi_pd_coordinator(
    server_args: Config | PdDisaggConfig,
    port_args: Any = None,
    prefill_sm_percentage: int | None = None,
    decode_sm_percentage: int | None = None,
    ttft_target_ms: float | None = None,
    tpot_target_ms: float | None = None,
    gpu_id: int = 0,
) -> SemiPDCoordinator:
    """Make a coordinator of one GPU.

    Args:
        server_args: the system's configuration.
        port_args: see `hbserve.semi_pd.utils.semi_pd_system`.
        prefill_sm_percentage, decode_sm_percentage: default: the configuration's.
        ttft_target_ms, tpot_target_ms: targets of a controller; default: the configuration's ``semi_pd.slo``, if any.

    Raises:
        ConfigError: naming what cannot be honoured.
        TypeError: if only one target is given.
    """
    settings = semi_pd_system(server_args, gpu_id, port_args)[0].semi_pd
    prefill = settings.prefill_percentage if prefill_sm_percentage is None else prefill_sm_percentage
    decode = settings.decode_percentage if decode_sm_percentage is None else decode_sm_percentage
    assert prefill is not None
    assert decode is not None
    manager = ProcessRotationManager(server_args, port_args, SMAllocation(prefill, decode), gpu_id)
    if (ttft_target_ms is None) != (tpot_target_ms is None):
        raise TypeError("ttft_target_ms and tpot_target_ms go together")
    constraints = None
    if ttft_target_ms is not None and tpot_target_ms is not None:
        constraints = SLOConstraints(ttft_target_ms=ttft_target_ms, tpot_target_ms=tpot_target_ms)
    return SemiPDCoordinator(manager, constraints)
