"""The offline benchmark: throughput of a batch that is there at once, as nano-vllm measures it.

It starts an engine in processes of its own, sends the whole batch, and compares the time with the floor.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from hbserve import LLM, Config, SamplingParams
from hbserve.bench import device_limits, report
from hbserve.bench.arguments import (
    add_engine_arguments,
    check_new_file,
    engine_arguments,
    find_model,
    lengths,
    make_config,
    natural,
    positive,
)
from hbserve.bench.device_limits import DeviceLimits
from hbserve.bench.floor import Floor, ModelCost, compute_floor
from hbserve.bench.request_batch import PRESETS, BatchShape, LengthRange, RequestBatch
from hbserve.bench.run_record import RunRecord, run_batch
from hbserve.errors import ConfigError
from hbserve.model_spec import DTYPES, ModelSpec

_SHORT = BatchShape(1, LengthRange(16, 16), LengthRange(16, 16))
"""Shape of the request that is sent before the first measured run."""
_LONG_S = 300.0
"""Runs that take longer are announced, with the options that shorten them."""


@dataclass(frozen=True)
class OfflineOptions:
    """Options of a run.

    Attributes:
        model: folder of the model.
        preset: name of the shape that ``shape`` began as.
        seed: seed of the draws.
        sampling: parameters of every request; request i gets its own length and this seed + i.
        repeats: measured runs.
        warmup: run the whole batch once before, unmeasured; else only one short request.
        engine: arguments of `hbserve.LLM` beside the model.
        json: file for the results; None: none.
    """

    model: Path
    preset: str
    shape: BatchShape
    seed: int
    sampling: SamplingParams
    repeats: int
    warmup: bool
    engine: dict[str, Any]
    json: Path | None

    @staticmethod
    def from_arguments(arguments: argparse.Namespace) -> OfflineOptions:
        """Read what `add_arguments` has declared.

        Raises:
            ConfigError, InvalidRequestError: naming the argument that cannot be honoured.
        """
        model = find_model(arguments.model)
        preset = PRESETS[arguments.preset]
        check_new_file("--json", arguments.json)
        return OfflineOptions(
            model=model,
            preset=arguments.preset,
            shape=BatchShape(
                arguments.num_seqs or preset.num_seqs,
                arguments.input_len or preset.input_len,
                arguments.output_len or preset.output_len,
            ),
            seed=arguments.seed,
            sampling=SamplingParams(temperature=arguments.temperature, seed=arguments.seed, ignore_eos=True),
            repeats=arguments.repeats,
            warmup=arguments.warmup,
            engine=engine_arguments(arguments, model),
            json=arguments.json,
        )

    def engine_config(self) -> Config:
        """Return the engine's whole configuration. Raises as `make_config`."""
        return make_config(self.model, self.engine).freeze()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; see `OfflineOptions.from_arguments`."""
    parser.add_argument(
        "--model", default="qwen3-0.6b", help="a model folder, or a shape under configs/models (default: qwen3-0.6b)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write configuration and runs to this file")
    batch = parser.add_argument_group("batch")
    batch.add_argument(
        "--preset",
        default="nano",
        choices=list(PRESETS),
        help="nano (default): nano-vllm's benchmark; one-stream: 1 sequence, 512 tokens in, 256 out; "
        "prefill: 8 prompts of 4096 tokens, 1 token out. The next three options replace a part of it",
    )
    batch.add_argument("--num-seqs", type=positive, metavar="N", help="requests, all there at once")
    batch.add_argument("--input-len", type=lengths, metavar="LOW:HIGH", help="prompt tokens, uniform")
    batch.add_argument("--output-len", type=lengths, metavar="LOW:HIGH", help="generated tokens, uniform")
    batch.add_argument("--seed", type=natural, default=0, help="of the draws and of the sampling (default: 0)")
    batch.add_argument("--temperature", type=float, default=0.6, help="of the sampling (default: 0.6)")
    batch.add_argument("--repeats", type=positive, default=3, metavar="N", help="measured runs (default: 3)")
    batch.add_argument(
        "--warmup", action="store_true", help="one whole run before, unmeasured (default: one short request)"
    )
    add_engine_arguments(parser)


def run(options: OfflineOptions) -> None:
    """Measure the device, start the engine, run the batch, print a table and write the JSON file.

    Raises:
        HBServeError: if the engine fails; `ConfigError` for options that cannot be run.
    """
    config = options.engine_config()
    spec = ModelSpec.load(options.model, config.model.quantization, config.kv_cache.dtype)
    batch = RequestBatch.draw(options.shape, options.seed, spec.vocab_size)
    if batch.longest > spec.max_position_embeddings:
        raise ConfigError(
            f"the longest sequence has {batch.longest} tokens; the model takes {spec.max_position_embeddings}. "
            "Use a smaller --input-len or --output-len"
        )
    dtype = _serving_dtype(config, spec)
    limits = device_limits.measure(config.model.device, "fp8" if spec.weights_name else dtype)
    skew = config.model.dummy_expert_skew if config.model.load_format == "dummy" else 0.0
    cost = ModelCost(spec, DTYPES[dtype].itemsize, skew)
    floor = _floor(cost, batch, limits, config.model.tensor_parallel_size)
    _show_setting(options, config, batch, limits, floor)

    start = time.perf_counter()
    with LLM(str(options.model), **options.engine) as llm:
        start_s = time.perf_counter() - start
        print(f"engine    {config.mode}, ready after {start_s:.1f} s\n\n{report.RUN_HEADER}", flush=True)
        _warm_up(llm, batch, options)
        runs = []
        for index in range(options.repeats):
            # A later run must not find the first one's prompts in the prefix cache.
            fresh = batch.with_fresh_tokens(f"{options.seed}/{index}") if index else batch
            runs.append(run_batch(llm, fresh, options.sampling))
            print(report.run_line(str(index + 1), report.rates_of([runs[-1]], floor), runs[-1].preemptions), flush=True)
    _show_results(runs, floor)
    if options.json is not None:
        document = _document(options, config, batch, limits) | {"start_s": start_s}
        document |= report.runs_as_json(runs, floor)
        options.json.write_text(json.dumps(document, indent=2) + "\n")


def _serving_dtype(config: Config, spec: ModelSpec) -> str:
    if config.model.dtype != "auto":
        return config.model.dtype
    return next(name for name, dtype in DTYPES.items() if dtype == spec.dtype)


def _floor(cost: ModelCost, batch: RequestBatch, limits: DeviceLimits, num_devices: int) -> Floor:
    """Compute the floor of one instance. At best its ranks share all bytes and FLOPs evenly."""
    return compute_floor(
        cost,
        batch.input_lens,
        batch.output_lens,
        copy_bytes_per_s=limits.copy_gb_s * 1e9 * num_devices,
        matmul_flops_per_s=limits.matmul_tflop_s * 1e12 * num_devices,
    )


def _warm_up(llm: LLM, batch: RequestBatch, options: OfflineOptions) -> None:
    if options.warmup:
        warm_up = batch.with_fresh_tokens(f"{options.seed}/warm-up")
    else:
        warm_up = RequestBatch.draw(_SHORT, options.seed + 1, batch.vocab_size)
    run_batch(llm, warm_up, options.sampling)


def _show_setting(
    options: OfflineOptions, config: Config, batch: RequestBatch, limits: DeviceLimits, floor: Floor
) -> None:
    print(
        f"model     {options.model.name}, {limits.dtype}, {config.model.load_format} weights, "
        f"KV {config.kv_cache.dtype}\n"
        f"workload  {len(batch.prompts)} sequences, {batch.num_prompt_tokens} tokens in, "
        f"{batch.num_output_tokens} out\n"
        f"device    {limits.name}: copy {limits.copy_gb_s:.1f} GB/s, matmul {limits.matmul_tflop_s:.2f} TFLOP/s\n"
        f"floor     {floor.seconds:.3f} s: prefill {floor.prefill_s:.3f} s, decode {floor.decode_s:.3f} s "
        f"in {floor.decode_steps} steps; {batch.num_output_tokens / floor.seconds:.1f} output tok/s",
        flush=True,
    )
    seconds = floor.seconds * (options.repeats + options.warmup)
    if seconds > _LONG_S:
        print(
            f"          all runs together take at least {seconds / 60:.0f} minutes on this device; "
            "--preset one-stream, --num-seqs and --repeats make them shorter",
            flush=True,
        )


def _show_results(runs: list[RunRecord], floor: Floor) -> None:
    preemptions = statistics.median(run.preemptions for run in runs)
    print(report.run_line("median", report.rates_of(runs, floor), preemptions))
    print(f"\n{report.INSTANCE_HEADER}")
    for index, record in enumerate(runs):
        print("\n".join(report.instance_lines(str(index + 1), record)), flush=True)
    for index, record in enumerate(runs):
        if record.drafts:
            print(f"{index + 1:<8}{report.drafts_line(record.drafts)}", flush=True)


def _document(options: OfflineOptions, config: Config, batch: RequestBatch, limits: DeviceLimits) -> dict[str, Any]:
    """Return the setting of the runs as plain data."""
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
            "num_prompt_tokens": batch.num_prompt_tokens,
            "num_output_tokens": batch.num_output_tokens,
        },
        "engine": report.without_folders(msgspec.to_builtins(config)),
    }
