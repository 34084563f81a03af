"""The controller of a program that reports nothing but the life of its requests."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.metrics.window_metrics import SystemMetrics
from hbserve.semi_pd.slo_algorithm import SLOAwareResourceController, SLOConstraints
from hbserve.semi_pd.slo_aware_resource_manager import SLOAwareResourceManager, SLOTarget, WorkloadMetrics
from hbserve.slo.constraints import SMAllocation
from hbserve.slo.workload import observed_window

WINDOW_S = 30.0
CONSTRAINTS = SLOConstraints(ttft_target_ms=100.0, tpot_target_ms=50.0)
OUTPUT_TOKENS = 64


class Owner:
    """Owner of a split that changes at once."""

    def __init__(self) -> None:
        self.splits = [SMAllocation(70, 30)]

    def request_sm_reallocation(self, new_allocation: SMAllocation) -> bool:
        self.splits.append(new_allocation)
        return True

    def get_status(self) -> dict[str, Any]:
        return {"current_sm_allocation": asdict(self.splits[-1]), "switch_requested": False}


class Program:
    """Program whose every request has the same latencies, on a clock of its own."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.collector = SemiPDMetricsCollector(WINDOW_S, clock=lambda: self.now)
        self.owner = Owner()
        self.controller = SLOAwareResourceController(CONSTRAINTS, self.collector, self.owner, monitoring_interval=10.0)

    def serve(self, num_requests: int, ttft_s: float, tpot_s: float, spacing_s: float) -> None:
        for number in range(num_requests):
            name, start = f"{self.now}-{number}", self.now
            self.collector.record_request_arrival(name, input_length=1024)
            self.collector.record_prefill_start(name)
            self.now = start + ttft_s
            self.collector.record_first_token(name)
            self.collector.record_prefill_end(name)
            self.collector.record_decode_start(name)
            self.now += tpot_s * (OUTPUT_TOKENS - 1)
            self.collector.record_request_completion(name, output_length=OUTPUT_TOKENS, success=True)
            self.now = max(self.now, start + spacing_s)


@pytest.mark.parametrize("num_requests", [3, 5, 29, 30])
@pytest.mark.parametrize(("ttft_s", "tpot_s", "violated"), [(0.05, 0.1, {"tpot"}), (0.3, 0.01, {"ttft"})])
def test_few_completions_show_a_violation(num_requests: int, ttft_s: float, tpot_s: float, violated: set[str]) -> None:
    program = Program()
    program.collector.window_size_seconds = WINDOW_S
    program.serve(num_requests, ttft_s, tpot_s, spacing_s=0.0)
    program.now += 0.6  # a slice of the window
    window = observed_window(program.collector.get_current_window_metrics(), CONSTRAINTS)
    assert window.workload.output_tokens == OUTPUT_TOKENS
    decision = program.controller.step()
    assert decision is not None
    assert set(decision.violations) == violated


@pytest.mark.parametrize(("ttft_s", "tpot_s", "phase"), [(0.05, 0.1, "decode"), (0.5, 0.01, "prefill")])
def test_a_lasting_violation_moves_the_split_although_the_model_predicts_none(
    ttft_s: float, tpot_s: float, phase: str
) -> None:
    program = Program()
    for _ in range(6):
        program.serve(3, ttft_s, tpot_s, spacing_s=4.0)
        program.controller.step()
    first, second = program.owner.splits[:2]
    assert getattr(second, f"{phase}_percentage") > getattr(first, f"{phase}_percentage")


def test_kept_targets_move_nothing() -> None:
    program = Program()
    for _ in range(6):
        program.serve(3, 0.05, 0.01, spacing_s=4.0)
        program.controller.step()
    assert len(program.owner.splits) == 1


def test_the_state_follows_from_the_open_requests_until_it_is_reported() -> None:
    program = Program()
    collector = program.collector
    for name in "abc":
        collector.record_request_arrival(name, input_length=10)
    collector.record_prefill_start("b")
    collector.record_prefill_start("c")
    collector.record_first_token("c")
    program.now += 2.0
    system = collector.get_current_window_metrics().system
    assert system is not None
    assert (system.prefill_queue_length, system.prefill_queue_tokens, system.oldest_wait_s) == (1, 10, 2.0)
    assert (system.running_prefill, system.running_decode) == (1, 1)
    collector.record_system_metrics(SystemMetrics(timestamp=0.0, running_decode=7))
    system = collector.get_current_window_metrics().system
    assert system is not None
    assert system.running_decode == 7


def test_reported_windows_move_the_split_and_have_a_cooldown() -> None:
    owner, now = Owner(), [1000.0]
    manager = SLOAwareResourceManager(
        slo_target=SLOTarget(ttft_target_ms=100.0, tpot_target_ms=50.0),
        process_rotation_manager=owner,
        window_size_seconds=30.0,
        adjustment_cooldown_seconds=60.0,
    )
    manager._reports._collector.clock = lambda: now[0]
    manager._reports.reset_window()
    moves = []
    for _ in range(12):
        for _ in range(5):
            now[0] += 1.0
            report = WorkloadMetrics(
                timestamp=0.0, prefill_throughput=1000.0, decode_throughput=100.0, ttft_p95=80.0, tpot_p95=200.0
            )
            manager.report_metrics(report)
        decision = manager.controller.step()
        if decision is not None and decision.moves:
            moves.append(now[0])
            assert decision.violations == {"tpot": 4.0}
    assert len(moves) == 1
    assert owner.splits[1].decode_percentage > 30
    assert manager.get_status()["statistics"]["total_adjustments"] == 1
