"""The requests of a simulation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hbserve.bench.serve_workload import ServeWorkload
from hbserve.bench.traces import BLOCK_TOKENS

VOCAB_SIZE = 1 << 30
"""Token ids are below it: an id stands for a whole block of a prompt."""
_FIRST_OWN_TOKEN = 1 << 29


@dataclass(slots=True, eq=False)
class SimulatedRequest:
    """One request; times in seconds of the simulated clock.

    Attributes:
        prefix_blocks: names of the leading blocks of its prompt; equal contents have equal names.
        block_tokens: tokens per name.
        cached_tokens: prompt tokens that the prefix cache had at admission.
        num_preemptions: how often it gave its place to an older one.
        is_batch: it is best-effort.
        ttft_target_ms: its own target; None: that of all requests.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    prefix_blocks: tuple[int, ...] = ()
    block_tokens: int = BLOCK_TOKENS
    cached_tokens: int = 0
    num_preemptions: int = 0
    is_batch: bool = False
    ttft_target_ms: float | None = None
    first_token_time: float | None = None
    completion_time: float | None = None

    def tokens(self, number: int) -> list[int]:
        """Return token ids for the prompt: all tokens of a named block have its name as their id.

        Args:
            number: of the request; its tokens outside of named blocks are those of no other request.
        """
        tokens: list[int] = []
        for name in self.prefix_blocks:
            tokens += [name] * self.block_tokens
        if len(tokens) < self.prompt_tokens:
            tokens += [_FIRST_OWN_TOKEN + number] * (self.prompt_tokens - len(tokens))
        return tokens[: self.prompt_tokens]

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
        SimulatedRequest(request.arrival_s, request.input_len, request.output_len, request.block_ids)
        for request in workload.requests
    ]
