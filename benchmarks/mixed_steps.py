"""What a step costs by its size: prompt tokens alone, and the same with decode rows beside them.

    python -m benchmarks mixed_steps --model qwen3-8b --json steps.json

One model runner in this process, with random weights, repeats each step as a busy worker does. All sizes are measured
in turn, several times, because a card changes its clock while it works.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from hbserve.bench.arguments import check_new_file, find_model, positive
from hbserve.bench.report import versions
from hbserve.policy.probe_step import ProbeSize

_ALONE = (256, 512, 544, 576, 640, 768, 1024, 1088, 1536, 1920, 1984, 2048, 2064, 2112, 2304, 3072, 4032, 4096, 4160)
_MIXED = (480, 512, 1024, 1984, 2016, 2048, 4064, 4096)
_ROWS = ((1, 1024), (16, 1024), (32, 1024), (64, 1024), (16, 8192))
_MEASURED_S = 0.2
_NUM_BLOCKS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", required=True, help="folder, or a shape under configs/models")
    parser.add_argument("--rounds", type=positive, default=2, metavar="N", help="measurements of each size")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")


def run(arguments: argparse.Namespace) -> None:
    """Measure all sizes, print a table, write the file."""
    check_new_file("--json", arguments.json)
    import torch

    from hbserve.config import from_dict
    from hbserve.engine.model_runner import ModelRunner
    from hbserve.platform import make_platform
    from hbserve.profile.stepper import Work, measure

    config = from_dict(
        {
            "mode": "unified",
            "model": {"path": str(find_model(arguments.model)), "load_format": "dummy"},
            "performance": {"max_num_seqs": 128, "num_blocks": _NUM_BLOCKS},
        }
    )
    platform = make_platform("cuda", 0, None, 1)
    platform.activate()
    decodes = [ProbeSize(0, 0, rows, context) for rows, context in _ROWS]
    alone = [ProbeSize(tokens) for tokens in _ALONE]
    mixed = [ProbeSize(tokens, 0, rows, context) for tokens in _MIXED for rows, context in _ROWS]
    times_ms: dict[ProbeSize, list[float]] = {size: [] for size in (*decodes, *alone, *mixed)}
    with torch.inference_mode():
        runner = ModelRunner(config, config.gpu_instances[0], platform)
        for _ in range(arguments.rounds):
            for size, measured in times_ms.items():
                tokens, start, rows, context = size
                work = Work(
                    tokens=tokens,
                    prompt_context=start,
                    batch=rows,
                    context=context,
                    seconds=_MEASURED_S,
                    first_block=0,
                    num_blocks=_NUM_BLOCKS,
                )
                measured.append(measure(runner, work).ms)
        device = platform.describe()
    ms = {size: statistics.median(measured) for size, measured in times_ms.items()}
    steps = [{**size._asdict(), "ms": ms[size], "measured_ms": times_ms[size]} for size in times_ms]
    arguments.json.write_text(json.dumps({"device": device, "versions": versions(), "steps": steps}) + "\n")
    print("alone (tokens: ms): " + ", ".join(f"{size.prompt_tokens}: {ms[size]:.2f}" for size in alone))
    print(
        "decode (rows x context: ms): " + ", ".join(f"{s.decode_rows}x{s.decode_context}: {ms[s]:.2f}" for s in decodes)
    )
    print("prompt tokens, then ms beside each of these:")
    for tokens in _MIXED:
        row = [ms[ProbeSize(tokens, 0, rows, context)] for rows, context in _ROWS]
        print(f"{tokens:6} " + " ".join(f"{value:7.2f}" for value in row))
