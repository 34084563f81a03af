"""The requests of a simulation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hbserve.bench.serve_workload import ServeWorkload
from hbserve.bench.traces import BLOCK_TOKENS


@dataclass(slots=True, eq=False)
class SimulatedRequest:
    """One request; times in seconds of the simulated clock.

    Attributes:
        prefix_blocks: names of the leading blocks of its prompt; equal contents have equal names.
        block_tokens: tokens per name.
        cached_tokens: prompt tokens that the prefix cache had at admission.
        computed_tokens: prompt tokens that are computed, cached ones included.
        planned_tokens: prompt tokens that are computed, in the running step, or in the planned one.
        ttft_target_ms: target that the request carries, for the order of the queue.
        rank: its place in the queue.
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
        """Stand for the prompt's tokens: the queue policy asks for their number."""
        return range(self.prompt_tokens)

    @property
    def arrival_time(self) -> float:
        """Arrival, under the queue policy's name for it."""
        return self.arrival

    @property
    def ttft_ms(self) -> float:
        """Time to the first token; infinite before there is one."""
        return math.inf if self.first_token_time is None else 1000 * (self.first_token_time - self.arrival)

    @property
    def tpot_ms(self) -> float:
        """Time per token after the first; 0 for an output of one token, infinite before the output is complete."""
        if self.completion_time is None or self.first_token_time is None:
            return math.inf
        if self.output_tokens < 2:
            return 0.0
        return 1000 * (self.completion_time - self.first_token_time) / (self.output_tokens - 1)


def requests_of(workload: ServeWorkload) -> list[SimulatedRequest]:
    """Make fresh requests from a workload of the serving benchmark."""
    return [
        SimulatedRequest(
            request.arrival_s, request.input_len, request.output_len, request.block_ids, request_id=str(number)
        )
        for number, request in enumerate(workload.requests)
    ]
