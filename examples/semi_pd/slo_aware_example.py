"""The SLO controller on a real engine, under a load that flips between prefill-heavy and decode-heavy.

    python examples/semi_pd/slo_aware_example.py --model-path examples/models/hbserve-demo \\
        --ttft-target 200 --tpot-target 50 --initial-prefill-sm 70 --initial-decode-sm 30 --simulation-cycles 6

Without a GPU the split is one of the CPU's threads. A model folder without weights gets random ones.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from pathlib import Path

from hbserve import DisaggregatedLLM, PdDisaggConfig, SamplingParams
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="model folder")
    parser.add_argument("--profile", help="step times, from python -m hbserve.profile")
    parser.add_argument("--ttft-target", type=float, default=100.0, help="milliseconds")
    parser.add_argument("--tpot-target", type=float, default=50.0, help="milliseconds")
    parser.add_argument("--initial-prefill-sm", type=int, default=70, help="percent")
    parser.add_argument("--initial-decode-sm", type=int, default=30, help="percent")
    parser.add_argument("--simulation-cycles", type=int, default=50, help="flips of the load")
    parser.add_argument("--cycle-seconds", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second")
    arguments = parser.parse_args()
    has_weights = any(Path(arguments.model_path).glob("*.safetensors"))
    asyncio.run(run(arguments, "safetensors" if has_weights else "dummy"))


async def run(arguments: argparse.Namespace, load_format: str) -> None:
    """Start the engine, drive it, show the decisions of the controller, end it."""
    slo = {"ttft_target_ms": arguments.ttft_target, "tpot_target_ms": arguments.tpot_target}
    config = PdDisaggConfig.from_arguments(
        arguments.model_path,
        mode="semi_pd",
        load_format=load_format,
        prefill_percentage=arguments.initial_prefill_sm,
        decode_percentage=arguments.initial_decode_sm,
        slo=slo | ({"profile": arguments.profile} if arguments.profile else {}),
        log_level="WARNING",
    )
    async with DisaggregatedLLM(config) as llm:
        [manager] = llm.supervisors.values()
        assert isinstance(manager, ProcessRotationManager)
        for cycle in range(arguments.simulation_cycles):
            prefill_heavy = cycle % 2 == 0
            await drive(llm, arguments, cycle, prefill_heavy)
            show(cycle, prefill_heavy, llm, manager)


async def drive(llm: DisaggregatedLLM, arguments: argparse.Namespace, cycle: int, prefill_heavy: bool) -> None:
    """Send requests for one cycle: long prompts with short answers, or the reverse; wait for all."""
    generator = random.Random(cycle)
    input_len, output_len = (300, 8) if prefill_heavy else (30, 60)

    sampling = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    async with asyncio.TaskGroup() as group:
        for _ in range(max(1, round(arguments.rate * arguments.cycle_seconds))):
            prompt = [generator.randrange(10, 200) for _ in range(input_len)]
            group.create_task(llm.generate(prompt, sampling))
            await asyncio.sleep(generator.expovariate(arguments.rate))


def show(cycle: int, prefill_heavy: bool, llm: DisaggregatedLLM, manager: ProcessRotationManager) -> None:
    """Print one line per cycle: the load, the latencies of the window, the split and the last decision."""
    window = llm.get_system_stats()["metrics"]["window"]
    status = manager.get_status()
    split = status["current_sm_allocation"]
    controller = status["slo"]
    reason = controller["decisions"][-1]["reason"] if controller["decisions"] else "no window yet"
    print(
        f"{cycle:3} {'prefill' if prefill_heavy else 'decode':7}-heavy  "
        f"TTFT p95 {window['ttft_p95_ms']:7.1f} ms  TPOT p95 {window['tpot_p95_ms']:6.1f} ms  "
        f"split {split['prefill_percentage']:3}/{split['decode_percentage']:3}  "
        f"moves {controller['statistics']['total_adjustments']}  ({reason})",
        flush=True,
    )


if __name__ == "__main__":
    main()
