"""Command line arguments that several benchmarks share: the model, the engine, the load, output files."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hbserve import PdDisaggConfig
from hbserve.bench.request_batch import LengthRange
from hbserve.bench.serve_workload import DEFAULT_INPUT_LEN, DEFAULT_OUTPUT_LEN
from hbserve.errors import ConfigError, HBServeError
from hbserve.model_source import SHAPES, resolve_model
from hbserve.model_store import fetch_model

_ENGINE_FLAGS = (
    *("mode", "device", "dtype", "load_format", "max_model_len", "max_num_seqs", "max_num_batched_tokens"),
    *("chunk_size", "num_blocks", "memory_fraction", "attention_backend", "quantization", "kv_cache_dtype"),
)
"""Flags that are fields of `PdDisaggConfig`; one that is not given leaves the engine's default."""


def find_model(name: str) -> Path:
    """Return a model's folder, or the shape of that name.

    Raises:
        ConfigError: naming the shapes there are.
    """
    if (SHAPES / name / "config.json").is_file() and not Path(name).exists():
        return SHAPES / name
    try:
        source = resolve_model(name)
    except ConfigError as error:
        shapes = ", ".join(sorted(path.parent.name for path in SHAPES.glob("*/config.json")))
        raise ConfigError(f"--model: {error}; shapes without weights: {shapes}", "model") from None
    folder = fetch_model(source)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model: {folder} has no config.json", "model")
    return folder


def default_load_format(folder: Path) -> str:
    """Return ``safetensors`` where the folder has weights, else ``dummy``."""
    return "safetensors" if any(folder.glob("*.safetensors")) else "dummy"


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the engine that is started."""
    engine = parser.add_argument_group("engine", "an option that is not given has the engine's default")
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
    engine.add_argument("--attention-backend", help="auto, sdpa, flashinfer, flash_attn or triton")
    engine.add_argument("--quantization", help="fp8 quantises the weights while they are loaded")
    engine.add_argument("--kv-cache-dtype", help="auto or fp8")
    engine.add_argument("--no-cuda-graph", action="store_true", help="run every step eagerly")
    add_engine_arg(engine)


def add_engine_arg(parser: argparse._ActionsContainer) -> None:
    """Declare ``--engine-arg``, which sets any argument of `hbserve.LLM`."""
    parser.add_argument(
        "--engine-arg",
        action="append",
        default=[],
        type=_key_value,
        metavar="KEY=VALUE",
        help="any other argument of hbserve.LLM; the value as JSON, else as text; may be repeated",
    )


def given_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the engine arguments that were given, without defaults.

    Raises:
        ConfigError: if one is given twice.
    """
    given = {name: getattr(arguments, name) for name in _ENGINE_FLAGS if getattr(arguments, name) is not None}
    if arguments.no_cuda_graph:
        given["cuda_graph_enabled"] = False
    for key, value in arguments.engine_arg:
        if key in given:
            raise ConfigError(f"--engine-arg: {key} is given twice")
        given[key] = value
    return given


def engine_arguments(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Return the arguments of `hbserve.LLM` beside the model, the benchmarks' defaults included.

    Raises:
        ConfigError: if one is given twice.
    """
    defaults = {"mode": "unified", "load_format": default_load_format(model), "log_level": "WARNING"}
    return defaults | given_arguments(arguments)


def make_config(model: Path, engine: dict[str, Any]) -> PdDisaggConfig:
    """Build the configuration of an engine.

    Raises:
        ConfigError: naming the field that cannot be honoured.
    """
    try:
        return PdDisaggConfig.from_arguments(str(model), **engine)
    except TypeError as error:
        raise ConfigError(f"--engine-arg: {error}") from None


def add_load_arguments(parser: argparse._ActionsContainer) -> None:
    """Declare which requests come, but for their rate."""
    random = "of requests without a trace"
    parser.add_argument("--duration", type=positive_float, metavar="S", help="requests come for so many seconds")
    parser.add_argument("--num-requests", type=positive, metavar="N", help="at most so many")
    for name, default in (("--input-len", DEFAULT_INPUT_LEN), ("--output-len", DEFAULT_OUTPUT_LEN)):
        parser.add_argument(name, type=lengths, default=default, metavar="LOW:HIGH", help=random)
    parser.add_argument("--max-input-len", type=positive, metavar="TOKENS", help="cut longer prompts to this")


def check_new_file(option: str, path: Path | None) -> None:
    """Refuse a file that cannot be written, before anything is measured.

    Raises:
        ConfigError: naming the option and the folder that does not exist.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"{option}: there is no folder {path.absolute().parent}")


def run_command(command: Callable[[argparse.Namespace], object], arguments: argparse.Namespace) -> int:
    """Run a command; print an `HBServeError`, or an error of a file such as a full disk, as one line.

    Return the exit code.
    """
    try:
        command(arguments)
    except (HBServeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


# --- types for argparse ----------------------------------------------------------------------------


def positive(text: str) -> int:
    """Read a positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def natural(text: str) -> int:
    """Read a whole number of at most 32 bits, or zero."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^32 - 1")
    return int(text)


def positive_float(text: str) -> float:
    """Read a positive finite number."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def share(text: str) -> float:
    """Read a number in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not in (0, 1]")
    return value


def lengths(text: str) -> LengthRange:
    """Read a range of lengths."""
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
