"""Requests and systems for tests on the simulated clock."""

from __future__ import annotations

import random

from hbserve.config import InstanceRole, LadderConfig, SemiPDConfig, SLOConfig
from hbserve.policy.step_time_predictor import StepTimePredictor
from hbserve.simulate.config import Sizes, make_config
from hbserve.simulate.control import SimulatedRotation
from hbserve.simulate.requests import SimulatedRequest
from hbserve.simulate.world import SimulatedSystem
from hbserve.slo.constraints import SLOConstraints, SMAllocation


def poisson(
    rate: float,
    duration_s: float,
    prompt_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
    seed: int,
    start_s: float = 0.0,
) -> list[SimulatedRequest]:
    """Poisson arrivals with uniform lengths, both ends included."""
    generator = random.Random(seed)
    requests = []
    time = start_s + generator.expovariate(rate)
    while time < start_s + duration_s:
        lengths = generator.randint(*prompt_tokens), generator.randint(*output_tokens)
        requests.append(SimulatedRequest(time, *lengths))
        time += generator.expovariate(rate)
    return requests


def shared_gpu(
    split: SMAllocation,
    steps: StepTimePredictor,
    sizes: Sizes | None = None,
    slo: SLOConstraints | None = None,
    holds_back_decode: bool = True,
    levels: tuple[int, ...] = (100,),
) -> tuple[SimulatedSystem, SimulatedRotation]:
    """One semi-PD instance; with targets its decode has the pace that they need.

    Args:
        levels: of the ladder, in both phases.
    """
    sizes = sizes or Sizes()
    semi_pd = SemiPDConfig(
        mixed=split.mixed,
        ladder=LadderConfig(prefill=levels, decode=levels, unified=(100,)),
        slo=None
        if slo is None
        else SLOConfig(
            ttft_target_ms=slo.ttft_target_ms, tpot_target_ms=slo.tpot_target_ms, holds_back_decode=holds_back_decode
        ),
    )
    system = SimulatedSystem(make_config([InstanceRole.SEMI_PD], sizes, semi_pd), steps, sizes.num_blocks)
    return system, SimulatedRotation(system, next(iter(system.devices)), split)
