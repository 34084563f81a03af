"""What is served in a simulation, and where it comes from."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

from hbserve.bench.serve_workload import ServeWorkload
from hbserve.bench.traces import BLOCK_TOKENS


@dataclass(slots=True, eq=False)
class SimulatedRequest:
    """One request; times in seconds of the simulated clock.

    Attributes:
        prefix_blocks: names of the leading blocks of its prompt, equal where contents are.
        block_tokens: tokens per name.
        cached_tokens: found in the prefix cache when it was admitted.
        computed_tokens: of the prompt, cached ones included.
        planned_tokens: of it, those of steps under way or planned included.
        ttft_target_ms: that it comes with, for the order of the queue.
        rank: its place there.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    prefix_blocks: tuple[int, ...] = ()
    block_tokens: int = BLOCK_TOKENS
    request_id: str = ""
    cached_tokens: int = 0
    computed_tokens: int = 0
    planned_tokens: int = 0
    first_token_time: float | None = None
    completion_time: float | None = None
    finish_step: int = field(default=0, repr=False)
    ttft_target_ms: float | None = None
    rank: tuple[int, float, float] = field(default=(0, 0.0, 0.0), repr=False)

    @property
    def tokens(self) -> range:
        """Of the prompt: as many as there are, for the order of the queue."""
        return range(self.prompt_tokens)

    @property
    def arrival_time(self) -> float:
        """As the order of the queue calls it."""
        return self.arrival

    @property
    def ttft_ms(self) -> float:
        """Infinite while there is no token."""
        return float("inf") if self.first_token_time is None else 1000 * (self.first_token_time - self.arrival)

    @property
    def tpot_ms(self) -> float:
        """Of the whole output; 0 where there is one token only, infinite while it is not complete."""
        if self.completion_time is None or self.first_token_time is None:
            return float("inf")
        if self.output_tokens < 2:
            return 0.0
        return 1000 * (self.completion_time - self.first_token_time) / (self.output_tokens - 1)


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


def requests_of(workload: ServeWorkload) -> list[SimulatedRequest]:
    """The requests of a serving benchmark's workload, fresh."""
    return [
        SimulatedRequest(
            request.arrival_s, request.input_len, request.output_len, request.block_ids, request_id=str(number)
        )
        for number, request in enumerate(workload.requests)
    ]


def concatenated(*parts: list[SimulatedRequest]) -> list[SimulatedRequest]:
    """All requests, by arrival."""
    return sorted(itertools.chain(*parts), key=lambda request: request.arrival)
