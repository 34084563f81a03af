"""Prompts of one simulated worker, in the scheduler's order, and the prefix cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from hbserve.config import SchedulerConfig
from hbserve.policy.queue_policy import QueuePolicy, make_policy
from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork, num_pairs
from hbserve.simulate.clock import SimulatedClock
from hbserve.simulate.requests import SimulatedRequest

_FCFS = SchedulerConfig()


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Limits of one instance. The defaults are the engine's, and the KV that an 8B model leaves room for on an H200.

    Attributes:
        kv_tokens: tokens that its KV pool holds.
        scheduler: order of its queue.
    """

    chunk_size: int = 512
    max_chunk_prefill_tokens: int = 4096
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    kv_tokens: int = 800_000
    scheduler: SchedulerConfig = _FCFS


@dataclass(frozen=True)
class Chunks:
    """Prompt part of a step.

    Attributes:
        parts: requests, and tokens of each.
        pairs: of queries and keys; a pair of tokens within the chunk counts half.
    """

    parts: tuple[tuple[SimulatedRequest, int], ...]
    tokens: int
    pairs: float

    @property
    def work(self) -> StepWork:
        """Work of a step with nothing else in it."""
        return StepWork(0, 0, self.tokens, self.pairs)


class Prompts:
    """Requests that have an allocation and whose prompt is not complete, in the order of the scheduler's policy.

    Args:
        sizes: how much of one prompt, and of all prompts, a step takes.
    """

    def __init__(self, clock: SimulatedClock, sizes: Sizes) -> None:
        self._clock, self._sizes = clock, sizes
        self._predictor = StepTimePredictor()
        self.policy = make_policy(sizes.scheduler, self._predictor)
        self._is_fifo = type(self.policy) is QueuePolicy
        self.requests: list[SimulatedRequest] = []

    def __bool__(self) -> bool:
        return bool(self.requests)

    @property
    def num_unplanned_tokens(self) -> int:
        """Tokens that are in no running or planned step."""
        return sum(request.prompt_tokens - request.planned_tokens for request in self.requests)

    @property
    def backlog_tokens(self) -> int:
        """Tokens that are not computed."""
        return sum(request.prompt_tokens - request.computed_tokens for request in self.requests)

    def has_enough(self, request: SimulatedRequest) -> bool:
        """Return whether the next step is full and would not compute this request before one that is here."""
        tokens, key = 0, self._key(request)
        for other in self.requests:
            if not self._is_fifo and other.planned_tokens < other.prompt_tokens and self._key(other) > key:
                return False
            tokens += min(other.prompt_tokens - other.planned_tokens, self._sizes.chunk_size)
        return tokens >= self._sizes.max_chunk_prefill_tokens

    def take(self, budget: int, fit: Callable[[int, int], int] | None = None) -> Chunks:
        """Plan the prompt part of the next step.

        Args:
            budget: tokens that it may have.
            fit: limits a chunk by time: given its tokens and their start in the prompt, returns how many fit.
        """
        parts, tokens, pairs = [], 0, 0.0
        ordered = self.requests if self._is_fifo else sorted(self.requests, key=self._key)
        for request in ordered:
            start = request.planned_tokens
            chunk = wanted = min(request.prompt_tokens - start, self._sizes.chunk_size, budget - tokens)
            if chunk > 0 and fit is not None:
                chunk = fit(chunk, start)
            if chunk > 0:
                parts.append((request, chunk))
                request.planned_tokens += chunk
                tokens += chunk
                pairs += num_pairs(chunk, start)
            if tokens >= budget or chunk < wanted:
                break
        return Chunks(tuple(parts), tokens, pairs)

    def on_computed(self, chunks: Chunks, work: StepWork, seconds: float) -> list[SimulatedRequest]:
        """Note that a step has computed these; remove and return the requests whose prompt is complete.

        Args:
            work: of the whole step.
        """
        if chunks.tokens:
            self._predictor.observe(work, seconds)
        complete = []
        for request, tokens in chunks.parts:
            request.computed_tokens += tokens
            if request.computed_tokens == request.prompt_tokens:
                self.requests.remove(request)
                complete.append(request)
        return complete

    def _key(self, request: SimulatedRequest) -> tuple[bool, tuple[int, float, float]]:
        return self.policy.key(request, request.planned_tokens, self._clock.now)


class PrefixCache:
    """Blocks of earlier prompts. The least recently used blocks are dropped first."""

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity_tokens = capacity_tokens
        self._blocks: OrderedDict[int, int] = OrderedDict()
        self._tokens = 0

    def match(self, request: SimulatedRequest) -> int:
        """Return how many leading prompt tokens are cached; at least one is left to compute."""
        blocks = 0
        for name in request.prefix_blocks:
            if name not in self._blocks:
                break
            self._blocks.move_to_end(name)
            blocks += 1
        return min(blocks * request.block_tokens, request.prompt_tokens - 1)

    def insert(self, request: SimulatedRequest) -> None:
        """Add the blocks of a computed prompt."""
        for name in request.prefix_blocks:
            if name not in self._blocks:
                self._tokens += request.block_tokens
            self._blocks[name] = request.block_tokens
            self._blocks.move_to_end(name)
        while self._tokens > self._capacity_tokens:
            self._tokens -= self._blocks.popitem(last=False)[1]
