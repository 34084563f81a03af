"""What is compared: systems of the simulator with engine arguments of their own, and loads with their targets."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from hbserve.bench.request_record import RequestTargets
from hbserve.bench.serve_workload import WorkloadSource
from hbserve.bench.traces import load_trace
from hbserve.config import Config, SchedulerConfig
from hbserve.errors import ConfigError
from hbserve.simulate.config import Sizes
from hbserve.simulate.standard_loads import LOADS, standard_trace
from hbserve.simulate.systems import System

_DURATION_S = 20.0
_SEEDS = 1000
"""Of the runs of a load."""
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class ComparedSystem:
    """A system to start and to simulate.

    Attributes:
        name: as it was given.
        own: arguments of `hbserve.LLM` that only this system has.
    """

    name: str
    system: System
    own: dict[str, Any] = field(default_factory=dict, hash=False)

    @staticmethod
    def parse(text: str) -> ComparedSystem:
        """Read such as ``unified@2048,scheduling_policy=fcfs``: values as JSON, else as text.

        Raises:
            ConfigError: naming what is not KEY=VALUE, or the forms of systems there are.
        """
        form, *pairs = text.split(",")
        own = {}
        for pair in pairs:
            key, separator, value = pair.partition("=")
            if not separator:
                raise ConfigError(f"--system: {pair!r} in {text!r} is not KEY=VALUE")
            try:
                own[key] = json.loads(value)
            except ValueError:
                own[key] = value
        return ComparedSystem(text, System.parse(form), own)

    def arguments(
        self,
        shared: dict[str, Any],
        levels: Any,
        slo: dict[str, Any],
        targets: RequestTargets | None,
        percentile: float,
    ) -> dict[str, Any]:
        """Return the arguments of `hbserve.LLM` beside the model.

        Args:
            shared: those of all systems.
            levels: ladder of systems with a controller; None: the default one.
            slo: further keys of ``semi_pd.slo``.
            targets, percentile: of the controller.

        Raises:
            ConfigError: if the system needs targets and there are none.
        """
        arguments, system = dict(shared), self.system
        if system.form == "unified":
            arguments["mode"] = "unified"
            if system.chunk is not None:
                largest = int(arguments.get("max_num_seqs", 256)) + system.chunk
                arguments |= {"chunk_size": system.chunk, "max_chunk_prefill_tokens": system.chunk}
                arguments["max_num_batched_tokens"] = max(int(arguments.get("max_num_batched_tokens", 8192)), largest)
        elif system.form == "disaggregated":
            arguments["mode"] = "disaggregated"
        else:
            assert system.allocation is not None
            arguments |= {
                "mode": "semi_pd",
                "prefill_percentage": system.allocation.prefill_percentage,
                "decode_percentage": system.allocation.decode_percentage,
                "mixed": system.allocation.mixed,
                "ladder": {"prefill": [], "decode": []} if system.form == "no_ladder" else levels,
            }
            if system.form == "semi_pd":
                arguments["ladder"] = {"prefill": [100], "decode": [100]}
        if system.num_gpus > 1:
            arguments["gpu_instances"] = _instances(system)
        if system.form == "slo":
            if targets is None:
                raise ConfigError("the targets are not known: the first system has failed")
            arguments["slo"] = {
                "ttft_target_ms": targets.ttft_ms,
                "tpot_target_ms": targets.tpot_ms,
                "ttft_percentile": percentile,
                "tpot_percentile": percentile,
                **slo,
            }
        return arguments | self.own

    def sizes(self, shared: dict[str, Any], kv_tokens: int) -> Sizes:
        """Return what the simulator is told of the engine.

        Args:
            shared: as in `arguments`.
        """
        engine = shared | self.own
        return Sizes(
            chunk_size=_optional_int(engine.get("chunk_size")),
            max_chunk_prefill_tokens=_optional_int(engine.get("max_chunk_prefill_tokens")),
            max_num_seqs=int(engine.get("max_num_seqs", Sizes.max_num_seqs)),
            kv_tokens=kv_tokens,
            scheduler=SchedulerConfig(policy=engine.get("scheduling_policy", SchedulerConfig().policy)),
        )


def _optional_int(text: object) -> int | None:
    return None if text is None else int(str(text))


def can_share_instances(running: Config, config: Config) -> bool:
    """Whether instances that were started with ``running`` can serve ``config``: it differs in the scheduler only."""
    tokens = running.performance.max_num_batched_tokens
    same = msgspec.structs.replace(
        config,
        scheduler=running.scheduler,
        chunked_prefill=running.chunked_prefill,
        performance=msgspec.structs.replace(config.performance, max_num_batched_tokens=tokens),
    )
    return same == running and config.performance.max_num_batched_tokens <= tokens


def _instances(system: System) -> list[dict[str, Any]]:
    """Return the instances of a system of several GPUs, one GPU each."""
    roles = [{"unified": "unified", "disaggregated": ""}.get(system.form, "semi_pd")] * system.replicas
    if system.form == "disaggregated":
        roles = (["prefill"] * system.num_prefill + ["decode"] * system.num_decode) * system.replicas
    return [{"instance_id": f"{role}-{n}", "instance_type": role, "gpu_id": n} for n, role in enumerate(roles)]


@dataclass
class Load:
    """A trace, and the targets of its requests.

    Attributes:
        seed: of its first run. No two loads have runs of one seed: their prompts would begin alike, and an instance
            that serves both would find them in its cache.
        duration_s: of a run's arrivals.
        rates: to run at; empty to search.
        targets: of each request; None: not measured yet.
        off_by: reached rates over the simulator's, of the systems so far.
        predicted: the simulator's rate for each system, and the seconds of its runs.
    """

    name: str
    source: WorkloadSource
    seed: int
    duration_s: float
    rates: tuple[float, ...]
    targets: RequestTargets | None
    off_by: list[float] = field(default_factory=list)
    predicted: dict[ComparedSystem, tuple[float | None, float]] = field(default_factory=dict)


def loads_of(arguments: argparse.Namespace, vocab_size: int) -> list[Load]:
    """Return the loads that the arguments name.

    Raises:
        ConfigError: if targets cannot be read, or an option is given neither once nor once for each load.
    """
    num_loads = len(arguments.trace)
    no_rates: tuple[float, ...] = ()
    no_targets: RequestTargets | None = None
    each = zip(
        arguments.trace,
        _for_each("--duration", arguments.duration, _DURATION_S, num_loads),
        _for_each("--rates", arguments.rates, no_rates, num_loads),
        _for_each("--goodput", [RequestTargets.parse(text) for text in arguments.goodput], no_targets, num_loads),
        strict=True,
    )
    return [
        Load(
            path.stem,
            WorkloadSource(
                trace=standard_trace(str(path)) if str(path) in LOADS else load_trace(path),
                arrivals="trace",
                duration_s=duration_s,
                max_input_len=arguments.max_input_len,
                max_output_len=arguments.max_output_len,
                vocab_size=vocab_size,
            ),
            arguments.seed + number * _SEEDS,
            duration_s,
            rates,
            targets,
        )
        for number, (path, duration_s, rates, targets) in enumerate(each)
    ]


def _for_each(option: str, given: Sequence[_Value], default: _Value, num_loads: int) -> Sequence[_Value]:
    if len(given) not in (0, 1, num_loads):
        raise ConfigError(f"{option}: give it once, for all loads, or once for each --trace")
    return given if len(given) == num_loads else (*given, default)[:1] * num_loads
