"""Public module paths of semi-PD, as its design documents import them."""

from __future__ import annotations

import importlib

import pytest

from hbserve.config import from_dict
from hbserve.pd_disagg.cpu_scheduler import CpuScheduler
from hbserve.scheduler.core_io import Start
from hbserve.semi_pd.metrics_collector import SemiPDMetricsCollector
from tests.support.scheduler_parts import DEMO

PATHS = """
hbserve.semi_pd: ProcessRotationManager ResidentProcessManager SMAllocation
hbserve.semi_pd.metrics_collector: SemiPDMetricsCollector RequestMetrics SystemMetrics AggregatedMetrics
hbserve.semi_pd.metrics_integration: MetricsAggregator integrate_semi_pd_metrics_with_scheduler
hbserve.semi_pd.process_rotation_manager: ProcessRotationManager SMAllocation
hbserve.semi_pd.resident_process_manager: ResidentProcessManager SMAllocation
hbserve.semi_pd.resident_process_manager: DelayedSwitchingController AsynchronousSwitchingController
hbserve.semi_pd.semi_pd_coordinator: create_semi_pd_coordinator SemiPDCoordinator
hbserve.semi_pd.slo_algorithm: SLOAwareResourceController SLOConstraints
hbserve.semi_pd.unified_storage_manager: UnifiedStorageManager
hbserve.semi_pd.utils: InstanceRole get_ipc_handle convert_ipc_handle_to_tensor
hbserve.semi_pd.resident_process_manager: get_ipc_handle convert_ipc_handle_to_tensor
hbserve.semi_pd.slo_aware_resource_manager: SLOAwareResourceManager SLOTarget WorkloadMetrics
hbserve.srt.server_args: ServerArgs SemiPDPortArgs
hbserve.srt.metrics.collector: SchedulerMetricsCollector SchedulerStats
hbserve.pd_disagg: LLM DisaggregatedLLM PdDisaggConfig KVTransferBackend
hbserve.pd_disagg.cpu_scheduler: CpuScheduler
hbserve.pd_disagg.kv_transfer.base: KVTransferBase
hbserve.sampling_params: SamplingParams
"""


@pytest.mark.parametrize("line", PATHS.strip().splitlines())
def test_a_public_path_has_its_names(line: str) -> None:
    path, names = line.split(": ")
    module = importlib.import_module(path)
    for name in names.split():
        assert isinstance(getattr(module, name), type) or callable(getattr(module, name))


def test_the_scheduler_has_the_collector_that_the_docs_name() -> None:
    scheduler = CpuScheduler(from_dict({"model": {"path": str(DEMO)}}), {}, Start(now=0.0, time_ns=0))
    assert isinstance(scheduler.metrics.collector, SemiPDMetricsCollector)
    assert scheduler.metrics.collector.get_real_time_metrics()["arrival_rate"] == 0.0


def test_every_path_has_the_same_split() -> None:
    modules = ("", ".process_rotation_manager", ".resident_process_manager")
    assert len({importlib.import_module(f"hbserve.semi_pd{module}").SMAllocation for module in modules}) == 1
