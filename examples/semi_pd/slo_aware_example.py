"""The SLO controller on a real engine: under a load that misses a target, it moves the split that was asked for.

    python examples/semi_pd/slo_aware_example.py --model-path examples/models/hbserve-demo \\
        --ttft-target 100 --tpot-target 50 --initial-prefill-sm 70 --initial-decode-sm 30 --simulation-cycles 50

The program is its own client: it sends long prompts with short answers, reports the life of each request to a metrics
collector, and doubles the number of clients until a target is missed. Then it starts the controller. One line for each
cycle shows the load, the latencies of the last seconds and the split; each decision is shown with its numbers.

Without a GPU the split is one of the CPU's threads. A model folder without weights gets random ones.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from hbserve import DisaggregatedLLM, PdDisaggConfig, SamplingParams
from hbserve.errors import HBServeError
from hbserve.policy.profile_file import load_profile, profiled_predictor
from hbserve.semi_pd.metrics_collector import AggregatedMetrics, SemiPDMetricsCollector
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager
from hbserve.semi_pd.slo_algorithm import SLOAwareResourceController, SLOConstraints
from hbserve.slo.constraints import SMAllocation, SplitBounds
from hbserve.slo.latency_model import LatencyModel
from hbserve.slo.split_policy import Decision

WINDOW_S = 5.0
MAX_CLIENTS = 64
CYCLES_PER_STEP = 4
"""Cycles between two doublings of the load."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="model folder")
    parser.add_argument("--profile", help="step times of the device, from python -m hbserve.profile")
    parser.add_argument("--ttft-target", type=float, default=100.0, help="milliseconds")
    parser.add_argument("--tpot-target", type=float, default=50.0, help="milliseconds")
    parser.add_argument("--initial-prefill-sm", type=int, default=70, help="percent")
    parser.add_argument("--initial-decode-sm", type=int, default=30, help="percent")
    parser.add_argument("--simulation-cycles", type=int, default=50)
    parser.add_argument("--cycle-seconds", type=float, default=1.0)
    parser.add_argument("--prompt-tokens", type=int, default=600)
    parser.add_argument("--output-tokens", type=int, default=8)
    arguments = parser.parse_args()
    has_weights = any(Path(arguments.model_path).glob("*.safetensors"))
    try:
        asyncio.run(run(arguments, "safetensors" if has_weights else "dummy"))
    except HBServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


async def run(arguments: argparse.Namespace, load_format: str) -> None:
    """Start the engine, drive it, and end it."""
    constraints = SLOConstraints(ttft_target_ms=arguments.ttft_target, tpot_target_ms=arguments.tpot_target)
    config = PdDisaggConfig.from_arguments(
        arguments.model_path,
        mode="semi_pd",
        load_format=load_format,
        prefill_percentage=arguments.initial_prefill_sm,
        decode_percentage=arguments.initial_decode_sm,
        mixed=False,
        ladder={"prefill": [], "decode": [], "unified": []},  # so that every worker has the share of the split
        log_level="WARNING",
    )
    print(f"targets: TTFT {arguments.ttft_target:g} ms, TPOT {arguments.tpot_target:g} ms (95 % of the requests)")
    async with DisaggregatedLLM(config) as llm:
        [manager] = llm.supervisors.values()
        assert isinstance(manager, ProcessRotationManager)
        collector = SemiPDMetricsCollector(window_size_seconds=WINDOW_S)
        model = None
        if arguments.profile:
            model = LatencyModel(profiled_predictor(load_profile(arguments.profile)), constraints)
        controller = SLOAwareResourceController(
            constraints, collector, manager, monitoring_interval=WINDOW_S / 4, bounds=SplitBounds(), model=model
        )
        manager.attach_controller(controller)
        clients = Clients(llm, collector, arguments)
        show_split("the split that was asked for", manager)
        try:
            await Demonstration(arguments, constraints, manager, collector, controller, clients).run()
        finally:
            await asyncio.to_thread(controller.stop_monitoring)
            await clients.stop()


class Clients:
    """Clients that each send one request after the other, and report it to the collector."""

    def __init__(self, llm: DisaggregatedLLM, collector: SemiPDMetricsCollector, arguments: argparse.Namespace) -> None:
        self._llm, self._collector, self._arguments = llm, collector, arguments
        self._tasks: list[asyncio.Task[None]] = []
        self._numbers = itertools.count()
        self._random = random.Random(0)

    def __len__(self) -> int:
        return len(self._tasks)

    def grow(self, number: int) -> None:
        """Add clients until there are so many."""
        while len(self._tasks) < number:
            self._tasks.append(asyncio.create_task(self._work()))

    async def stop(self) -> None:
        """End all clients."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _work(self) -> None:
        arguments = self._arguments
        sampling = SamplingParams(temperature=0, max_tokens=arguments.output_tokens, ignore_eos=True)
        while True:
            request_id = f"request-{next(self._numbers)}"
            prompt = [self._random.randrange(10, 200) for _ in range(arguments.prompt_tokens)]
            self._collector.record_request_arrival(request_id, input_length=len(prompt))
            self._collector.record_prefill_start(request_id)
            num_tokens = 0
            async for delta in self._llm.stream(prompt, sampling, request_id):
                if not num_tokens:
                    self._collector.record_first_token(request_id)
                    self._collector.record_prefill_end(request_id)
                    self._collector.record_decode_start(request_id)
                num_tokens += len(delta.token_ids)
            self._collector.record_request_completion(request_id, output_length=num_tokens, success=True)


@dataclass
class Demonstration:
    """The story: more load, a missed target, a decision, a change, the gain."""

    arguments: argparse.Namespace
    constraints: SLOConstraints
    manager: ProcessRotationManager
    collector: SemiPDMetricsCollector
    controller: SLOAwareResourceController
    clients: Clients
    shown: int = 0
    loaded_at: float = 0.0
    watched_at: float | None = None
    moved_at: float | None = None
    in_force_at: float | None = None

    async def run(self) -> None:
        """Drive the engine for all cycles, and sum up."""
        asked = self.manager.current_sm_allocation
        self._load(1)
        since_step, split = 0, asked
        for cycle in range(self.arguments.simulation_cycles):
            await asyncio.sleep(self.arguments.cycle_seconds)
            window = self.collector.get_current_window_metrics()
            self._show_cycle(cycle, window)
            since_step += 1
            if self.watched_at is None and since_step >= CYCLES_PER_STEP:
                if self._is_missed(window):
                    self.watched_at = self.collector.clock()
                    print("a target is missed; the controller starts to watch")
                    self.controller.start_monitoring()
                elif len(self.clients) < MAX_CLIENTS:
                    self._load(2 * len(self.clients))
                    since_step = 0
            self._show_decisions()
            if self.manager.current_sm_allocation != split:
                split = self.manager.current_sm_allocation
                self.in_force_at = self.collector.clock()
                show_split("the split in force now", self.manager)
        self._sum_up(asked, split)

    def _load(self, num_clients: int) -> None:
        self.clients.grow(num_clients)
        self.loaded_at = self.collector.clock()

    def _is_missed(self, window: AggregatedMetrics) -> bool:
        slo = self.constraints
        return window.ttft.count >= 3 and (
            window.ttft_p95 > slo.ttft_target_ms * slo.ttft_violation_threshold
            or window.tpot_p95 > slo.tpot_target_ms * slo.tpot_violation_threshold
        )

    def _show_cycle(self, cycle: int, window: AggregatedMetrics) -> None:
        split = self.manager.current_sm_allocation
        print(
            f"{cycle:3}  {len(self.clients):2} client{'s' if len(self.clients) > 1 else ' '}  "
            f"{numbers_of(window)}  split {split.prefill_percentage:3}/{split.decode_percentage:3}",
            flush=True,
        )

    def _show_decisions(self) -> None:
        decisions = list(self.controller.decisions)
        for decision in decisions[self.shown :]:
            if decision.moves:
                self.moved_at = self.moved_at or decision.time
                show_decision(decision)
        self.shown = len(decisions)

    def _sum_up(self, asked: SMAllocation, last: SMAllocation) -> None:
        counts = self.controller.get_controller_status()["statistics"]
        print(f"\nadjustments: {counts['total_adjustments']}, of which {counts['successful_adjustments']} are in force")
        if self.watched_at is None:
            print("no target was missed: lower the targets, or give longer prompts")
        elif self.in_force_at is None or self.moved_at is None:
            reason = self.controller.decisions[-1].reason if self.controller.decisions else "no window was judged"
            print(f"the split was not moved: {reason}")
        else:
            before = self._latencies(self.loaded_at, self.moved_at)
            after = self._latencies(self.in_force_at, self.collector.clock())
            for name in sorted(before.keys() & after.keys(), reverse=True):
                old, new = before[name], after[name]
                change = f"{abs(1 - new / old):.0%} {'less' if new <= old else 'more'}"
                print(f"gain: {name} {old:.1f} ms under {asked} -> {new:.1f} ms under {last}: {change}")

    def _latencies(self, start: float, end: float) -> dict[str, float]:
        """Return mean latencies of the requests that arrived and ended between two moments."""
        requests = [r for r in self.collector.history if r.arrival_time >= start and (r.completion_time or end) <= end]
        found = {
            "mean TTFT": [request.ttft_ms for request in requests if request.ttft_ms is not None],
            "mean TPOT": [request.tpot_ms for request in requests if request.tpot_ms is not None],
        }
        return {name: statistics.fmean(latencies) for name, latencies in found.items() if latencies}


def numbers_of(window: AggregatedMetrics) -> str:
    """Latencies and throughput of a window."""
    return (
        f"TTFT p95 {window.ttft_p95:7.1f} ms  TPOT p95 {window.tpot_p95:6.1f} ms  "
        f"{window.request_throughput:5.1f} requests/s"
    )


def show_split(title: str, manager: ProcessRotationManager) -> None:
    """Print the split and the workers that have it."""
    split = manager.current_sm_allocation
    workers = [worker for worker in manager.get_status()["workers"] if worker["state"] == "active"]
    names = ", ".join(f"{worker['role']} at {worker['percentage']} %" for worker in workers)
    print(f"{title}: prefill {split.prefill_percentage} %, decode {split.decode_percentage} % (workers: {names})")


def show_decision(decision: Decision) -> None:
    """Print a decision with its numbers."""
    violations = ", ".join(
        f"{name.upper()} at {ratio:.1f} times its target" for name, ratio in decision.violations.items()
    )
    load = decision.workload
    print(f"decision: {decision.current} -> {decision.chosen}, because: {decision.reason}")
    print(
        f"  seen: {violations or 'no violation'}; {load.arrival_rate:.1f} requests/s of {load.prompt_tokens:.0f} tokens"
    )
    for name, prediction in (("here", decision.predicted), ("there", decision.best)):
        if prediction is not None:
            print(f"  the model predicts {name}: TTFT {prediction.ttft_ms:.1f} ms, TPOT {prediction.tpot_ms:.1f} ms")
    print(f"  {decision.num_candidates} splits compared; confidence in the model {decision.confidence:.2f}")


if __name__ == "__main__":
    sys.exit(main())
