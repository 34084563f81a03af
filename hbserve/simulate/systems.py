"""Systems that the simulator compares, by name; simulation of one, its highest rate, and plans for a rate."""

from __future__ import annotations

import dataclasses
import math
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

from hbserve.bench.request_record import RequestTargets, percentile
from hbserve.bench.serve_workload import WorkloadSource
from hbserve.bench.sweep import RateSearch
from hbserve.errors import ConfigError
from hbserve.policy.step_time_predictor import StepTimePredictor
from hbserve.simulate.clock import SimulatedClock
from hbserve.simulate.control import SimulatedController
from hbserve.simulate.prompts import Sizes
from hbserve.simulate.requests import SimulatedRequest, requests_of
from hbserve.simulate.units import DisaggregatedUnit, SemiPDUnit, UnifiedUnit, Unit, serve
from hbserve.slo.constraints import SLOConstraints, SMAllocation

FORMS = (
    "unified@CHUNK, XpYd, semi_pd@P-D (fixed split), no_ladder@P-D, slo@P-D (controller), these with +mixed to "
    "begin so, each with *N for N replicas; with --plan also xpyd, of any ratio"
)
"""The forms of systems, as help text."""
ANY_RATIO = "xpyd"
"""Name of the system whose numbers of prefill and decode GPUs a plan finds."""
_FIRST_RATE = 4.0
"""First rate of a search, requests per second and GPU."""
_LONE = 0.05
"""Mean number of open requests below which they do not disturb each other."""
_PATTERN = re.compile(
    r"(?:(?P<unified>unified)(?:@(?P<chunk>[1-9]\d*))?"
    r"|(?P<x>[1-9]\d*)p(?P<y>[1-9]\d*)d"
    r"|(?P<split>semi_pd|no_ladder|slo)@(?P<prefill>\d+)-(?P<decode>\d+)(?P<mixed>\+mixed)?)(?:\*(?P<n>[1-9]\d*))?"
)


@dataclass(frozen=True)
class System:
    """A system of one of the `FORMS`, and its replicas."""

    name: str
    form: str
    replicas: int
    chunk: int = 512
    num_prefill: int = 1
    num_decode: int = 1
    allocation: SMAllocation | None = None

    @staticmethod
    def parse(text: str) -> System:
        """Read such as ``slo@80-50*2``.

        Raises:
            ConfigError: naming the forms there are.
        """
        if text == ANY_RATIO:
            return System(text, "disaggregated", 1)
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ConfigError(f"--system: {text!r} is none of {FORMS}")
        replicas = int(match["n"] or 1)
        if match["unified"]:
            return System(text, "unified", replicas, chunk=int(match["chunk"] or 512))
        if match["x"]:
            return System(text, "disaggregated", replicas, num_prefill=int(match["x"]), num_decode=int(match["y"]))
        allocation = SMAllocation(int(match["prefill"]), int(match["decode"]), match["mixed"] is not None)
        return System(text, match["split"], replicas, allocation=allocation)

    def replicated(self, replicas: int) -> System:
        """Return the same system with another number of replicas."""
        return dataclasses.replace(self, name=f"{self.name.split('*')[0]}*{replicas}", replicas=replicas)

    @property
    def num_gpus(self) -> int:
        """GPUs of all replicas."""
        return self.replicas * (self.num_prefill + self.num_decode if self.form == "disaggregated" else 1)


@dataclass(frozen=True)
class Setting:
    """Setting that all systems of a comparison share.

    Attributes:
        steps: step times of the simulated device.
        belief: step times as the controller believes them; they may differ from ``steps``.
    """

    steps: StepTimePredictor
    belief: StepTimePredictor
    sizes: Sizes
    targets: RequestTargets
    attainment: float = 0.9

    def __post_init__(self) -> None:
        if self.targets.ttft_ms is None or self.targets.tpot_ms is None or self.targets.e2e_ms is not None:
            raise ConfigError("--goodput: the simulator needs ttft and tpot, and takes no e2e")

    @property
    def constraints(self) -> SLOConstraints:
        """Targets of the controller, both at the percentile of ``attainment``."""
        assert self.targets.ttft_ms is not None
        assert self.targets.tpot_ms is not None
        percent = min(99.9, 100 * self.attainment)
        return SLOConstraints(self.targets.ttft_ms, self.targets.tpot_ms, percent, percent)


@dataclass(frozen=True)
class SimulatedOutcome:
    """Result of a simulated run.

    Attributes:
        rate: rate of the workload, requests per second.
        attainment: share of requests within both targets.
        goodput: requests within both targets per second.
        moves: changes of the split by the controllers.
    """

    system: str
    num_gpus: int
    rate: float
    num_requests: int
    attainment: float
    goodput: float
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p90_ms: float
    tpot_p99_ms: float
    moves: int


def simulate(system: System, setting: Setting, requests: list[SimulatedRequest]) -> SimulatedOutcome:
    """Serve fresh requests with a system.

    Raises:
        ConfigError: if a request is larger than the KV pool.
    """
    longest = max(request.prompt_tokens + request.output_tokens for request in requests)
    if longest > setting.sizes.kv_tokens:
        raise ConfigError(
            f"the longest request has {longest} tokens, prompt and output; a KV pool holds {setting.sizes.kv_tokens}. "
            "Cut with --max-input-len, or raise --kv-tokens"
        )
    clock = SimulatedClock()
    for request in requests:
        request.ttft_target_ms = setting.targets.ttft_ms
    units = [_unit(system, setting, clock) for _ in range(system.replicas)]
    controllers = [
        SimulatedController(unit, setting.constraints, setting.belief, requests[-1].arrival)
        for unit in units
        if system.form == "slo" and isinstance(unit, SemiPDUnit)
    ]
    serve(clock, units, requests)
    span = max(requests[-1].arrival - requests[0].arrival, 1e-9)
    constraints = setting.constraints
    met = sum(
        request.ttft_ms <= constraints.ttft_target_ms and request.tpot_ms <= constraints.tpot_target_ms
        for request in requests
    )
    times_ms = {
        "ttft": sorted(request.ttft_ms for request in requests),
        "tpot": sorted(request.tpot_ms for request in requests if request.output_tokens > 1) or [0.0],
    }
    percentiles = {f"{name}_p{p}_ms": percentile(ms, p) for name, ms in times_ms.items() for p in (50, 90, 99)}
    return SimulatedOutcome(
        system=system.name,
        num_gpus=system.num_gpus,
        rate=len(requests) / span,
        num_requests=len(requests),
        attainment=met / len(requests),
        goodput=met / span,
        moves=sum(len(controller.rotation.moves) for controller in controllers),
        **percentiles,
    )


def _unit(system: System, setting: Setting, clock: SimulatedClock) -> Unit:
    steps, sizes = setting.steps, setting.sizes
    if system.form == "unified":
        chunked = dataclasses.replace(
            sizes,
            chunk_size=system.chunk,
            max_chunk_prefill_tokens=system.chunk,
            max_num_batched_tokens=max(sizes.max_num_batched_tokens, system.chunk + sizes.max_num_seqs),
        )
        return UnifiedUnit(clock, steps, chunked)
    if system.form == "disaggregated":
        return DisaggregatedUnit(clock, steps, sizes, system.num_prefill, system.num_decode)
    assert system.allocation is not None
    alone = None if system.form == "no_ladder" else SMAllocation(100, 100)
    is_paced = system.form == "slo" or system.allocation.mixed
    interval_ms = setting.constraints.decode_interval_ms if is_paced else 0.0
    return SemiPDUnit(clock, steps, sizes, system.allocation, alone, decode_interval_s=interval_ms / 1000)


def find_highest_rate(
    system: System, setting: Setting, source: WorkloadSource, seed: int, precision: float = 0.03
) -> SimulatedOutcome | None:
    """Return the run at the highest rate at which enough requests keep both targets; None if even lone ones miss."""
    search = RateSearch(_FIRST_RATE * system.num_gpus, precision)
    best: SimulatedOutcome | None = None
    while (rate := search.next_rate()) is not None:
        outcome = simulate(system, setting, requests := requests_of(source.workload(rate, seed)))
        good = outcome.attainment >= setting.attainment
        open_s = sum(request.ttft_ms + request.tpot_ms * (request.output_tokens - 1) for request in requests) / 1000
        if not good and rate * open_s < _LONE * len(requests):
            return None
        search.add(rate, good)
        if good and (best is None or outcome.rate > best.rate):
            best = outcome
    return best


def plan(
    systems: list[System], setting: Setting, source: WorkloadSource, seed: int, rate: float
) -> list[tuple[System, SimulatedOutcome]]:
    """Find for each system the fewest replicas that keep the targets at a rate; sort by GPUs, the fewest first.

    Systems that cannot keep the targets at any rate are left out.
    """
    found = []
    for system in systems:
        trial = _Trial(setting, source, seed, rate)
        best = _fewest_replicas(system, trial)
        if best is not None and system.name == ANY_RATIO:
            best = _best_ratio(best, trial)
        if best is not None:
            found.append((best, trial.outcomes[best.name]))
    return sorted(found, key=lambda pair: (pair[0].num_gpus, -pair[1].attainment))


@dataclass
class _Trial:
    """Simulations of systems at the rate of a plan, one for each system."""

    setting: Setting
    source: WorkloadSource
    seed: int
    rate: float
    outcomes: dict[str, SimulatedOutcome] = field(default_factory=dict)

    def keeps(self, system: System) -> bool:
        if system.name not in self.outcomes:
            requests = requests_of(self.source.workload(self.rate, self.seed))
            self.outcomes[system.name] = simulate(system, self.setting, requests)
        return self.outcomes[system.name].attainment >= self.setting.attainment


def _fewest_replicas(system: System, trial: _Trial) -> System | None:
    single = find_highest_rate(system.replicated(1), trial.setting, trial.source, trial.seed)
    if single is None:
        return None
    replicas = max(1, math.ceil(0.9 * trial.rate / single.rate))
    while replicas <= 100 * max(1.0, trial.rate):  # a bound: with more replicas each has less work
        candidate = _ratio(replicas, replicas) if system.name == ANY_RATIO else system.replicated(replicas)
        if trial.keeps(candidate):
            return candidate
        replicas += max(1, replicas // 10)
    return None


def _ratio(num_prefill: int, num_decode: int) -> System:
    return System.parse(f"{num_prefill}p{num_decode}d")


def _best_ratio(even: System, trial: _Trial) -> System:
    """Find the fewest GPUs of one phase, then of the other; try both orders and take the smaller system."""

    def fewest(max_number: int, system: Callable[[int], System]) -> int:
        return bisect_left(range(1, max_number), True, key=lambda number: trial.keeps(system(number))) + 1

    size = even.num_prefill
    decode = fewest(size, lambda number: _ratio(size, number))
    first = _ratio(fewest(size, lambda number: _ratio(number, decode)), decode)
    prefill = fewest(size, lambda number: _ratio(number, size))
    second = _ratio(prefill, fewest(size, lambda number: _ratio(prefill, number)))
    return min(first, second, key=lambda system: system.num_gpus)
