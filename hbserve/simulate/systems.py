"""Systems that the simulator compares, by name; simulation of one, its highest rate, and plans for a rate."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

from hbserve.bench.request_record import RequestTargets, percentile
from hbserve.bench.serve_workload import WorkloadSource
from hbserve.bench.sweep import RateSearch
from hbserve.config import InstanceRole, LadderConfig, SemiPDConfig, SLOConfig
from hbserve.errors import ConfigError
from hbserve.policy.step_time_predictor import StepTimePredictor
from hbserve.simulate.config import Sizes, make_config
from hbserve.simulate.control import SimulatedController, SimulatedRotation
from hbserve.simulate.misses import Miss, MissRecorder
from hbserve.simulate.oracle import serve_best
from hbserve.simulate.requests import SimulatedRequest, requests_of
from hbserve.simulate.world import SimulatedSystem
from hbserve.slo.constraints import SLOConstraints, SMAllocation

FORMS = (
    "unified, unified@CHUNK (steps by tokens, not by time), XpYd, semi_pd@P-D (fixed split), no_ladder@P-D, slo@P-D "
    "(controller), these with +mixed to begin so, oracle (a bound), each with *N for N replicas; with --plan also "
    "xpyd, of any ratio"
)
"""The forms of systems, as help text."""
ANY_RATIO = "xpyd"
"""Name of the system whose numbers of prefill and decode GPUs a plan finds."""
FIRST_RATE = 16.0
"""First rate of a search, requests per second and GPU. One that is too high costs little: it is soon given up."""
_LONE = 0.05
"""Mean number of open requests below which they do not disturb each other."""
_PATTERN = re.compile(
    r"(?:(?P<unified>unified)(?:@(?P<chunk>[1-9]\d*))?|(?P<oracle>oracle)"
    r"|(?P<x>[1-9]\d*)p(?P<y>[1-9]\d*)d"
    r"|(?P<split>semi_pd|no_ladder|slo)@(?P<prefill>\d+)-(?P<decode>\d+)(?P<mixed>\+mixed)?)(?:\*(?P<n>[1-9]\d*))?"
)


@dataclass(frozen=True)
class System:
    """A system of one of the `FORMS`, and its replicas."""

    name: str
    form: str
    replicas: int
    chunk: int | None = None
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
            return System(text, "unified", replicas, chunk=int(match["chunk"]) if match["chunk"] else None)
        if match["oracle"]:
            return System(text, "oracle", replicas)
        if match["x"]:
            return System(text, "disaggregated", replicas, num_prefill=int(match["x"]), num_decode=int(match["y"]))
        allocation = SMAllocation(int(match["prefill"]), int(match["decode"]), match["mixed"] is not None)
        return System(text, match["split"], replicas, allocation=allocation)

    def replicated(self, replicas: int) -> System:
        """Return the same system with another number of replicas."""
        return dataclasses.replace(self, name=f"{self.name.split('*')[0]}*{replicas}", replicas=replicas)

    @property
    def roles(self) -> list[InstanceRole]:
        """Roles of its instances, one for each GPU."""
        if self.form == "disaggregated":
            numbers = self.replicas * self.num_prefill, self.replicas * self.num_decode
            return [InstanceRole.PREFILL] * numbers[0] + [InstanceRole.DECODE] * numbers[1]
        return [InstanceRole.UNIFIED if self.form == "unified" else InstanceRole.SEMI_PD] * self.replicas

    @property
    def num_gpus(self) -> int:
        """GPUs of all replicas."""
        return len(self.roles)


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

    def name_of(self, system: System) -> str:
        """Return a system's name, which says whether it has a tier in the host's memory, and drafts."""
        name = f"{system.name}+host" if self.sizes.host_tokens else system.name
        return name if self.sizes.acceptance is None else f"{name}+drafts"

    def is_met(self, request: SimulatedRequest) -> bool:
        """Whether a request has ended and kept both targets."""
        slo = self.constraints
        ttft_target_ms = slo.ttft_target_ms if request.ttft_target_ms is None else request.ttft_target_ms
        return request.ttft_ms <= ttft_target_ms and request.tpot_ms <= slo.tpot_target_ms


@dataclass(frozen=True)
class SimulatedOutcome:
    """Result of a simulated run.

    Attributes:
        rate: rate of the workload, requests per second.
        attainment: share of requests within both targets.
        bound: attainment that no schedule on as many of these GPUs exceeds, see `hbserve.simulate.oracle`.
        goodput: requests within both targets per second.
        moves: changes of the split by the controllers.
        cached_share: share of the prompt tokens that were in the prefix cache or in a tier.
        loaded_bytes, stored_bytes: of the tier in the host's memory.
        misses: what was missed and why, where that was asked for.
    """

    system: str
    num_gpus: int
    rate: float
    num_requests: int
    attainment: float
    bound: float
    goodput: float
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p90_ms: float
    tpot_p99_ms: float
    moves: int
    cached_share: float = 0.0
    loaded_bytes: int = 0
    stored_bytes: int = 0
    misses: list[Miss] | None = None

    @property
    def share_of_bound(self) -> float:
        """Attainment over the bound of any schedule's."""
        return self.attainment / self.bound if self.bound else 1.0


def simulate(
    system: System,
    setting: Setting,
    requests: list[SimulatedRequest],
    gives_up: bool = False,
    records_misses: bool = False,
) -> SimulatedOutcome:
    """Serve fresh requests with a system.

    Args:
        gives_up: end as soon as too many requests have missed a target; those that have not ended then count as missed.
        records_misses: say of each request what it missed and why.

    Raises:
        ConfigError: if a request is larger than the KV pool.
    """
    longest = max(request.prompt_tokens + request.output_tokens for request in requests)
    if longest > setting.sizes.kv_tokens:
        raise ConfigError(
            f"the longest request has {longest} tokens, prompt and output; a KV pool holds {setting.sizes.kv_tokens}. "
            "Cut with --max-input-len, or raise --kv-tokens"
        )
    # One target for all, which the bound's algorithm needs: the longest, so that no schedule exceeds it.
    longest_ms = max(request.ttft_target_ms or setting.constraints.ttft_target_ms for request in requests)
    best_ends = serve_best(requests, setting.steps, longest_ms, system.num_gpus)
    misses, num_moves, loaded_bytes, stored_bytes = None, 0, 0, 0
    if system.form == "oracle":
        for request, end in zip(requests, best_ends, strict=True):
            request.first_token_time = request.completion_time = end
    else:
        misses, num_moves, loaded_bytes, stored_bytes = _serve(system, setting, requests, gives_up, records_misses)
    span = max(requests[-1].arrival - requests[0].arrival, 1e-9)
    met = sum(map(setting.is_met, requests))
    times_ms = {
        "ttft": sorted(request.ttft_ms for request in requests),
        "tpot": sorted(request.tpot_ms for request in requests if request.output_tokens > 1) or [0.0],
    }
    percentiles = {f"{name}_p{p}_ms": percentile(ms, p) for name, ms in times_ms.items() for p in (50, 90, 99)}
    return SimulatedOutcome(
        system=setting.name_of(system),
        num_gpus=system.num_gpus,
        rate=len(requests) / span,
        num_requests=len(requests),
        attainment=met / len(requests),
        bound=sum(end is not None for end in best_ends) / len(requests),
        goodput=met / span,
        moves=num_moves,
        cached_share=sum(request.cached_tokens for request in requests) / sum(r.prompt_tokens for r in requests),
        loaded_bytes=loaded_bytes,
        stored_bytes=stored_bytes,
        misses=misses,
        **percentiles,
    )


def _serve(
    system: System, setting: Setting, requests: list[SimulatedRequest], gives_up: bool, records_misses: bool
) -> tuple[list[Miss] | None, int, int, int]:
    """Serve requests; returns what they missed, where that is asked for, changes of the split, and a tier's bytes."""
    shares_prefixes = any(request.prefix_blocks for request in requests)
    world, controllers = build(system, setting, requests[-1].arrival, shares_prefixes)
    recorder = MissRecorder(world, setting.steps) if records_misses else None
    num_missed, allowed = 0, math.floor((1 - setting.attainment) * len(requests)) + 1

    def goes_on(request: SimulatedRequest) -> bool:
        nonlocal num_missed
        num_missed += not setting.is_met(request)
        return num_missed <= allowed

    world.serve(requests, goes_on if gives_up else None)
    slo = setting.constraints
    misses = None if recorder is None else recorder.misses(requests, slo.ttft_target_ms, slo.tpot_target_ms)
    num_moves = sum(len(controller.rotation.moves) for controller in controllers)
    host = world.tier_stats.get("host", {})
    return misses, num_moves, host.get("loaded_bytes", 0), host.get("stored_bytes", 0)


def build(
    system: System, setting: Setting, until: float, shares_prefixes: bool = True
) -> tuple[SimulatedSystem, list[SimulatedController]]:
    """Start a system, with a controller of each instance where it has one.

    Args:
        until: end of the arrivals.
        shares_prefixes: some prompts have equal prefixes.
    """
    sizes, slo = setting.sizes, setting.constraints
    tpot_ms: float | None = slo.tpot_target_ms
    if system.chunk is not None:
        tpot_ms = None  # it does not size its steps
        sizes = dataclasses.replace(
            sizes,
            chunk_size=system.chunk,
            max_chunk_prefill_tokens=system.chunk,
            max_num_batched_tokens=max(sizes.max_num_batched_tokens, system.chunk + sizes.max_num_seqs),
        )
    config = make_config(system.roles, sizes, _semi_pd(system, slo), shares_prefixes)
    is_told = not sizes.scheduler.targets_are_soft
    world = SimulatedSystem(
        config,
        setting.steps,
        sizes.num_blocks,
        slo.ttft_target_ms if is_told else None,
        tpot_ms if is_told else None,
        num_host_blocks=sizes.num_host_blocks,
        acceptance=sizes.acceptance,
    )
    if system.allocation is None:
        return world, []
    rotations = [SimulatedRotation(world, name, system.allocation) for name in world.devices]
    if system.form != "slo":
        return world, []
    return world, [SimulatedController(world, rotation, slo, setting.belief, until) for rotation in rotations]


def _semi_pd(system: System, slo: SLOConstraints) -> SemiPDConfig | None:
    if system.allocation is None:
        return None
    levels = () if system.form == "no_ladder" else (100,)
    with_mixing = system.form == "slo" or system.allocation.mixed
    return SemiPDConfig(
        prefill_percentage=system.allocation.prefill_percentage,
        decode_percentage=system.allocation.decode_percentage,
        mixed=system.allocation.mixed,
        ladder=LadderConfig(prefill=levels, decode=levels, unified=(100,) if with_mixing else ()),
        slo=SLOConfig(ttft_target_ms=slo.ttft_target_ms, tpot_target_ms=slo.tpot_target_ms)
        if system.form == "slo"
        else None,
    )


def find_highest_rate(
    system: System, setting: Setting, source: WorkloadSource, seed: int, precision: float = 0.03
) -> SimulatedOutcome | None:
    """Return the run at the highest rate at which enough requests keep both targets; None if even lone ones miss."""
    search = RateSearch(FIRST_RATE * system.num_gpus, precision)
    best: SimulatedOutcome | None = None
    while (rate := search.next_rate()) is not None:
        outcome = simulate(system, setting, requests := requests_of(source.workload(rate, seed)), gives_up=True)
        good = outcome.attainment >= setting.attainment
        open_s = [r.completion_time - r.arrival for r in requests if r.completion_time is not None]
        if not good and rate * sum(open_s) <= _LONE * len(open_s):
            return None
        search.add(rate, good)
        if good and (best is None or outcome.rate > best.rate):
            best = outcome
    return best
