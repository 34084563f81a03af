"""Predictions for `mode: auto`: how many requests of the standard loads each candidate serves within its targets.

Runs as a process of its own, beside the start of a system (`hbserve.system.auto_plan`), which it reports to.
"""

from __future__ import annotations

import math

import msgspec

from hbserve.bench.request_record import RequestTargets
from hbserve.bench.traces import BLOCK_TOKENS
from hbserve.config import SchedulerConfig
from hbserve.messages.admin import LoadEntry
from hbserve.messages.prediction import CandidatePrediction, PredictionOrders
from hbserve.policy.profile_file import profiled_predictor
from hbserve.policy.step_profile import StepProfile
from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork, num_pairs
from hbserve.process import child
from hbserve.simulate.config import Sizes
from hbserve.simulate.requests import SimulatedRequest
from hbserve.simulate.standard_loads import CACHED_SHARE, LOADS, MEAN_LENGTHS, standard_load
from hbserve.simulate.systems import Setting, SimulatedOutcome, System, simulate

GIVEN = "recent"
"""Name of a given load."""
_FIRST_OWN_BLOCK = 1 << 20
"""Names of blocks that no two prompts share begin here."""
_UTILISATION = 0.95
"""Share of what the GPUs can compute at most that a standard load asks for: bursts then exceed it for a while."""
_DECODE_ROWS = 32
"""Sequences in a decode step, for the cost of an output token."""
_MAX_UNIT = 4
"""GPUs that are simulated: of more, a part of the system under its share of the load."""


def predict(orders: PredictionOrders) -> list[CandidatePrediction]:
    """Simulate each candidate under the standard loads; in the order of the candidates."""
    steps = profiled_predictor(msgspec.convert(orders.profile, StepProfile))
    predict_one = _predict_given if orders.load else _predict
    return [predict_one(System.parse(name), orders, steps) for name in orders.candidates]


def _predict_given(system: System, orders: PredictionOrders, steps: StepTimePredictor) -> CandidatePrediction:
    """Simulate a system under the given load."""
    requests = [_request(entry, number) for number, entry in enumerate(orders.load)]
    outcome = _simulate(system, orders, steps, requests)
    return CandidatePrediction(
        system=system.name, attainment={GIVEN: round(outcome.attainment, 4)}, bound={GIVEN: round(outcome.bound, 4)}
    )


def _simulate(
    system: System, orders: PredictionOrders, steps: StepTimePredictor, requests: list[SimulatedRequest]
) -> SimulatedOutcome:
    """Simulate a system, each request with its own target, as the running system treats it.

    A controller keeps targets that are a guess, too. So beside one, all candidates are simulated as if they did.
    """
    scheduler = SchedulerConfig()
    if orders.targets_are_soft and not any(System.parse(name).form == "slo" for name in orders.candidates):
        scheduler = SchedulerConfig(
            ttft_ms=orders.ttft_ms,
            ttft_ms_per_1k_tokens=orders.ttft_ms_per_1k_tokens,
            tpot_ms=orders.tpot_ms,
            targets_are_soft=True,
        )
    for request in requests:
        request.ttft_target_ms = orders.ttft_ms + orders.ttft_ms_per_1k_tokens * request.prompt_tokens / 1000
    mean_ms = sum(request.ttft_target_ms or 0.0 for request in requests) / len(requests)
    sizes = Sizes(max_num_seqs=orders.max_num_seqs, placement="prefix_aware", scheduler=scheduler)
    setting = Setting(steps, steps, sizes, RequestTargets(ttft_ms=mean_ms, tpot_ms=orders.tpot_ms))
    return simulate(system, setting, requests)


def _request(entry: LoadEntry, number: int) -> SimulatedRequest:
    """Make a request of a load. What was cached is taken to be one common beginning of all prompts."""
    num_shared = entry.cached_tokens // BLOCK_TOKENS
    blocks = range(num_shared) if num_shared else ()
    own = _FIRST_OWN_BLOCK + number
    return SimulatedRequest(
        entry.arrival_s, max(1, entry.prompt_tokens), max(1, entry.output_tokens), (*blocks, own) if blocks else ()
    )


def _predict(system: System, orders: PredictionOrders, steps: StepTimePredictor) -> CandidatePrediction:
    unit, num_gpus = _unit(system)
    attainment, bound = {}, {}
    for load in LOADS:
        rate = _UTILISATION * num_gpus / _request_s(load, steps)
        outcome = _simulate(unit, orders, steps, standard_load(load, rate, orders.num_requests, seed=1))
        attainment[load], bound[load] = round(outcome.attainment, 4), round(outcome.bound, 4)
    return CandidatePrediction(system=system.name, attainment=attainment, bound=bound)


def _unit(system: System) -> tuple[System, int]:
    """Return the part of a system that is simulated, and its GPUs."""
    if system.form != "disaggregated":
        replicas = min(system.replicas, 2)  # two show what placement costs
        return system.replicated(replicas), replicas
    common = math.gcd(system.num_prefill, system.num_decode)
    x, y = system.num_prefill // common, system.num_decode // common
    if x + y > _MAX_UNIT:
        x, y = max(1, round(_MAX_UNIT * x / (x + y))), max(1, round(_MAX_UNIT * y / (x + y)))
    return System.parse(f"{x}p{y}d"), x + y


def _request_s(load: str, steps: StepTimePredictor) -> float:
    """Compute the device time of a mean request of a load."""
    prompt, output = MEAN_LENGTHS[load]
    cached = CACHED_SHARE[load] * prompt
    tokens = prompt - cached
    prompt_s = steps.seconds(StepWork(0, 0, tokens, num_pairs(tokens, cached)))
    step_s = steps.seconds(StepWork(_DECODE_ROWS, _DECODE_ROWS * prompt))
    return prompt_s + output * step_s / _DECODE_ROWS


def main() -> None:
    """Entry of the process: read the orders, report the predictions, end."""
    orders = msgspec.convert(child.read_orders()["orders"], PredictionOrders)
    child.set_process_title("hbserve-auto-plan")
    child.report_status({"predictions": msgspec.to_builtins(predict(orders))})


if __name__ == "__main__":
    main()
