"""Messages between the scheduler and workers: plans out, results back."""

from __future__ import annotations

import msgspec

from hbserve.config import InstanceRole
from hbserve.messages.base import Message, TokenLogprobs, Value
from hbserve.messages.supervisor import ReportEvent
from hbserve.messages.tiers import FindBlocks, FoundBlocks, TierCommand, TierInfo, TierResult
from hbserve.messages.transfer import Peer, SendBlocks, TransferCommand, TransferReply
from hbserve.sampling_params import SamplingParams

NUM_BOARD_CELLS = 256
"""Workers that can be told apart on a `hbserve.engine.step_board.StepBoard`."""

NO_TOKEN = -1
"""Stands in `StepResult.token_ids` for a row whose token could not be sampled: its mask of a grammar was not there."""

TO_BE_DRAFTED = -2
"""Stands in `PlanRow.token_ids` for a guess that the worker's draft model makes at the head of the step."""

NO_STOP = (1 << 31) - 1
"""Stands in `PlanRow.stop` for no position."""

# --- scheduler -> worker --------------------------------------------------------------------------


class Ping(Message, frozen=True):
    """Ask for a sign of life.

    Attributes:
        scheduler_epoch: epoch of the scheduler that asks. A newer one means that all state here is void; an older one
            is answered by `Superseded`.
        known_epoch: the instance epoch that it knows, so that the answer can be `Hello` or `Pong`.
    """

    scheduler_epoch: int
    known_epoch: int


class SequenceState(Value, frozen=True):
    """State of a sequence that a worker needs to continue it, if it has not seen or has forgotten it.

    Attributes:
        slot: row of the worker's state tables, given by the scheduler.
        block_ids: the sequence's blocks in the worker's pool, from position 0.
        history: prompt and output tokens so far, only if penalties or a grammar need them.
        num_prompt_tokens: number of the prompt's tokens in ``history``.
        min_end_position: no token of ``end_token_ids`` is sampled for a position before this.
    """

    slot: int
    block_ids: list[int]
    sampling: SamplingParams
    end_token_ids: list[int]
    min_end_position: int
    num_prompt_tokens: int
    history: list[int] | None = None


class PlanRow(Value, frozen=True):
    """One sequence's part of a step: tokens at positions ``start ..  start + num_tokens - 1``.

    Attributes:
        token_ids: the tokens, or None for the one token that was sampled last for the slot.
        new_block_ids: blocks appended to the slot's table before the step.
        sample: whether the token for position ``start + num_tokens`` is sampled.
        sampled_elsewhere: whether another worker sampled that last token; it is on the board.
        next_token_ids: the tokens after the row's first positions whose log-probabilities are reported; None: none.
        num_drafts: how many of the last ``token_ids`` are guesses. The row then samples a token for the place of each
            of them, too, as if all guesses before it were right. They may be `TO_BE_DRAFTED`.
        unread: known tokens at positions ``unread_start ..`` that the draft model reads before it guesses anything; of
            a row whose guesses are to be drafted, those before ``start``. None: there are none.
        ahead: guesses of the tokens after ``token_ids``, for later rounds; see `StepPlan`. Where guesses are to be
            drafted, but the row has ended: those that it has had.
        stop: in a step with rounds, the output is complete when the row would start here; `NO_STOP`: nothing says so.
    """

    slot: int
    start: int
    num_tokens: int
    token_ids: list[int] | None
    new_block_ids: list[int]
    sample: bool
    sampled_elsewhere: bool = False
    next_token_ids: list[int] | None = None
    num_drafts: int = 0
    unread: list[int] | None = None
    unread_start: int = 0
    ahead: list[int] = msgspec.field(default_factory=list)
    stop: int = NO_STOP

    @property
    def num_samples(self) -> int:
        """Number of tokens that it samples."""
        return self.sample + self.num_drafts

    @property
    def num_to_draft(self) -> int:
        """Number of guesses that the worker's draft model makes: all of the row, or none."""
        drafts, token_ids = self.num_drafts, self.token_ids
        return drafts if drafts and token_ids is not None and token_ids[-1] == TO_BE_DRAFTED else 0

    @property
    def kept_guesses(self) -> list[int]:
        """Guesses to verify in place of those that the draft model makes; empty: there are none.

        A row that has ended, in a step with rounds, keeps those of its last round. It writes KV at the same positions
        again, which may be known by then as those of its tokens; other guesses would change them.
        """
        return [] if not self.num_to_draft or self.ahead[:1] == [TO_BE_DRAFTED] else self.ahead


class StepRef(Value, frozen=True):
    """Reference to a step of a worker on the same arenas: the worker's cell on their board, and the step's id."""

    cell: int
    step_id: int


class StepPlan(Message, frozen=True):
    """One step of a worker: what to compute, in order; answered by one `StepResult`.

    Attributes:
        epoch: the instance epoch that the plan is for; another incarnation drops it.
        new_sequences: state to install before the step.
        sends: transfers to start when the step is done.
        role: before the step, get ready for the work of an instance of this role.
        cell: the board's cell to mark when the step is done; None: no worker looks at it.
        after: another worker's step that must be done before this one begins.
        is_probe: it belongs to no request; only its duration is of interest.
        rounds: how often the step may be done, at most, each time behind the tokens that it has brought; see
            `hbserve.speculation.rounds`.
        rereads: guesses that were right are unread again, because the drafter is a head: it has read them with hidden
            states of its own.
    """

    epoch: int
    step_id: int
    rows: list[PlanRow]
    new_sequences: list[SequenceState]
    sends: list[SendBlocks]
    role: InstanceRole | None = None
    cell: int | None = None
    after: StepRef | None = None
    is_probe: bool = False
    rounds: int = 1
    rereads: bool = False


class StepLost(Message, frozen=True):
    """A step that a plan waits for will never be done: run the plan's step without it; its result does not count."""

    step: StepRef


class Shutdown(Message, frozen=True):
    """Finish what is in flight and exit. ``error``: why the instance cannot be used here, if that is the reason."""

    error: str | None = None


# --- worker -> scheduler --------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """An instance introduces itself: its pool is empty, its state is void.

    Attributes:
        role: the instance's role in the configuration of its process.
        serves_as: the role that it has prepared for last, which an operator may have changed.
        epoch: number of this incarnation, different at every start.
        arena_epoch: epoch of its KV memory: the same, or that of the process that holds the memory.
        model: identity of its weights, see `hbserve.models.fingerprint.model_fingerprint`.
        dtype: of what is not quantised; kv_dtype: of KV.
        weights: format of the matrices, such as ``fp8-channel``; empty: they are in ``dtype``.
        block_bytes: bytes of one KV block over all layers and ranks.
        num_layers: layers in a block; head_bytes: bytes of one KV head in one block, over all layers.
        peers: addresses of its ranks for KV, in their order.
        tiers: where it can store KV blocks and load them from, the fastest first.
        one_sided: whether its transfer backend writes into the receiver's arena, while the receiver takes no part.
        has_eagle_head: whether its drafts are those of an EAGLE-3 head, not of a draft model.
    """

    instance_id: str
    role: InstanceRole
    serves_as: InstanceRole
    epoch: int
    arena_epoch: int
    pid: int
    model: str
    dtype: str
    kv_dtype: str
    num_blocks: int
    block_size: int
    block_bytes: int
    num_layers: int
    head_bytes: int
    max_model_len: int
    vocab_size: int
    device: str
    peers: list[Peer]
    one_sided: bool = False
    has_eagle_head: bool = False
    tiers: list[TierInfo] = msgspec.field(default_factory=list)
    weights: str = ""

    @property
    def formats(self) -> dict[str, str]:
        """What the numbers of a model are in, for clients and operators."""
        return {"dtype": self.dtype, "weights": self.weights or self.dtype, "kv_cache_dtype": self.kv_dtype}


class Pong(Message, frozen=True):
    """Sign of life."""

    epoch: int


class Superseded(Message, frozen=True):
    """Answer to a `Ping` of a scheduler that is not the newest: the worker obeys another one."""

    scheduler_epoch: int


class StepResult(Message, frozen=True):
    """Result of one step, or of one round of it.

    Attributes:
        token_ids: sampled tokens, `PlanRow.num_samples` for each plan row, in the plan's order; `NO_TOKEN` if the row
            has to be planned again.
        logprobs: likewise, None where not asked for.
        prompt_logprobs: one list for each plan row with ``next_token_ids``, in the plan's order, one entry per token.
        busy_s: time the device worked on it, seconds; draft_s: the first part of it, in which the draft model guessed.
        host_s: time the host took to prepare and launch it; on a CPU that is the step itself.
        early_s: how long the step was ready before the device could begin it; negative: how long the device waited for
            it.
        error: the step failed; the worker exits after this message.
        row_errors: why sequences can get no token any more, by index in ``token_ids``.
        expert_tokens: per layer and expert, how many tokens it has computed since the last report; now and then.
        forced: the tokens from a sample's own on that its grammar leaves no choice of, by index in ``token_ids``; they
            hold if the row's draft is right.
        more: another round follows, with a result of its own.
        draft_ids: the guesses that the draft model has made, `PlanRow.num_to_draft` for each row, in the plan's order.
    """

    epoch: int
    step_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None
    busy_s: float
    host_s: float = 0.0
    early_s: float = 0.0
    error: str | None = None
    prompt_logprobs: list[list[TokenLogprobs]] | None = None
    row_errors: dict[int, str] | None = None
    expert_tokens: list[list[int]] | None = None
    draft_s: float = 0.0
    forced: dict[int, list[int]] | None = None
    more: bool = False
    draft_ids: list[int] = msgspec.field(default_factory=list)


class InstanceFailed(Message, frozen=True):
    """An instance, or a rank of it, cannot serve and exits; ``error`` says why."""

    instance_id: str
    error: str


class WantsToLeave(Message, frozen=True):
    """An instance asks for no new work, and for `Shutdown` when it has none left."""

    epoch: int


class Leaving(Message, frozen=True):
    """An instance has been told to end: it takes no more plans, and does not answer those in flight."""

    epoch: int


InstanceCommand = Ping | StepPlan | StepLost | TransferCommand | TierCommand | FindBlocks | Shutdown
InstanceReply = (
    Hello
    | Pong
    | Superseded
    | StepResult
    | TransferReply
    | TierResult
    | FoundBlocks
    | InstanceFailed
    | WantsToLeave
    | Leaving
    | ReportEvent
)
