"""The calls of the design documents of semi-PD, in their order, by a program that knows nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hbserve.semi_pd.metrics_collector import SemiPDMetricsCollector
from hbserve.semi_pd.metrics_integration import MetricsAggregator, integrate_semi_pd_metrics_with_scheduler
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager, SMAllocation
from hbserve.semi_pd.resident_process_manager import (
    AsynchronousSwitchingController,
    DelayedSwitchingController,
    convert_ipc_handle_to_tensor,
    get_ipc_handle,
)
from hbserve.semi_pd.semi_pd_coordinator import SemiPDCoordinator, create_semi_pd_coordinator
from hbserve.semi_pd.slo_algorithm import SLOAwareResourceController, SLOConstraints
from hbserve.semi_pd.slo_aware_resource_manager import SLOAwareResourceManager, SLOTarget, WorkloadMetrics
from hbserve.semi_pd.unified_storage_manager import UnifiedStorageManager
from hbserve.semi_pd.utils import InstanceRole
from hbserve.srt.metrics.collector import SchedulerMetricsCollector, SchedulerStats
from hbserve.srt.server_args import SemiPDPortArgs, ServerArgs
from tests.support.paths import ROOT
from tests.support.scheduler_parts import DEMO

DEADLINE_S = 120.0


def arguments() -> ServerArgs:
    server_args = ServerArgs()
    server_args.model_path = str(DEMO)
    server_args.device = "cpu"
    server_args.num_blocks = 64
    return server_args


@pytest.fixture(scope="module")
def coordinator() -> Iterator[SemiPDCoordinator]:
    port_args = SemiPDPortArgs()
    port_args.host = "127.0.0.1"
    port_args.port = 30000
    made = create_semi_pd_coordinator(
        server_args=arguments(),
        port_args=port_args,
        prefill_sm_percentage=70,
        decode_sm_percentage=30,
        ttft_target_ms=100.0,
        tpot_target_ms=50.0,
    )
    assert made.start()
    yield made
    made.stop()


@pytest.fixture
def manager(coordinator: SemiPDCoordinator) -> ProcessRotationManager:
    return coordinator.rotation_manager


def test_the_manager_rotates_and_reports_plain_data(manager: ProcessRotationManager) -> None:
    assert (manager.config.server.host, manager.config.server.port) == ("127.0.0.1", 30000)
    manager.delayed_switching.preparation_timeout = 60.0
    manager.resident_manager.heartbeat_interval = 3.0
    assert manager.resident_manager.get_ipc_info_for_prefill() == manager.resident_manager.get_ipc_info_for_decode()
    assert manager.request_sm_reallocation(SMAllocation(prefill_percentage=60, decode_percentage=40))
    assert manager.wait_until_settled(DEADLINE_S)
    status = manager.get_status()
    assert json.loads(json.dumps(status)) == status
    assert status["current_sm_allocation"] == {"prefill_percentage": 60, "decode_percentage": 40, "mixed": False}
    assert status["resident_manager"]["resident_process"]["is_alive"]
    assert not status["switch_requested"]
    assert {"delayed_switching", "async_switching"} <= status.keys()
    for role in ("prefill", "decode"):
        assert status["active_processes"][role]["state"] == "active"
        os.kill(status["active_processes"][role]["pid"], 0)


def test_the_coordinator_allocates_and_judges_reports(coordinator: SemiPDCoordinator) -> None:
    handles = coordinator.allocate_kv_blocks("req_id", 10, InstanceRole.PREFILL)
    assert len(handles) == 10
    coordinator.report_workload_metrics(report())
    status = coordinator.get_comprehensive_status()
    assert status["storage"]["free_blocks"] == 54
    assert coordinator.health_check()["healthy"]
    controller = coordinator.slo_controller
    assert controller is not None
    window = controller.metrics_collector.get_current_window_metrics()
    assert (window.ttft_p95, window.tpot_p95) == (80.0, 40.0)
    coordinator.deallocate_kv_blocks("req_id")


def report() -> WorkloadMetrics:
    return WorkloadMetrics(
        timestamp=time.time(),
        prefill_queue_length=5,
        decode_queue_length=10,
        prefill_throughput=1000.0,
        decode_throughput=2000.0,
        ttft_p95=80.0,
        tpot_p95=40.0,
        prefill_utilization=0.7,
        decode_utilization=0.8,
    )


def test_controllers_of_a_program_read_the_manager(manager: ProcessRotationManager) -> None:
    collector = SemiPDMetricsCollector(window_size_seconds=30.0, max_history_size=1000)
    collector.record_request_arrival("req_123", input_length=1024)
    collector.record_prefill_start("req_123")
    collector.record_first_token("req_123")
    collector.record_prefill_end("req_123")
    collector.record_decode_start("req_123")
    collector.record_request_completion("req_123", output_length=256, success=True)
    numbers = collector.get_real_time_metrics()
    assert {"ttft_p95_ms", "tpot_p95_ms", "request_throughput"} <= numbers.keys()
    window = collector.get_current_window_metrics()
    assert window.window_start_time < window.window_end_time
    assert window.ttft_mean <= window.ttft_p95
    constraints = SLOConstraints(
        ttft_target_ms=100.0,
        tpot_target_ms=50.0,
        ttft_percentile=95.0,
        tpot_percentile=95.0,
        ttft_violation_threshold=1.1,
        tpot_violation_threshold=1.1,
    )
    controller = SLOAwareResourceController(
        slo_constraints=constraints,
        metrics_collector=collector,
        process_rotation_manager=manager,
        monitoring_interval=10.0,
    )
    controller.start_monitoring()
    controller.stop_monitoring()
    statistics = controller.get_controller_status()["statistics"]
    assert (statistics["total_adjustments"], statistics["success_rate"]) == (0, 1.0)
    older = SLOAwareResourceManager(
        slo_target=SLOTarget(ttft_target_ms=100.0, tpot_target_ms=50.0),
        process_rotation_manager=manager,
        window_size_seconds=30.0,
        adjustment_cooldown_seconds=60.0,
    )
    older.start()
    older.report_metrics(report())
    older.stop()
    aggregator = MetricsAggregator()
    aggregator.update_prefill_metrics(window)
    aggregator.update_decode_metrics(window)
    assert aggregator.get_aggregated_metrics().num_completed == 2
    stats = SchedulerStats.of(window, total_tokens=1024)
    assert (stats.num_running_reqs, stats.num_queue_reqs, stats.cache_hit_rate) == (0, 0, 0.0)
    assert SchedulerMetricsCollector is SemiPDMetricsCollector


@pytest.mark.parametrize(
    "req",
    [
        SimpleNamespace(request_id="a", prompt_token_ids=[1, 2]),
        SimpleNamespace(rid="a", origin_input_ids=[1, 2]),
    ],
    ids=["hbserve", "sglang"],
)
def test_any_scheduler_gets_the_hooks(req: Any) -> None:
    class SemiPDPrefillScheduler:
        def __init__(self) -> None:
            integrate_semi_pd_metrics_with_scheduler(self, InstanceRole.PREFILL)

    scheduler: Any = SemiPDPrefillScheduler()
    batch = SimpleNamespace(reqs=[req])
    scheduler.semi_pd_on_request_arrival(req)
    scheduler.semi_pd_on_batch_prefill_start(batch)
    scheduler.semi_pd_on_batch_prefill_end(batch)
    scheduler.semi_pd_on_first_token_generated(req)
    window = scheduler.semi_pd_metrics.get_current_window_metrics()
    assert (window.ttft.count, window.input_tokens) == (1, 2)


def test_the_storage_manager_shares_a_prefix() -> None:
    storage = UnifiedStorageManager(
        total_blocks=10000, block_size=4096, device=torch.device("cpu"), enable_prefix_caching=True
    )
    blocks = storage.allocate_blocks(request_id="req_123", num_blocks=10, requester_role=InstanceRole.PREFILL)
    assert [handle.block_id for handle in storage.get_block_handles("req_123")] == blocks
    storage.share_blocks("req_123", "target_req")
    storage.deallocate_blocks("req_123")
    assert storage.num_free_blocks == 9990
    storage.deallocate_blocks("target_req")
    assert storage.num_free_blocks == 10000


def test_switching_takes_any_processes() -> None:
    delayed = DelayedSwitchingController(preparation_timeout=30.0)
    assert delayed.request_delayed_switch(lambda: True)
    assert delayed.wait_for_switch_ready()
    processes = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(4)]

    class Process:
        def __init__(self, popen: subprocess.Popen[bytes]) -> None:
            self._popen, self.terminate = popen, popen.terminate

        def is_alive(self) -> bool:
            return self._popen.poll() is None

        def join(self, timeout: float | None = None) -> None:
            self._popen.wait(timeout)

    try:
        old, new = [Process(p) for p in processes[:2]], [Process(p) for p in processes[2:]]
        switching = AsynchronousSwitchingController()
        roles = [InstanceRole.PREFILL, InstanceRole.DECODE]
        for index, role in enumerate(roles):
            assert switching.start_asynchronous_switch(
                role=role,
                old_process=old[index],
                new_process=new[index],
                iteration_complete_callback=lambda: True,
            )
        assert all(switching.wait_for_switch_completion(role, timeout=30.0) for role in roles)
        assert [process.is_alive() for process in (*old, *new)] == [False, False, True, True]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_tensors_are_shared_by_handles() -> None:
    tensor = torch.arange(4.0)
    shared = convert_ipc_handle_to_tensor(get_ipc_handle(tensor), 4, torch.float32, "cpu")
    tensor[0] = 9
    assert shared.tolist() == [9, 1, 2, 3]


def test_the_test_files_that_the_documents_name_run() -> None:
    command = [sys.executable, "test/semi_pd/test_resident_process_manager.py", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout
    command = [sys.executable, "-m", "pytest", "test/semi_pd/test_semi_pd_features.py", "--collect-only", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout
