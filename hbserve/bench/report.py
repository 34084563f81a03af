"""How results are shown: rates, a table of runs, and a JSON document."""

from __future__ import annotations

import dataclasses
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from hbserve import __version__
from hbserve.bench.floor import Floor
from hbserve.bench.run_record import RunRecord

_LIBRARIES = ("torch", "transformers", "numpy", "pyzmq", "msgspec", "flashinfer-python", "flash-attn")

RUN_HEADER = "run     seconds  prompt tok/s  output tok/s  total tok/s  TFLOP/s  of floor  preempted"
INSTANCE_HEADER = "run     instance          role        steps    busy   host ms"


@dataclass(frozen=True)
class Rates:
    """A run's time as rates.

    Attributes:
        prompt_tok_s, output_tok_s, total_tok_s: tokens per second of the whole run.
        model_tflop_s: the floor's FLOPs, prefill and decode, per second, in 10^12.
        floor_share: the floor's time over the run's; 1 would be the ideal schedule.
    """

    seconds: float
    prompt_tok_s: float
    output_tok_s: float
    total_tok_s: float
    model_tflop_s: float
    floor_share: float

    @staticmethod
    def of(seconds: float, num_prompt_tokens: int, num_output_tokens: int, floor: Floor) -> Rates:
        """Rates of a run that took so long."""
        return Rates(
            seconds=seconds,
            prompt_tok_s=num_prompt_tokens / seconds,
            output_tok_s=num_output_tokens / seconds,
            total_tok_s=(num_prompt_tokens + num_output_tokens) / seconds,
            model_tflop_s=floor.flops / seconds / 1e12,
            floor_share=floor.seconds / seconds,
        )

    @staticmethod
    def of_run(run: RunRecord, floor: Floor) -> Rates:
        """Rates of one run."""
        return Rates.of(run.seconds, run.num_prompt_tokens, run.num_output_tokens, floor)

    @staticmethod
    def of_median(runs: Sequence[RunRecord], floor: Floor) -> Rates:
        """Rates of the median time; all runs have the same numbers of tokens."""
        seconds = statistics.median(run.seconds for run in runs)
        return Rates.of(seconds, runs[0].num_prompt_tokens, runs[0].num_output_tokens, floor)


def run_line(name: str, rates: Rates, preemptions: float) -> str:
    """A line under `RUN_HEADER`."""
    return (
        f"{name:<6}{rates.seconds:9.3f}{rates.prompt_tok_s:14.1f}{rates.output_tok_s:14.1f}"
        f"{rates.total_tok_s:13.1f}{rates.model_tflop_s:9.3f}{rates.floor_share:10.1%}{preemptions:11.0f}"
    )


def instance_lines(name: str, run: RunRecord) -> list[str]:
    """Lines under `INSTANCE_HEADER`, one per instance."""
    return [
        f"{name:<8}{instance:<18}{work.role:<11}{work.steps:6}{work.busy_share:8.1%}{work.host_ms_per_step:10.3f}"
        for instance, work in run.instances.items()
    ]


def runs_as_json(runs: Sequence[RunRecord], floor: Floor) -> dict[str, Any]:
    """Floor, raw runs and medians as plain data; field names as in the classes."""
    return {
        "floor": dataclasses.asdict(floor) | {"seconds": floor.seconds},
        "runs": [dataclasses.asdict(run) | dataclasses.asdict(Rates.of_run(run, floor)) for run in runs],
        "median": dataclasses.asdict(Rates.of_median(runs, floor))
        | {"preemptions": statistics.median(run.preemptions for run in runs)},
    }


def versions() -> dict[str, str]:
    """What ran: HBServe, Python, the operating system and the libraries that are installed."""
    found = {"hbserve": __version__, "python": platform.python_version(), "os": platform.platform()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
