"""Arguments of the offline benchmark."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbserve import Config, PdDisaggConfig, SamplingParams
from hbserve.bench.model_cost import default_load_format, find_model
from hbserve.bench.workload import PRESETS, LengthRange, WorkloadShape
from hbserve.errors import ConfigError

_ENGINE_FLAGS = (
    "mode",
    "device",
    "dtype",
    "load_format",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "chunk_size",
    "num_blocks",
    "memory_fraction",
    "attention_backend",
)
"""Flags that are fields of `PdDisaggConfig`; one that is not given leaves the engine's default."""


@dataclass(frozen=True)
class OfflineOptions:
    """What to run.

    Attributes:
        model: folder of the model.
        preset: name of the workload that ``shape`` began as.
        seed: of the draws.
        sampling: of every request, but for its length and seed; request i has this seed + i.
        repeats: measured runs.
        warmup: run the whole workload once before, unmeasured; else only one short request.
        engine: arguments of `hbserve.LLM` beside the model.
        json: file for the results; None: none.
    """

    model: Path
    preset: str
    shape: WorkloadShape
    seed: int
    sampling: SamplingParams
    repeats: int
    warmup: bool
    engine: dict[str, Any]
    json: Path | None

    @staticmethod
    def from_arguments(arguments: argparse.Namespace) -> OfflineOptions:
        """From what `add_arguments` has declared.

        Raises:
            ConfigError, InvalidRequestError: naming the argument that cannot be honoured.
        """
        model = find_model(arguments.model)
        preset = PRESETS[arguments.preset]
        check_new_file("--json", arguments.json)
        return OfflineOptions(
            model=model,
            preset=arguments.preset,
            shape=WorkloadShape(
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
        """The engine's whole configuration, as it will be.

        Raises:
            ConfigError: naming the field that cannot be honoured.
        """
        try:
            return PdDisaggConfig.from_arguments(str(self.model), **self.engine).freeze()
        except TypeError as error:
            raise ConfigError(f"--engine-arg: {error}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; see `OfflineOptions.from_arguments`."""
    parser.add_argument(
        "--model", default="qwen3-0.6b", help="a model folder, or a shape under configs/models (default: qwen3-0.6b)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there: configuration and runs")

    workload = parser.add_argument_group("workload")
    workload.add_argument(
        "--preset",
        default="nano",
        choices=list(PRESETS),
        help="nano (default): nano-vllm's benchmark; one-stream: 1 sequence, 512 tokens in, 256 out; "
        "prefill: 8 prompts of 4096 tokens, 1 token out. The next three replace a part of it",
    )
    workload.add_argument("--num-seqs", type=positive, metavar="N", help="requests, all there at once")
    workload.add_argument("--input-len", type=lengths, metavar="LOW:HIGH", help="prompt tokens, uniform")
    workload.add_argument("--output-len", type=lengths, metavar="LOW:HIGH", help="generated tokens, uniform")
    workload.add_argument("--seed", type=int, default=0, help="of the draws and of the sampling (default: 0)")
    workload.add_argument("--temperature", type=float, default=0.6, help="of the sampling (default: 0.6)")
    workload.add_argument("--repeats", type=positive, default=3, metavar="N", help="measured runs (default: 3)")
    workload.add_argument(
        "--warmup", action="store_true", help="one whole run before, unmeasured (default: one short request)"
    )

    add_engine_arguments(parser)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the engine that is started."""
    engine = parser.add_argument_group("engine", "what is not given is left at the engine's default")
    engine.add_argument("--mode", help="unified (default), disaggregated, ...")
    engine.add_argument("--device", help="auto, cpu or cuda")
    engine.add_argument("--dtype", help="auto, bfloat16, float16 or float32")
    engine.add_argument(
        "--load-format",
        choices=["dummy", "safetensors"],
        help="dummy: random weights (default: safetensors if the folder has any, else dummy)",
    )
    engine.add_argument("--max-model-len", type=positive, metavar="TOKENS")
    engine.add_argument("--max-num-seqs", type=positive, metavar="N")
    engine.add_argument("--max-num-batched-tokens", type=positive, metavar="TOKENS")
    engine.add_argument("--chunk-size", type=positive, metavar="TOKENS")
    kv_pool = engine.add_mutually_exclusive_group()
    kv_pool.add_argument("--num-blocks", type=positive, metavar="N", help="KV blocks per instance")
    kv_pool.add_argument("--memory-fraction", type=float, metavar="SHARE", help="of free memory, for the KV blocks")
    engine.add_argument("--attention-backend", help="auto, sdpa, flashinfer or flash_attn")
    engine.add_argument("--no-cuda-graph", action="store_true", help="run every step eagerly")
    engine.add_argument(
        "--engine-arg",
        action="append",
        default=[],
        type=_key_value,
        metavar="KEY=VALUE",
        help="any other argument of hbserve.LLM; the value as JSON, else as text; may be repeated",
    )


def engine_arguments(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Arguments of `hbserve.LLM` from what `add_engine_arguments` has declared.

    Raises:
        ConfigError: if one is given twice.
    """
    return {"mode": "unified", "load_format": default_load_format(model), "log_level": "WARNING"} | given_arguments(
        arguments
    )


def given_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, and no defaults. Raises as `engine_arguments`."""
    given = {name: getattr(arguments, name) for name in _ENGINE_FLAGS if getattr(arguments, name) is not None}
    if arguments.no_cuda_graph:
        given["cuda_graph_enabled"] = False
    for key, value in arguments.engine_arg:
        if key in given:
            raise ConfigError(f"--engine-arg: {key} is given twice")
        given[key] = value
    return given


def check_new_file(option: str, path: Path | None) -> None:
    """Refuse a file that cannot be written, before anything is measured.

    Raises:
        ConfigError: naming the option and the folder that is not there.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"{option}: there is no folder {path.absolute().parent}")


def positive(text: str) -> int:
    """A positive whole number, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def lengths(text: str) -> LengthRange:
    """A range of lengths, for argparse."""
    try:
        return LengthRange.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _key_value(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key.replace("-", "_"), json.loads(value)
    except ValueError:
        return key.replace("-", "_"), value
