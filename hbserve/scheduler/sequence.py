"""The records of one request: its life, its KV allocation on each instance, its rows in flight.

Phases of a request. `TRANSITIONS` holds the same as a table, and `Sequence.enter` asserts it::

    waiting ──► prefilling ──► transferring ──► decoding
       ▲            │  └───────────────┼───────────▲ │     one instance does both: no transfer
       └────────────┴──────────────────┴─────────────┘     preempted, or the attempt failed
    every phase ──► finished                               completed, aborted or failed

These records name instances and workers by id. Nothing here imports `instance` or `worker`: those two hold
sequences, so an object reference would close an import circle. `RequestPhases` finds an instance by its id,
`WorkerChoice` a worker. An id that is not found means that the instance's memory, or the worker, is gone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from hbserve.kv_cache.block_contents import extend_block_hashes
from hbserve.kv_cache.block_pool import BlockPool
from hbserve.messages.client import AddRequest
from hbserve.messages.worker import SequenceState
from hbserve.metrics.request_metrics import RequestMetrics
from hbserve.policy.step_time_predictor import StepWork
from hbserve.scheduler.tiers.tier import StoredRun
from hbserve.speculation import Draft, Speculator
from hbserve.speculation.measured_gain import Tried


class Phase(StrEnum):
    """The phase of a request, as `get_system_stats` shows it."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"
    FINISHED = "finished"


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.WAITING: frozenset({Phase.PREFILLING, Phase.FINISHED}),
    Phase.PREFILLING: frozenset({Phase.TRANSFERRING, Phase.DECODING, Phase.WAITING, Phase.FINISHED}),
    Phase.TRANSFERRING: frozenset({Phase.DECODING, Phase.WAITING, Phase.FINISHED}),
    Phase.DECODING: frozenset({Phase.WAITING, Phase.FINISHED}),
    Phase.FINISHED: frozenset(),
}
"""Every legal transition between phases."""


def max_total_tokens(num_prompt_tokens: int, max_tokens: int, max_model_len: int) -> int:
    """Return the maximum of tokens of a request, prompt and output together.

    A request with ``max_tokens`` 0 scores its prompt. A step samples one token for it, which may lie beyond the
    context, because nothing is computed after it.
    """
    if max_tokens == 0:
        return num_prompt_tokens + 1
    return min(num_prompt_tokens + max_tokens, max_model_len)


class InflightRow(msgspec.Struct, eq=False):
    """One sequence's part of a step that has been sent and not confirmed.

    Attributes:
        end: positions below this have KV once the step is confirmed.
        scores: whether the step reports log-probabilities of the prompt.
        is_void: the row continues a row that was lost; both are planned again.
        draft: its guessed tokens; None: it has none.
        num_joined: tokens before ``start`` of which the KV was computed for other requests, or is being computed.
    """

    sequence: Sequence
    attempt: int
    allocation: KVAllocation
    start: int
    end: int
    samples: bool
    scores: bool = False
    is_void: bool = False
    draft: Draft | None = None
    num_joined: int = 0

    @property
    def num_samples(self) -> int:
        """Number of tokens that its worker samples."""
        return self.samples + (0 if self.draft is None else len(self.draft.token_ids))

    @property
    def num_to_draft(self) -> int:
        """Number of guesses that its worker's draft model makes."""
        return 0 if self.draft is None else self.draft.num_to_draft

    def begin_round(self, draft: Draft, num_tokens: int) -> None:
        """Go on behind the tokens that the row has brought, as its worker does (`hbserve.speculation.rounds`).

        Args:
            draft: of the round that has ended, with its guesses.
        """
        self.start += num_tokens
        self.end += num_tokens
        self.draft = draft.after(num_tokens)
        self.allocation.num_planned, self.allocation.is_drafting = self.end, True


class InflightStep(msgspec.Struct, eq=False):
    """A step that has been sent and not confirmed.

    Attributes:
        num_samples: tokens that it samples.
        num_to_draft: guesses that its worker's draft model makes; has_unread: the draft model also reads a prompt.
        rounds: how often it may be done.
        num_scores: of how many tokens it reports log-probabilities, for each prompt of which it does.
        work: of all its rows; None: it has none.
        beside_decode: of a prefill step: decode steps may run at the same time; `WorkerChoice` sets it.
        after: id of another worker's step that this one waits for; 0: none.
        is_probe: it belongs to no request, and only its duration is of interest.
        tried: how its drafts were chosen; None: it has prompts, or no decode rows.
    """

    step_id: int
    rows: list[InflightRow]
    num_samples: int = 0
    num_to_draft: int = 0
    has_unread: bool = False
    rounds: int = 1
    num_scores: list[int] = []
    prefill_rows: int = 0
    prefill_tokens: int = 0
    work: StepWork | None = None
    beside_decode: bool = True
    after: int = 0
    is_probe: bool = False
    tried: Tried | None = None

    @property
    def num_passes(self) -> int:
        """Forward passes of the draft model that make its guesses."""
        return max([row.num_to_draft for row in self.rows]) if self.num_to_draft else 0


@dataclass(eq=False, slots=True)
class KVAllocation:
    """A sequence's memory on one instance: its slot, and its blocks in the instance's pool.

    The allocation owns its pins: every row, transfer and tier copy in flight pins the blocks, and only the methods
    below take or drop a pin. The pool frees the blocks of a freed allocation when the last pin is dropped.

    Attributes:
        epoch: identifies the pool's memory; once that memory is lost the allocation is void.
        owner: the name under which the pool knows the blocks.
        block_ids: the block table: the pool's own list, which only the pool changes.
        num_tokens_at_entry: positions below this are prefilled (here or elsewhere), later ones decoded.
        num_planned: positions whose KV exists or is in a plan that has been sent.
        num_computed: positions whose KV is confirmed to be in the pool.
        num_sealed: leading blocks that are in the pool's prefix cache or were offered to it.
        num_read: positions below this have KV of the draft model, or are in a plan that makes it read them.
        num_noted: leading blocks that the pool knows to be read.
        last_worker_id: the worker that got the sequence's last row.
        num_inflight: rows that were sent, are not confirmed, and count.
        is_drafting: its last row has a draft and is in flight: where the next row starts is not known yet.
        blocks_sent: by worker id, how many entries of the block table the worker has been told; a worker
            without an entry does not know the sequence.
        stored_runs: blocks that are to be loaded from KV tiers.
        load_start: positions from here on wait for a load under way, and no plan has them; None: there is no load.
        loaded_end: positions from ``load_start`` to this one have been loaded; None: the load has not ended.
        num_loads: loads that have begun.
        is_load_short: the last load has ended, and has not brought all that it was to bring.
        can_join: it may take blocks of others in the place of its own; no lost row can write to these any more.
    """

    instance_id: str
    epoch: int
    pool: BlockPool
    owner: str
    block_ids: list[int]
    slot: int
    num_tokens_at_entry: int
    num_planned: int
    num_computed: int
    num_sealed: int
    num_read: int = 0
    num_noted: int = 0
    last_worker_id: str | None = None
    num_inflight: int = 0
    is_drafting: bool = False
    blocks_sent: dict[str, int] = field(default_factory=dict)
    stored_runs: list[StoredRun] = field(default_factory=list)
    load_start: int | None = None
    loaded_end: int | None = None
    num_loads: int = 0
    is_load_short: bool = False
    can_join: bool = True

    def plan_load(self, runs: list[StoredRun]) -> None:
        """Have positions wait for a load of these runs, if there are any."""
        self.stored_runs = runs
        if runs:
            self.load_start = runs[0].first * self.pool.block_size

    @property
    def num_to_prefill(self) -> int:
        """Prompt tokens that a plan may have now; at most 0: there is none."""
        return (self.num_tokens_at_entry if self.load_start is None else self.load_start) - self.num_planned

    @property
    def lacks_block(self) -> bool:
        """Whether the next position to decode lies in a block that has not been allocated."""
        return self.num_planned >= self.num_tokens_at_entry and self.num_planned // self.pool.block_size >= len(
            self.block_ids
        )

    def begin_row(self, worker_id: str, keeps_state: bool) -> None:
        """Pin the blocks for a row that goes to a worker.

        Args:
            keeps_state: workers hold more of the sequence than its block table and its last token. What
                other workers hold of it is then out of date.
        """
        if keeps_state and self.last_worker_id != worker_id:
            self.blocks_sent.clear()
        self.last_worker_id = worker_id
        self.num_inflight += 1
        self.pool.pin(self.owner)

    def end_row(self, row: InflightRow) -> None:
        """Drop the pin of a row that its worker has computed, or can compute no more."""
        if not row.is_void:
            self.num_inflight -= 1
        self.pool.unpin(self.owner)

    def void_row(self, row: InflightRow) -> None:
        """Plan a row's positions again. The row stays pinned: its worker may still write."""
        row.is_void = True
        self.is_drafting = self.can_join = False
        self.num_planned = min(self.num_planned, row.start)
        # What the draft model has read is not confirmed, and nothing but a guess depends on it.
        self.num_read = 0
        self.num_inflight -= 1

    def join_blocks(self, block_hashes: list[bytes], end: int) -> None:
        """Take the blocks of others for the positions up to ``end``; the next row begins there.

        Args:
            block_hashes: of all the sequence's blocks.
        """
        size = self.pool.block_size
        first = self.num_planned // size
        self.pool.join_blocks(self.owner, first, block_hashes[first : end // size])
        self.num_planned = end
        self.blocks_sent.clear()  # workers know other blocks in these places

    def note_read_blocks(self, num_confirmed: int) -> None:
        """Tell the pool which sealed blocks the draft model has read; positions below ``num_confirmed`` are certain."""
        end = min(num_confirmed // self.pool.block_size, self.num_sealed)
        if end > self.num_noted:
            self.pool.note_read(self.block_ids[self.num_noted : end])
            self.num_noted = end

    def begin_transfer(self) -> None:
        """Pin the blocks for a transfer from or to them."""
        self.pool.pin(self.owner)

    def end_transfer(self) -> None:
        """Drop the pin of a transfer that can touch the blocks no more."""
        self.pool.unpin(self.owner)

    def begin_copy(self) -> None:
        """Pin the blocks for a copy from a KV tier."""
        self.pool.pin(self.owner)

    def end_copy(self) -> None:
        """Drop the pin of a copy that can touch the blocks no more."""
        self.pool.unpin(self.owner)


@dataclass(eq=False, slots=True)
class Sequence:
    """One request from arrival to its end; `RequestPhases` alone changes its phase and its allocations.

    Attributes:
        client: ZeroMQ identity of the client that sent the request.
        arrival: a number that grows with every request.
        arrival_time: on the scheduler's clock; for policies that weigh how long it has waited.
        tokens: prompt and output so far.
        attempt: how often it has been put back; results of earlier attempts are void.
        prefill_allocation, decode_allocation: the same object where one instance does both; the decode
            allocation is reserved together with the prefill allocation.
        num_blocks_dispatched: leading blocks whose transfer to the decode instance has been planned.
        open_transfers: transfers of this attempt that the decode instance has not confirmed.
        prefilled_at: when its prompt was computed in this attempt, if it decodes elsewhere.
        num_failures: attempts in a row that ended in a failure; progress resets it.
        num_tokens_at_failure: number of tokens at the last failure.
        num_setbacks: how often steps of it have been lost since its last token.
        retry_at: when it may be admitted again after a failure, on the scheduler's clock.
        num_scored: prompt tokens whose log-probabilities the client has, not counting the first token, which has none.
        num_late_masks: steps since its last token in which the mask of its grammar was not there.
        num_cached_tokens: prompt tokens that the attempt with the first token need not compute; None: never admitted.
        max_cached_tokens: the most of all attempts.
        expected_cached_tokens: of its tokens, so many were in a prefix cache when it began to wait.
        alike: an earlier prompt that begins alike and is being computed; ``num_alike_tokens``: what both have.
        planned_from: when it may be in a plan again after a step without the mask of its grammar, on the same clock.
        rank: its place in the queue, see `QueuePolicy.rank`.
        metrics: its times; `SchedulerMetrics.on_arrived` sets it.
        has_grammar: a token must be known before the next one can be chosen.
        keeps_state: a worker's state of the sequence changes with every token: token counts and grammars do.
        is_batch: it is best-effort: it has no targets, and takes what others leave.
        speculator: guesses its next tokens; None: nothing does.
    """

    client: bytes
    request: AddRequest
    arrival: int
    tokens: list[int]
    end_token_ids: frozenset[int]
    max_total_tokens: int
    arrival_time: float
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
    num_scored: int = 0
    planned_from: float = 0.0
    num_late_masks: int = 0
    num_cached_tokens: int | None = None
    max_cached_tokens: int = 0
    expected_cached_tokens: int = 0
    alike: Sequence | None = field(default=None, repr=False)
    num_alike_tokens: int = 0
    first_token_time: float | None = None
    last_token_time: float | None = None
    rank: tuple[int, float, float] = (0, 0.0, 0.0)
    metrics: RequestMetrics = field(init=False)
    block_hashes: list[bytes] = field(default_factory=list)
    has_grammar: bool = field(init=False)
    keeps_state: bool = field(init=False)
    is_batch: bool = field(init=False)
    speculator: Speculator | None = None

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self.is_batch = sampling.priority is not None
        self.has_grammar = sampling.grammar is not None
        self.keeps_state = (
            sampling.repetition_penalty != 1
            or sampling.presence_penalty != 0
            or sampling.frequency_penalty != 0
            or self.has_grammar
        )

    @classmethod
    def of_request(cls, client: bytes, request: AddRequest, arrival: int, max_model_len: int, now: float) -> Sequence:
        """Make the records of a request that has just come.

        If an earlier scheduler had the request, it goes on from the tokens that the client has, as if it had been
        preempted after them.
        """
        prompt, max_tokens = request.prompt_token_ids, request.sampling.max_tokens
        assert max_tokens is not None, "clients resolve it"
        sequence = cls(
            client=client,
            request=request,
            arrival=arrival,
            tokens=list(prompt),
            end_token_ids=frozenset(request.end_token_ids),
            max_total_tokens=max_total_tokens(len(prompt), max_tokens, max_model_len),
            arrival_time=now - request.age_s,
        )
        resumed = request.resumed
        if resumed is not None:
            sequence.num_scored = resumed.num_scored
        if resumed is not None and resumed.first_token_age_s is not None:
            sequence.tokens += resumed.token_ids
            sequence.first_token_time = now - resumed.first_token_age_s
            sequence.num_cached_tokens = 0  # the client has been told, with the first token
        return sequence

    def enter(self, phase: Phase) -> None:
        """Change the phase; an illegal transition is a bug."""
        assert phase in TRANSITIONS[self.phase], f"request {self.id}: {self.phase} -> {phase} is no transition"
        self.phase = phase

    @property
    def id(self) -> str:
        """The request's id, unique among the client's open requests."""
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def ttft_target_ms(self) -> float | None:
        """The request's own target."""
        return self.request.sampling.ttft_ms

    @property
    def tpot_target_ms(self) -> float | None:
        """The request's own target."""
        return self.request.sampling.tpot_ms

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether its client still waits for log-probabilities of the prompt."""
        return self.request.sampling.prompt_logprobs is not None and self.num_scored < self.num_prompt_tokens - 1

    def next_prompt_tokens(self, start: int, end: int) -> list[int] | None:
        """Return the prompt tokens that follow positions ``start .. end - 1`` if their log-probabilities are needed."""
        if not self.lacks_prompt_logprobs:
            return None
        return self.tokens[start + 1 : min(end + 1, self.num_prompt_tokens)] or None

    @property
    def allocations(self) -> list[KVAllocation]:
        """Its allocations, without duplicates."""
        allocations = [self.prefill_allocation] if self.prefill_allocation is not None else []
        if self.decode_allocation is not None and self.decode_allocation is not self.prefill_allocation:
            allocations.append(self.decode_allocation)
        return allocations

    def hashes(self, block_size: int) -> list[bytes]:
        """Return the hashes of all full blocks of its tokens."""
        extend_block_hashes(self.block_hashes, self.tokens, block_size, self.request.sampling.cache_salt)
        return self.block_hashes

    def state_for(self, allocation: KVAllocation) -> SequenceState:
        """Return all that a worker needs to continue the sequence."""
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
