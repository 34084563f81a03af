"""``python -m benchmarks``, in the root of the repository: one sub-command per experiment.

The module of the same name has the experiment's ``add_arguments(parser)`` and ``run(arguments)``. Only the module of
the chosen experiment is imported, because some of them need torch and others must start fast.
"""

from __future__ import annotations

import argparse
import signal
import sys
from importlib import import_module

from hbserve.bench.arguments import run_command

_EXPERIMENTS = {
    "front": "what HTTP, tokenizing and detokenizing cost, with an engine that costs nothing",
    "isolation": "what large, slow and malformed requests of one client do to the streams of others",
    "auto": "mode auto on a simulated GPU beside hand-tuned workers, static splits and the bound",
    "attainment": "requests within targets by rate, simulated and measured, as a picture",
    "compare": "the highest rates of several systems, beside the simulator's",
    "first_token": "where a request's time to its first token goes, hop by hop",
    "best_effort": "best-effort requests beside others: what they cost these, and what they get",
    "agreement": "how far the simulator is from runs that were measured",
    "replan": "gaps of streams while roles change, and what learning a profile delays",
    "scheduler": "what the scheduler's core costs: CPU time of a step, by the size of the batch",
    "scheduler_kills": "the scheduler is killed under load: are the answers right, and how long is the pause",
    "transfer": "how fast KV moves between two processes, and how fast the library could move it",
    "experts": "a mixture of experts on one card and, in each way, on two",
    "fp8": "FP8 beside bfloat16 in kernels: products and decode attention",
    "fp8_engine": "FP8 beside bfloat16 in whole engines: batches, and the room for sequences",
    "fp8_accuracy": "what FP8 costs in perplexity, and errors by layer",
    "prefill": "where the time of a prefill goes, by kind of kernel",
    "verify": "what the checksums of KV transfers cost",
    "kv_tiers": "prompts that are loaded from host memory instead of computed",
    "kv_store": "how fast two instances share blocks through the Mooncake Store, beside its own calls",
    "kv_tier_turns": "sessions in turns on a small KV pool, without a host tier and with one",
    "kv_tier_random": "random requests with all tiers and faults: are the answers right",
    "kv_tier_trace": "parts of a trace with a host tier and without, side by side on one device",
    "kv_tier_steps": "what copies to and from host memory cost the steps beside them",
    "kv_tier_bounds": "what a KV tier of a size can be worth at most on a trace",
    "chaos": "killed processes, malformed requests, configurations and model folders, from a seed",
    "speculation": "what drafts bring at a forced acceptance, by batch size",
    "edit": "what drafts from text bring where a real model repeats a text with a change",
    "semi_pd": "prefill and decode that share a device: rotations, losses, gaps",
}


def main() -> int:
    """Parse the arguments and run; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Experiments with HBServe.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in _EXPERIMENTS.items():
        command = commands.add_parser(name, help=summary)
        if name in sys.argv[1:2]:
            import_module(f"benchmarks.{name}").add_arguments(command)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that started processes are ended
    return run_command(import_module(f"benchmarks.{arguments.command}").run, arguments)


if __name__ == "__main__":
    sys.exit(main())
