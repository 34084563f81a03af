"""The scheduler's record of one request, and of its stay on each worker."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from hbserve.kv_cache.block_pool import extend_block_hashes
from hbserve.messages.client import AddRequest
from hbserve.messages.worker import SequenceState

if TYPE_CHECKING:
    from hbserve.kv_cache.block_pool import BlockPool
    from hbserve.metrics.request_metrics import RequestMetrics
    from hbserve.scheduler.instance import InstanceHandle
    from hbserve.scheduler.worker import WorkerHandle


@dataclass(slots=True)
class InflightRow:
    """One sequence's part of a step that has been sent and not confirmed."""

    sequence: Sequence
    attempt: int
    allocation: KVAllocation
    start: int
    end: int  # positions below this have KV once the step is confirmed
    samples: bool
    is_void: bool = False  # it goes on from a row that was lost, and is planned again with that


@dataclass(slots=True)
class InflightStep:
    """A step that has been sent and not confirmed.

    Attributes:
        prefill_pairs: of queries and keys, of its prompts.
        beside_decode: if it is prefill's: decode has a turn meanwhile.
        after: another worker's step that it waits for; 0: none.
    """

    step_id: int
    rows: list[InflightRow]
    prefill_rows: int = 0
    prefill_tokens: int = 0
    prefill_pairs: float = 0.0
    beside_decode: bool = True
    after: int = 0


class Phase(StrEnum):
    """Where a request is in its life; what `get_system_stats` shows."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class KVAllocation:
    """A sequence's place on one instance: its slot there, its blocks in that instance's pool.

    Attributes:
        instance: whose pool has the blocks.
        epoch: of the pool's memory; once it is over the allocation is void.
        owner: the name under which the pool knows the blocks.
        num_tokens_at_entry: positions below this are prefilled (here or elsewhere), later ones decoded.
        num_planned: positions whose KV exists or is in a plan that has been sent.
        num_computed: positions whose KV is confirmed to be in the pool.
        last_worker: who got the sequence's last row; while something is in flight there, only a worker
            that can follow it may go on.
        num_inflight: rows that have been sent to it and are not confirmed.
        blocks_sent: how much of the block table each worker has been told; a worker that is not
            there does not know the sequence.
        num_sealed: leading blocks that are in the pool's prefix cache or were offered to it.
    """

    instance: InstanceHandle
    epoch: int
    pool: BlockPool
    owner: str
    slot: int
    num_tokens_at_entry: int
    num_planned: int
    num_computed: int
    num_sealed: int
    last_worker: WorkerHandle | None = None
    num_inflight: int = 0
    blocks_sent: dict[WorkerHandle, int] = field(default_factory=dict)

    def can_go_to(self, worker: WorkerHandle) -> bool:
        """Whether a worker may get the next row."""
        last = self.last_worker
        return not self.num_inflight or last is None or last is worker or worker.can_follow(last)

    def go_to(self, worker: WorkerHandle, keeps_state: bool) -> None:
        """A worker gets the next row.

        Args:
            keeps_state: whether workers hold more of the sequence than its block table and its last
                token; what another one held of it is then out of date.
        """
        if self.last_worker is not worker and keeps_state:
            self.blocks_sent.clear()
        self.last_worker = worker
        self.num_inflight += 1

    def roll_back(self, start: int) -> None:
        """A row in flight counts for nothing; from its first position on, all is to be planned again."""
        self.num_planned = min(self.num_planned, start)
        self.num_inflight -= 1

    @property
    def block_ids(self) -> list[int]:
        """The block table."""
        return self.pool.get_block_ids(self.owner)


@dataclass(eq=False, slots=True)
class Sequence:
    """One request from arrival to its end; ordered by arrival.

    Attributes:
        client: ZeroMQ identity of who asked.
        arrival: a number that grows with every request.
        arrival_time: on the monotonic clock; for policies that weigh how long it has waited.
        tokens: prompt and output so far.
        attempt: how often it has been put back; results of earlier attempts are void.
        prefill_allocation, decode_allocation: the same object where one worker does both; the decode allocation is
            reserved together with the prefill allocation.
        num_blocks_dispatched: leading blocks whose transfer to the decode side has been planned.
        open_transfers: transfers of this attempt that the decode side has not confirmed.
        prefilled_at: when its prompt was done in this attempt, where it decodes elsewhere.
        num_failures: attempts in a row that ended in a failure; forgiven by progress.
        num_tokens_at_failure: how long it was at the last one.
        num_setbacks: how often steps of it have been lost since its last token.
        retry_at: when it may be admitted again after one, on the monotonic clock.
        rank: its place in the queue, see `QueuePolicy.rank`.
        metrics: its times; `SchedulerMetrics.arrived` sets it.
    """

    client: bytes
    request: AddRequest
    arrival: int
    tokens: list[int]
    end_token_ids: frozenset[int]
    max_total_tokens: int
    arrival_time: float = field(default_factory=time.monotonic)
    phase: Phase = Phase.WAITING
    attempt: int = 0
    prefill_allocation: KVAllocation | None = None
    decode_allocation: KVAllocation | None = None
    num_blocks_dispatched: int = 0
    open_transfers: set[str] = field(default_factory=set)
    prefilled_at: float = 0.0
    num_failures: int = 0
    num_tokens_at_failure: int = 0
    num_setbacks: int = 0
    retry_at: float = 0.0
    num_cached_tokens: int | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    rank: tuple[int, float, float] = (0, 0.0, 0.0)
    metrics: RequestMetrics = field(init=False)
    block_hashes: list[bytes] = field(default_factory=list)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def ttft_target_ms(self) -> float | None:
        """That it came with."""
        return self.request.sampling.ttft_ms

    @property
    def tpot_target_ms(self) -> float | None:
        """That it came with."""
        return self.request.sampling.tpot_ms

    @property
    def has_grammar(self) -> bool:
        """Whether a token must be known before the next one can be chosen."""
        return self.request.sampling.grammar is not None

    @property
    def allocations(self) -> list[KVAllocation]:
        """The allocations it has, each once."""
        allocations = [self.prefill_allocation] if self.prefill_allocation is not None else []
        if self.decode_allocation is not None and self.decode_allocation is not self.prefill_allocation:
            allocations.append(self.decode_allocation)
        return allocations

    def hashes(self, block_size: int) -> list[bytes]:
        """Hashes of all full blocks of its tokens."""
        extend_block_hashes(self.block_hashes, self.tokens, block_size)
        return self.block_hashes

    @property
    def keeps_state(self) -> bool:
        """Whether a worker's state of the sequence changes with every token: token counts and grammars do."""
        sampling = self.request.sampling
        penalised = (
            sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        )
        return penalised or self.has_grammar

    def state_for(self, allocation: KVAllocation) -> SequenceState:
        """All that a worker needs to take the sequence on."""
        sampling = self.request.sampling
        return SequenceState(
            slot=allocation.slot,
            block_ids=list(allocation.block_ids),
            sampling=sampling,
            end_token_ids=self.request.end_token_ids,
            min_end_position=self.num_prompt_tokens + sampling.min_tokens,
            num_prompt_tokens=self.num_prompt_tokens,
            history=list(self.tokens) if self.keeps_state else None,
        )
