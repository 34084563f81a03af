"""Requests and systems for tests on the simulated clock."""

from __future__ import annotations

import random

import numpy as np

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


KINDS = ("bursts", "tails", "documents", "mixture")


def drawn(kind: str, rate: float, count: int, seed: int) -> list[SimulatedRequest]:
    """Draw a load that no trace and no standard load is like.

    Args:
        kind: ``bursts``: six completions at once. ``tails``: lengths of prompts and outputs have Pareto tails.
            ``documents``: questions about a few long documents, which come first in the prompts. ``mixture``: short
            prompts, and now and then a very long one.
        rate: requests per second, in the mean.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind)])

    def lognormal(mean: float, sigma: float) -> np.ndarray:
        return rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)

    times = np.cumsum(rng.exponential(1 / rate, count))
    outputs = lognormal(30, 0.8)
    blocks: list[tuple[int, ...]] = [()] * count
    if kind == "bursts":
        times, prompts = np.sort(times[::6].repeat(6)[:count] + rng.exponential(0.1, count)), lognormal(1500, 1.0)
    elif kind == "tails":
        prompts, outputs = 400 * (1 + rng.pareto(1.4, count)), 12 * (1 + rng.pareto(1.6, count))
    elif kind == "documents":
        documents = rng.zipf(1.4, count).clip(1, 12).tolist()
        prompts = lognormal(600, 0.8)
        blocks = [tuple(range(100 * document, 100 * document + 6 + document)) for document in documents]
    else:
        prompts = np.where(rng.random(count) < 0.08, lognormal(14_000, 0.4), lognormal(900, 0.8))
    return [
        SimulatedRequest(time, 512 * len(named) + prompt, output, named)
        for time, prompt, output, named in zip(
            times.tolist(),
            prompts.clip(16, 30_000).astype(int).tolist(),
            outputs.clip(1, 300).astype(int).tolist(),
            blocks,
            strict=True,
        )
    ]
