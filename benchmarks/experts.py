"""A mixture of experts on two cards of one host, in each way to use them, beside one card.

`python -m benchmarks experts` starts one system after the other: one card; two cards that share every expert (tensor
parallelism), that have whole experts each, that hold a replica each, and that prefill and decode apart. Each captures
its graphs, runs a warm-up, then one stream and a batch. On a CPU the cards are processes, which shows that it works,
not how fast it is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from hbserve import LLM, SamplingParams
from hbserve.bench.arguments import find_model
from hbserve.bench.request_batch import PRESETS, BatchShape, LengthRange, RequestBatch
from hbserve.bench.run_record import run_batch
from hbserve.errors import HBServeError

_ONE_CARD = "one card"
_SMALL = {
    "one_stream": BatchShape(1, LengthRange(64, 64), LengthRange(16, 16)),
    "batch": BatchShape(4, LengthRange(10, 100), LengthRange(10, 30)),
}
_LARGE = {"one_stream": PRESETS["one-stream"], "batch": PRESETS["nano"]}
_SETTLE_S = 8.0
"""Time in which idle ranks capture the rest of their CUDA graphs, or they would do it within a measured run: two ranks
of a model of 48 layers took 4 s."""


def _systems(device: str) -> dict[str, dict[str, Any]]:
    def on_cards(first: str, second: str) -> list[dict[str, Any]]:
        kinds = enumerate((first, second))
        return [{"instance_id": f"card{card}", "instance_type": kind, "gpu_id": card} for card, kind in kinds]

    common = {"device": device}
    return {
        _ONE_CARD: common | {"mode": "unified"},
        "tensor parallelism": common | {"mode": "unified", "tensor_parallel_size": 2},
        "whole experts": common | {"mode": "unified", "tensor_parallel_size": 2, "expert_parallel": True},
        "two replicas": common | {"mode": "unified", "gpu_instances": on_cards("unified", "unified")},
        "prefill and decode": common | {"mode": "disaggregated", "gpu_instances": on_cards("prefill", "decode")},
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the experiment."""
    parser.add_argument("--model", default="qwen3-30b-a3b", help="model with experts: a folder or a shape")
    parser.add_argument("--layers", type=int, help="number of layers, to start sooner; default: all")
    parser.add_argument("--quantization", choices=["fp8"], help="quantise the weights; default: bfloat16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--repeats", type=int, default=2, help="measured runs of each kind; the best one is shown")
    parser.add_argument("--json", type=Path, help="file for the results")


def run(arguments: argparse.Namespace) -> int:
    """Measure all systems; return the exit code, 1 if one of them failed."""
    document = json.loads((find_model(arguments.model) / "config.json").read_text())
    if arguments.layers is not None:
        document["num_hidden_layers"] = arguments.layers
    rows: dict[str, dict[str, float]] = {}
    failed = False
    with tempfile.TemporaryDirectory(prefix="hbserve-experts-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(document))
        print(f"{'':20} {'ready':>8} {'one stream':>16} {'batch':>16}")
        for name, options in _systems(arguments.device).items():
            try:
                rows[name] = _measure(folder, document["vocab_size"], arguments, options)
            except HBServeError as error:
                failed = True
                print(f"{name:20} {error}", flush=True)
                continue
            _print(name, rows)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(rows, indent=1))
    return int(failed)


def _measure(folder: str, vocab_size: int, arguments: argparse.Namespace, options: dict[str, Any]) -> dict[str, float]:
    shapes = _LARGE if arguments.device == "cuda" else _SMALL
    sizes: dict[str, Any] = {"max_num_seqs": shapes["batch"].num_seqs, "max_model_len": 4096}
    if arguments.quantization is not None:
        options = options | {"quantization": arguments.quantization}
    began = time.monotonic()
    with LLM(folder, load_format="dummy", log_level="WARNING", **sizes, **options) as llm:
        row = {"ready_s": time.monotonic() - began}
        if arguments.device == "cuda":
            time.sleep(_SETTLE_S)
        for kind, shape in shapes.items():
            rates = []
            for seed in range(arguments.repeats + 1):
                batch = RequestBatch.draw(shape, seed, vocab_size)
                record = run_batch(llm, batch, SamplingParams(temperature=0.6, seed=seed, ignore_eos=True))
                rates.append(record.num_output_tokens / record.seconds)
            row[f"{kind}_tokens_per_s"] = max(rates[1:])
    return row


def _print(name: str, rows: dict[str, dict[str, float]]) -> None:
    row, first = rows[name], rows.get(_ONE_CARD)
    cells = []
    for kind in ("one_stream_tokens_per_s", "batch_tokens_per_s"):
        times = "" if first is None else f" ({row[kind] / first[kind]:.2f})"
        cells.append(f"{row[kind]:.0f}{times}")
    print(f"{name:20} {row['ready_s']:6.1f} s {cells[0]:>16} {cells[1]:>16}", flush=True)
