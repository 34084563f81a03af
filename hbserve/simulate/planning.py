"""Plans: the fewest GPUs of each system that keep the targets at a rate.

Replicas are alike, so one of them is simulated, under its share of the rate. If prefill and decode have GPUs of their
own, in any ratio, each phase is simulated by itself: the other phase then has more GPUs than it needs. A small system
of the ratio that was found is then simulated as a whole.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

from hbserve.bench.serve_workload import WorkloadSource
from hbserve.bench.sweep import RateSearch
from hbserve.simulate.requests import SimulatedRequest, requests_of
from hbserve.simulate.systems import (
    ANY_RATIO,
    FIRST_RATE,
    Setting,
    SimulatedOutcome,
    System,
    find_highest_rate,
    simulate,
)

_MAX_REQUESTS = 1000
"""Requests of one simulation; the attainment then has a standard error below one point."""
_MAX_UNIT = 8
"""GPUs of the largest system that is simulated as a whole."""
_PRECISION = 0.03
_LONE_RATE = 0.5
"""Requests per second at which they hardly disturb each other."""
_GROWTH = 0.02
"""Share of replicas, or of a phase's GPUs, that is added when they are too few."""


def plan(
    systems: list[System], setting: Setting, source: WorkloadSource, seed: int, rate: float
) -> list[tuple[System, SimulatedOutcome]]:
    """Find for each system the fewest replicas that keep the targets at a rate; sort by GPUs, the fewest first.

    Systems that cannot keep the targets at any rate are left out.
    """
    if source.num_requests is None:
        source = dataclasses.replace(source, num_requests=_MAX_REQUESTS)
    planner = _Planner(setting, source, seed, rate)
    found = [best for system in systems if (best := planner.fewest(system)) is not None]
    return merge_plans([found])


def merge_plans(plans: list[list[tuple[System, SimulatedOutcome]]]) -> list[tuple[System, SimulatedOutcome]]:
    """Join plans into one, sorted by GPUs, the fewest first."""
    return sorted(itertools.chain(*plans), key=lambda pair: (pair[0].num_gpus, -pair[1].attainment))


class _Planner:
    """Searches for one rate."""

    def __init__(self, setting: Setting, source: WorkloadSource, seed: int, rate: float) -> None:
        self._setting, self._source, self._seed, self._rate = setting, source, seed, rate

    def fewest(self, system: System) -> tuple[System, SimulatedOutcome] | None:
        """Find the smallest system of a kind, and simulate it; None if even lone requests miss a target."""
        if system.name == ANY_RATIO:
            return self._fewest_of_any_ratio()
        one = find_highest_rate(system.replicated(1), self._setting, self._source, self._seed)
        if one is None:
            return None
        replicas = math.ceil(self._rate / one.rate)
        while not self._keeps(
            outcome := self._share_of(system.replicated(replicas), system.replicated(1), 1 / replicas)
        ):
            replicas += math.ceil(_GROWTH * replicas)
        return system.replicated(replicas), outcome

    def _keeps(self, outcome: SimulatedOutcome) -> bool:
        return outcome.attainment >= self._setting.attainment

    def _share_of(self, whole: System, unit: System, share: float) -> SimulatedOutcome:
        """Simulate a part of a system under its share of the rate; returns the outcome as that of the whole."""
        outcome = simulate(unit, self._setting, self._requests(self._rate * share))
        return dataclasses.replace(
            outcome,
            system=self._setting.name_of(whole),
            num_gpus=whole.num_gpus,
            rate=outcome.rate / share,
            goodput=outcome.goodput / share,
            moves=round(outcome.moves / share),
        )

    def _requests(self, rate: float) -> list[SimulatedRequest]:
        return requests_of(self._source.workload(rate, self._seed))

    # --- prefill and decode on GPUs of their own ---------------------------------------------------

    def _fewest_of_any_ratio(self) -> tuple[System, SimulatedOutcome] | None:
        lone = self._decode_attainment(_LONE_RATE, _LONE_RATE)
        if lone < self._setting.attainment:
            return None
        # Each phase may lose half of what the load may cost.
        needed = math.sqrt(self._setting.attainment * lone)
        prefill_rate = self._highest_rate(lambda rate: self._ttft_attainment(rate) >= needed)
        decode_rate = self._highest_rate(lambda rate: self._decode_attainment(rate, prefill_rate) >= needed)
        x, y = math.ceil(self._rate / prefill_rate), math.ceil(self._rate / decode_rate)
        while not self._keeps(outcome := self._of_ratio(x, y)):
            x, y = x + math.ceil(_GROWTH * x), y + math.ceil(_GROWTH * y)
        while True:
            for fewer in ((x - 1, y), (x, y - 1)):
                if min(fewer) and sum(fewer) < _MAX_UNIT and self._keeps(smaller := self._of_ratio(*fewer)):
                    (x, y), outcome = fewer, smaller
                    break
            else:
                return _ratio(x, y), outcome

    def _highest_rate(self, is_good: Callable[[float], bool]) -> float:
        """Find the highest rate that one GPU of a phase bears, up to the plan's: one GPU is then enough."""
        search = RateSearch(FIRST_RATE, _PRECISION)
        while search.best < self._rate and (rate := search.next_rate()) is not None:
            search.add(rate, is_good(rate))
        return search.best or search.worst

    def _ttft_attainment(self, rate: float) -> float:
        """Return the share of requests whose TTFT is kept by one prefill GPU."""
        requests = self._requests(rate)
        for request in requests:
            request.output_tokens = 1
        return simulate(_ratio(1, 1), self._setting, requests).attainment

    def _decode_attainment(self, rate: float, prefill_rate: float) -> float:
        """Return the share of requests for which one decode GPU suffices beside more than enough prefill GPUs.

        Both targets count: where too many sequences decode, requests wait for a slot or for KV before their prefill.
        """
        num_prefill = math.ceil(1.5 * rate / prefill_rate)
        return simulate(_ratio(num_prefill, 1), self._setting, self._requests(rate), gives_up=True).attainment

    def _of_ratio(self, x: int, y: int) -> SimulatedOutcome:
        """Simulate a system of this ratio: as a whole if it is small, else the most similar small one."""
        whole = _ratio(x, y)
        if x + y <= _MAX_UNIT:
            return self._share_of(whole, whole, 1.0)
        small = [(a, size - a) for size in range(2, _MAX_UNIT + 1) for a in range(1, size)]
        a, b = min(small, key=lambda unit: (abs(math.log(unit[0] * y / unit[1] / x)), sum(unit)))
        return self._share_of(whole, _ratio(a, b), max(a / x, b / y))


def _ratio(num_prefill: int, num_decode: int) -> System:
    return System.parse(f"{num_prefill}p{num_decode}d")
