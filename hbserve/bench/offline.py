"""Throughput of a batch that is there at once, as nano-vllm measures it."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from datetime import UTC, datetime
from typing import Any

import msgspec

from hbserve import LLM, Config
from hbserve.bench import device_limits, report
from hbserve.bench.device_limits import DeviceLimits
from hbserve.bench.floor import Floor, compute_floor
from hbserve.bench.model_cost import ModelCost
from hbserve.bench.offline_options import OfflineOptions
from hbserve.bench.run_record import RunRecord, run_workload
from hbserve.bench.workload import LengthRange, Workload, WorkloadShape
from hbserve.errors import ConfigError
from hbserve.model_spec import DTYPES, ModelSpec

_SHORT = WorkloadShape(1, LengthRange(16, 16), LengthRange(16, 16))
"""The request that is sent before the first measured run."""


def run(options: OfflineOptions) -> None:
    """Measure the device, start the engine, run the workload, print a table and write the JSON file.

    Raises:
        HBServeError: whatever the engine raises, and `ConfigError` for what cannot be run.
    """
    config = options.engine_config()
    spec = ModelSpec.load(options.model)
    workload = Workload.draw(options.shape, options.seed, spec.vocab_size)
    if workload.longest > spec.max_position_embeddings:
        raise ConfigError(
            f"the longest sequence has {workload.longest} tokens; the model takes {spec.max_position_embeddings}. "
            "Use a smaller --input-len or --output-len"
        )
    dtype = _serving_dtype(config, spec)
    limits = device_limits.measure(config.model.device, dtype)
    floor = _floor(ModelCost(spec, DTYPES[dtype].itemsize), workload, limits, config.model.tensor_parallel_size)
    _show_setting(options, config, workload, limits, floor)

    start = time.perf_counter()
    with LLM(str(options.model), **options.engine) as llm:
        start_s = time.perf_counter() - start
        print(f"engine    {config.mode}, ready after {start_s:.1f} s\n\n{report.RUN_HEADER}", flush=True)
        _warm_up(llm, workload, options)
        runs = []
        for index in range(options.repeats):
            # a later run must not find the first one's prompts in the prefix cache
            fresh = workload.with_fresh_tokens(f"{options.seed}/{index}") if index else workload
            runs.append(run_workload(llm, fresh, options.sampling))
            rates = report.Rates.of_run(runs[-1], floor)
            print(report.run_line(str(index + 1), rates, runs[-1].preemptions), flush=True)
    _show_results(runs, floor)
    if options.json is not None:
        document = _document(options, config, workload, limits) | {"start_s": start_s}
        document |= report.runs_as_json(runs, floor)
        options.json.write_text(json.dumps(document, indent=2) + "\n")


def _serving_dtype(config: Config, spec: ModelSpec) -> str:
    if config.model.dtype != "auto":
        return config.model.dtype
    return next(name for name, dtype in DTYPES.items() if dtype == spec.dtype)


def _floor(cost: ModelCost, workload: Workload, limits: DeviceLimits, num_devices: int) -> Floor:
    """Ranks of one instance share all bytes and FLOPs evenly, at best."""
    return compute_floor(
        cost,
        workload.input_lens,
        workload.output_lens,
        copy_bytes_per_s=limits.copy_gb_s * 1e9 * num_devices,
        matmul_flops_per_s=limits.matmul_tflop_s * 1e12 * num_devices,
    )


def _warm_up(llm: LLM, workload: Workload, options: OfflineOptions) -> None:
    if options.warmup:
        warm_up = workload.with_fresh_tokens(f"{options.seed}/warm-up")
    else:
        warm_up = Workload.draw(_SHORT, options.seed + 1, workload.vocab_size)
    run_workload(llm, warm_up, options.sampling)


def _show_setting(
    options: OfflineOptions, config: Config, workload: Workload, limits: DeviceLimits, floor: Floor
) -> None:
    print(
        f"model     {options.model.name}, {limits.dtype}, {config.model.load_format} weights\n"
        f"workload  {len(workload.prompts)} sequences, {workload.num_prompt_tokens} tokens in, "
        f"{workload.num_output_tokens} out\n"
        f"device    {limits.name}: copy {limits.copy_gb_s:.1f} GB/s, matmul {limits.matmul_tflop_s:.2f} TFLOP/s\n"
        f"floor     {floor.seconds:.3f} s: prefill {floor.prefill_s:.3f} s, decode {floor.decode_s:.3f} s "
        f"in {floor.decode_steps} steps; {workload.num_output_tokens / floor.seconds:.1f} output tok/s",
        flush=True,
    )


def _show_results(runs: list[RunRecord], floor: Floor) -> None:
    preemptions = statistics.median(run.preemptions for run in runs)
    print(report.run_line("median", report.Rates.of_median(runs, floor), preemptions))
    print(f"\n{report.INSTANCE_HEADER}")
    for index, record in enumerate(runs):
        print("\n".join(report.instance_lines(str(index + 1), record)), flush=True)


def _document(options: OfflineOptions, config: Config, workload: Workload, limits: DeviceLimits) -> dict[str, Any]:
    """What was run, on what."""
    return {
        "benchmark": "offline",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": report.versions(),
        "device": dataclasses.asdict(limits),
        "model": options.model.name,
        "workload": {
            "preset": options.preset,
            "num_seqs": options.shape.num_seqs,
            "input_len": str(options.shape.input_len),
            "output_len": str(options.shape.output_len),
            "seed": options.seed,
            "temperature": options.sampling.temperature,
            "warmup": options.warmup,
            "num_prompt_tokens": workload.num_prompt_tokens,
            "num_output_tokens": workload.num_output_tokens,
        },
        "engine": msgspec.to_builtins(config),
    }
