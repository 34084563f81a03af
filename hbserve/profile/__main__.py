"""``python -m hbserve.profile``: measure a model's steps on this device, for the SLO controller and the simulator."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from hbserve import PdDisaggConfig
from hbserve.bench import plots
from hbserve.bench.arguments import check_new_file, default_load_format, find_model, run_command
from hbserve.config import Config
from hbserve.errors import ConfigError
from hbserve.policy.profile_file import save_profile
from hbserve.policy.profile_store import ProfileKey
from hbserve.policy.step_profile import StepProfile
from hbserve.profile.points import CPU_PLAN, GPU_PLAN, SHORT_GPU_PLAN, ProfilePlan, run_profile


def main(arguments: Sequence[str] | None = None, prog: str = "python -m hbserve.profile") -> int:
    """Parse the arguments and run; return the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--model", required=True, help="a model folder, or the name of a shape, such as qwen3-8b")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the JSON to this file (default: where mode auto looks for it)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture too (.png, .svg)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    parser.add_argument("--seconds", type=float, help="measured time per point")
    parser.add_argument("--no-priority", action="store_true", help="prefill at the same priority as decode")
    parser.add_argument("--short", action="store_true", help="few points, for a first look")
    return run_command(_run, parser.parse_args(arguments))


def _run(arguments: argparse.Namespace) -> None:
    check_new_file("--out", arguments.out)
    check_new_file("--plot", arguments.plot)
    if arguments.plot is not None:
        plots.require_matplotlib("--plot", arguments.plot)
    profile = _profile(arguments)
    path = arguments.out or _path_in_cache(arguments)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_profile(profile, path)
    except OSError as error:
        raise ConfigError(f"--out: cannot write {path}: {error.strerror}") from None
    print(f"written to {path}")
    if arguments.plot is not None:
        _plot(profile, arguments.plot)


def _profile(arguments: argparse.Namespace) -> StepProfile:
    config = _config(arguments)
    plan = CPU_PLAN if _on_cpu(config) else SHORT_GPU_PLAN if arguments.short else GPU_PLAN
    if arguments.seconds is not None:
        if not 0 < arguments.seconds < 60:
            raise ConfigError(f"--seconds: must be in (0, 60), got {arguments.seconds}")
        plan = dataclasses.replace(plan, seconds=arguments.seconds)
    started = time.monotonic()
    profile = run_profile(config, _within(plan, config), lambda line: print(line, flush=True))
    print(f"{profile.model} on {profile.device}: {time.monotonic() - started:.0f} s")
    return profile


def _path_in_cache(arguments: argparse.Namespace) -> Path:
    """Return where `hbserve.policy.profile_store` looks for a profile of this model on this device."""
    from hbserve.platform import mps

    gpus = [] if arguments.device == "cpu" else mps.gpus()
    config = _config(arguments)
    key = ProfileKey.of(config.model, config.kv_cache, gpus[0] if gpus else "cpu")
    if key is None:
        raise ConfigError(f"--out: {config.model.path}/config.json does not name the model's sizes; give a file")
    return key.path


def _config(arguments: argparse.Namespace) -> Config:
    model = find_model(arguments.model)
    # Blocks for the largest decode batch, and room beside them for the workers' contexts and graphs.
    config = PdDisaggConfig.from_arguments(
        str(model),
        mode="semi_pd",
        device=arguments.device,
        dtype=arguments.dtype,
        load_format=default_load_format(model),
        memory_fraction=0.6,
        max_num_seqs=256,
        log_level="WARNING",
    ).freeze()
    if arguments.no_priority:
        config = msgspec.structs.replace(config, semi_pd=msgspec.structs.replace(config.semi_pd, prefill_priority=0))
    return config


def _on_cpu(config: Config) -> bool:
    from hbserve.platform import mps

    return config.model.device == "cpu" or not mps.gpus()


def _within(plan: ProfilePlan, config: Config) -> ProfilePlan:
    """Drop the prompts that a step cannot hold."""
    limit = config.performance.max_num_batched_tokens
    return dataclasses.replace(plan, prompts=tuple(tokens for tokens in plan.prompts if tokens <= limit))


def _plot(profile: StepProfile, path: Path) -> None:
    """Draw step times over percentages, and the splits side by side."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    prefill = [(f"{p.prompt_tokens} after {p.prompt_context}", p.percentage, p.ms) for p in profile.prefill]
    decode = [(f"{p.decode_rows} of {p.decode_context}", p.percentage, p.ms) for p in profile.decode]
    _lines(axes[0], "prefill alone", prefill)
    _lines(axes[1], "decode alone", decode)
    max_tokens = max((point.prompt_tokens for point in profile.pairs), default=0)
    for batch in sorted({point.decode_rows for point in profile.pairs}):
        points = [p for p in profile.pairs if p.decode_rows == batch and p.prompt_tokens == max_tokens]
        axes[2].scatter([p.prefill_ms for p in points], [p.decode_ms for p in points], label=f"batch {batch}")
        for p in points:
            axes[2].annotate(f"{p.prefill_percentage},{p.decode_percentage}", (p.prefill_ms, p.decode_ms), fontsize=7)
    axes[2].set(title="side by side (prefill %, decode %)", xlabel="prefill step, ms", ylabel="decode step, ms")
    if profile.pairs:
        axes[2].legend()
    figure.suptitle(f"{profile.model} on {profile.device}")
    figure.savefig(path)
    pyplot.close(figure)


def _lines(axes: Any, title: str, points: list[tuple[str, int, float]]) -> None:
    for name in dict.fromkeys(label for label, _, _ in points):
        line = sorted((percentage, ms) for label, percentage, ms in points if label == name)
        axes.plot([percentage for percentage, _ in line], [ms for _, ms in line], marker="o", label=name)
    axes.set(title=title, xlabel="percentage", ylabel="ms per step", yscale="log")
    axes.legend(fontsize=7)


if __name__ == "__main__":
    sys.exit(main())
