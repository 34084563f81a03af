"""Requests for tests on the simulated clock."""

from __future__ import annotations

import random

from hbserve.simulate.requests import SimulatedRequest


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
