"""FP8 beside bfloat16 in whole engines: one engine after the other serves the same batches, each beside its floor.

Weights are random. The KV of the engine with FP8 weights is in FP8, too. A batch of 512 sequences shows how many more
of them FP8's pool has room for: an engine whose pool is too small preempts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from hbserve import LLM, SamplingParams
from hbserve.bench import device_limits, report
from hbserve.bench.arguments import add_engine_arguments, check_new_file, engine_arguments, find_model, positive
from hbserve.bench.floor import ModelCost, compute_floor
from hbserve.bench.request_batch import PRESETS, BatchShape, LengthRange, RequestBatch
from hbserve.bench.run_record import RunRecord, run_batch
from hbserve.model_spec import ModelSpec

_BATCHES = PRESETS | {"nano-512": dataclasses.replace(PRESETS["nano"], num_seqs=512)}
_WARM_UP = BatchShape(1, LengthRange(16, 16), LengthRange(16, 16))
_OPTIONS: dict[str, dict[str, Any]] = {"bf16": {}, "fp8": {"quantization": "fp8", "kv_cache_dtype": "fp8"}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; see `run`."""
    parser.add_argument("--model", default="qwen3-8b", help="a model folder, or a shape under configs/models")
    parser.add_argument("--engines", nargs="+", default=list(_OPTIONS), choices=list(_OPTIONS))
    parser.add_argument(
        "--batches",
        nargs="+",
        default=list(PRESETS),
        choices=list(_BATCHES),
        help="as the presets of hbserve bench offline; nano-512: twice the sequences",
    )
    parser.add_argument("--repeats", type=positive, default=2, metavar="N", help="runs of each batch (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file, after each run")
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Start an engine, run the batches, print a line for each run; then the next engine.

    Raises:
        HBServeError: if an engine fails, or an argument cannot be honoured.
    """
    check_new_file("--json", arguments.json)
    model = find_model(arguments.model)
    shared = engine_arguments(arguments, model)
    document: dict[str, Any] = {
        "benchmark": "fp8_engine",
        "model": model.name,
        "versions": report.versions(),
        "engine": report.without_folders(shared),
        "engines": {},
    }
    for name in arguments.engines:
        options = shared | _OPTIONS[name]
        spec = ModelSpec.load(model, options.get("quantization"), options.get("kv_cache_dtype", "auto"))
        dtype = str(spec.dtype).removeprefix("torch.")
        limits = device_limits.measure(options.get("device", "auto"), "fp8" if name == "fp8" else dtype)
        cost = ModelCost(spec, spec.dtype.itemsize)
        num_ranks = int(options.get("tensor_parallel_size", 1))
        results: dict[str, Any] = {"device": dataclasses.asdict(limits), "batches": {}}
        document["engines"][name] = results
        started = time.perf_counter()
        with LLM(str(model), **options) as llm:
            results["start_s"] = time.perf_counter() - started
            results["kv_tokens"] = _kv_tokens(llm)
            print(
                f"\n{name}: ready after {results['start_s']:.1f} s, KV for {results['kv_tokens']} tokens, products at "
                f"{limits.matmul_tflop_s:.0f} TFLOP/s\n{report.RUN_HEADER}",
                flush=True,
            )
            sampling = SamplingParams(temperature=0.6, seed=0, ignore_eos=True)
            run_batch(llm, RequestBatch.draw(_WARM_UP, 1, spec.vocab_size), sampling)
            for batch_name in arguments.batches:
                batch = RequestBatch.draw(_BATCHES[batch_name], 0, spec.vocab_size)
                floor = compute_floor(
                    cost,
                    batch.input_lens,
                    batch.output_lens,
                    copy_bytes_per_s=limits.copy_gb_s * 1e9 * num_ranks,
                    matmul_flops_per_s=limits.matmul_tflop_s * 1e12 * num_ranks,
                )
                runs: list[RunRecord] = []
                for attempt in range(arguments.repeats):
                    fresh = batch.with_fresh_tokens(f"{batch_name}/{attempt}")
                    runs.append(run_batch(llm, fresh, sampling))
                    rates = report.rates_of([runs[-1]], floor)
                    print(f"{report.run_line(str(attempt + 1), rates, runs[-1].preemptions)}  {batch_name}", flush=True)
                    results["batches"][batch_name] = report.runs_as_json(runs, floor)
                    if arguments.json is not None:
                        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


def _kv_tokens(llm: LLM) -> int:
    pools = [instance["kv_blocks"] for instance in llm.get_system_stats()["gpu_instances"].values()]
    return min(int(pool["total"] * pool["block_size"]) for pool in pools)
