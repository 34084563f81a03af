"""Every message that crosses a process border, one family per border.

Encoded with msgpack as tagged arrays: small, typed on arrival, and nothing in them can run code.
Control only: tokens, block ids and numbers; never a tensor (KV bytes move by `kv_transfer`).

    client (API server, LLM)  --ClientMessage-->    CpuScheduler   --SchedulerReply-->  client
    launcher of workers       --SetWorkers-->       CpuScheduler   --WorkerLost-->      launcher of workers
    CpuScheduler              --InstanceCommand-->  GpuInstance    --InstanceReply-->   CpuScheduler
    GpuInstance (rank 0)      --RankCommand-->      RankWorker     --RankReply-->       GpuInstance
    API server                --TextRequests-->     text process   --TextReplies-->     API server
"""

from __future__ import annotations

from typing import Any

import msgspec

from hbserve.config import InstanceRole
from hbserve.sampling_params import SamplingParams


class Message(msgspec.Struct, tag=True, array_like=True, frozen=True, kw_only=True):
    """Base of all messages. Arrays, not maps: both ends run the same version."""


class Value(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """Base of the parts of messages."""


# --- client -> scheduler -------------------------------------------------------------------------


class AddRequest(Message, frozen=True):
    """Generate tokens after a prompt; ``sampling.n`` is 1 here, the client makes n requests of it.

    Attributes:
        request_id: unique among the client's open requests.
        end_token_ids: tokens that end the output: the model's own, unless ignored, and the request's.
        sampling: with ``seed`` and ``max_tokens`` resolved.
    """

    request_id: str
    prompt_token_ids: list[int]
    end_token_ids: list[int]
    sampling: SamplingParams


class AbortRequest(Message, frozen=True):
    """Give up on a request, in whatever state it is. Unknown ids are ignored: it may just have ended."""

    request_id: str
    finish_reason: str = "abort"


class GetStats(Message, frozen=True):
    """Ask for `Stats`; answered even while the system is not ready.

    Attributes:
        recent: with ``recent``: the last requests' timelines and the last events.
    """

    query_id: int
    recent: bool = False


class SubscribeReady(Message, frozen=True):
    """Ask for `Ready` once every instance is there, or `NotReady` at the deadline."""

    deadline_s: float


class WorkerSpec(Value, frozen=True):
    """A worker of an instance whose memory a resident process holds.

    Attributes:
        role: the phase that it does.
        percentage: its share of the device.
        address: where it listens for the scheduler.
    """

    worker_id: str
    role: InstanceRole
    percentage: int
    address: str


class GetWindow(Message, frozen=True):
    """Ask for the `Window` of the last ``seconds``."""

    query_id: int
    seconds: float


class MarkRotation(Message, frozen=True):
    """A rotation begins, or is over: latencies of the time between are left out of windows."""

    begins: bool


class SetWorkers(Message, frozen=True):
    """Which workers an instance has from now on; from whoever starts and ends them.

    A worker that the scheduler knows and that is named nowhere here retires: it gets no more plans
    once another can do its phase, and is told to end when nothing of it is in flight.

    Attributes:
        arena_epoch: of the memory that they are attached to, or 0 while there is none. Where it is
            not the one before, that memory and all KV in it are lost.
        gone: names of workers whose processes have ended: nothing of theirs can write any more.
        prefill_percentage, decode_percentage: each phase's share while both are busy.
        reason: why, in words.
    """

    instance_id: str
    arena_epoch: int
    workers: list[WorkerSpec]
    gone: list[str]
    prefill_percentage: int
    decode_percentage: int
    reason: str = ""


class SetRole(Message, frozen=True):
    """Have an instance change its role once it has nothing left to do; answered by `RoleSet`.

    Attributes:
        deadline_s: then it goes on as it was.
    """

    query_id: int
    instance_id: str
    role: InstanceRole
    deadline_s: float


# --- scheduler -> client -------------------------------------------------------------------------


class TokenLogprobs(Value, frozen=True):
    """Log-probabilities at one output position.

    Attributes:
        token: of the chosen token.
        top_ids, top: the most likely tokens, best first, and theirs.
    """

    token: float
    top_ids: list[int]
    top: list[float]


class RequestOutput(Value, frozen=True):
    """New tokens of one request, or its end.

    Attributes:
        finish_reason: ``stop`` (an end token, which is the last of ``token_ids``), ``length``,
            ``abort``, ``error``, or None while it goes on.
        error: what went wrong, and ``error_kind`` the class in `hbserve.errors` it becomes.
        num_cached_tokens: prompt tokens whose KV came from the prefix cache (first output only).
        retry_after_s: when a refused request may fare better.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    error: str | None = None
    error_kind: str | None = None
    error_param: str | None = None
    num_cached_tokens: int = 0
    retry_after_s: float | None = None


class OutputBatch(Message, frozen=True):
    """All that happened to a client's requests since the last batch."""

    outputs: list[RequestOutput]


class Stats(Message, frozen=True):
    """Answer to `GetStats`: plain numbers and names, the shape of ``get_system_stats()``."""

    query_id: int
    stats: dict[str, Any]


class Ready(Message, frozen=True):
    """Every instance is registered.

    Attributes:
        max_model_len: most tokens of prompt and output together.
    """

    max_model_len: int
    vocab_size: int


class RoleSet(Message, frozen=True):
    """Answer to `SetRole`. Attributes: error: why nothing has changed."""

    query_id: int
    error: str | None = None


class NotReady(Message, frozen=True):
    """The deadline passed, or an instance said why it cannot serve."""

    reason: str


class Window(Message, frozen=True):
    """Answer to `GetWindow`: an `hbserve.metrics.window_metrics.AggregatedMetrics`, as plain data."""

    query_id: int
    metrics: dict[str, Any]


class WorkerLost(Message, frozen=True):
    """To whoever sent `SetWorkers`: a worker failed or does not answer; its process must be ended."""

    worker_id: str
    reason: str


# --- scheduler -> instance -----------------------------------------------------------------------


class Ping(Message, frozen=True):
    """A sign of life is wanted.

    Attributes:
        scheduler_epoch: which scheduler asks. A new one means that all state here is void.
        known_epoch: the instance epoch it knows, so that the answer can be `Hello` or `Pong`.
    """

    scheduler_epoch: int
    known_epoch: int


class SequenceState(Value, frozen=True):
    """All that a worker must know to go on with a sequence it has not seen, or has forgotten.

    Attributes:
        slot: row of the worker's state tables, given by the scheduler.
        block_ids: of positions 0.., all blocks that the sequence has in the worker's pool.
        history: prompt and output tokens so far, only where penalties or a grammar need them.
        num_prompt_tokens: how many of ``history`` are the prompt's.
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
        token_ids: the tokens, or None for the one token that this worker sampled last for the slot.
        new_block_ids: blocks appended to the slot's table before the step.
        sample: whether the token for position ``start + num_tokens`` is sampled.
    """

    slot: int
    start: int
    num_tokens: int
    token_ids: list[int] | None
    new_block_ids: list[int]
    sample: bool


class Peer(Value, frozen=True):
    """Where one rank of an instance receives KV.

    Attributes:
        rank: its number among all ranks of all instances.
        epoch: the instance's incarnation.
        endpoint: its backend's own address.
        link_epoch: raised by the scheduler when the link between the two has broken; both ends
            then start it afresh.
    """

    rank: int
    epoch: int
    endpoint: str
    link_epoch: int = 0


class OpenLink(Message, frozen=True):
    """Be ready to receive from another instance, under a link epoch; answered by `LinkOpened`.

    Attributes:
        sources: the other instance's ranks.
    """

    source_id: str
    link_epoch: int
    sources: list[Peer]


class CloseLink(Message, frozen=True):
    """A link has failed or its sender is lost: see to it that nothing of it is written any more, then say `LinkClosed`.

    Attributes:
        senders_done: every sender on it has answered, so that none of them writes any more of its
            own will; False where the sender's instance is lost and may still be at it.
    """

    source_id: str
    link_epoch: int
    sources: list[Peer]
    senders_done: bool


class SendBlocks(Message, frozen=True):
    """Send KV blocks after the step they come with. ``transfer_id`` pairs it with `ReceiveBlocks`.

    Attributes:
        targets: the receiver's ranks; which rank sends what to which, see `kv_transfer.head_split`.
        generations: of the blocks, on the sender's side; a stale one is refused.
        target_block_ids: where they go, in the receiver's pool.
        checksum: whether the answer shall hold the blocks' checksums.
    """

    transfer_id: str
    request_id: str
    targets: list[Peer]
    block_ids: list[int]
    generations: list[int]
    target_block_ids: list[int]
    checksum: bool = False


class ReceiveBlocks(Message, frozen=True):
    """Receive KV blocks into these blocks of the receiver's pool, in the sender's order."""

    transfer_id: str
    request_id: str
    sources: list[Peer]
    block_ids: list[int]
    generations: list[int]


class FinishBlocks(Message, frozen=True):
    """Make blocks that have arrived usable; answered by the receiver's `TransferResult`.

    Where the sender has written by itself and has more ranks, their heads are put into their places.
    Then the blocks are compared with what was sent.

    Attributes:
        num_sources: ranks of the sender.
        checksums: by rank of the sender, as in `TransferResult`; None: they are not compared.
    """

    transfer_id: str
    num_sources: int
    block_ids: list[int]
    generations: list[int]
    checksums: list[list[int]] | None


class CancelTransfer(Message, frozen=True):
    """Give up on a transfer. It is still answered by `TransferResult`; see `CloseLink` for when nothing is written."""

    transfer_id: str


class StepPlan(Message, frozen=True):
    """One step of a worker: what to compute, in order; answered by one `StepResult`.

    Attributes:
        epoch: of the instance it was made for; another incarnation drops it.
        new_sequences: state to install before the step.
        sends: transfers to start when the step is done.
    """

    epoch: int
    step_id: int
    rows: list[PlanRow]
    new_sequences: list[SequenceState]
    sends: list[SendBlocks]


class Shutdown(Message, frozen=True):
    """Finish what is in flight and exit."""


# --- instance -> scheduler -----------------------------------------------------------------------


class Hello(Message, frozen=True):
    """An instance introduces itself: its pool is empty, its state is void.

    Attributes:
        epoch: number of this incarnation, different at every start.
        arena_epoch: of its KV memory: the same, or of the process that holds it.
        block_bytes: of one KV block over all layers and ranks.
        head_bytes: of one KV head in one block, over all layers.
        peers: where its ranks receive KV, in their order.
        one_sided: its transfer backend writes into the receiver's arena, which takes no part.
    """

    instance_id: str
    role: InstanceRole
    epoch: int
    arena_epoch: int
    pid: int
    num_blocks: int
    block_size: int
    block_bytes: int
    head_bytes: int
    max_model_len: int
    vocab_size: int
    device: str
    peers: list[Peer]
    one_sided: bool = False


class Pong(Message, frozen=True):
    """Sign of life."""

    epoch: int


class StepResult(Message, frozen=True):
    """What a step produced.

    Attributes:
        token_ids: sampled tokens, one per plan row with ``sample``, in the plan's order.
        logprobs: likewise, None where not asked for.
        busy_s: time the device worked on it, seconds.
        error: the step failed; the worker exits after saying so.
    """

    epoch: int
    step_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None
    busy_s: float
    error: str | None = None


class LinkOpened(Message, frozen=True):
    """A link is ready for transfers.

    Attributes:
        peers: where the ranks receive what comes on it, in their order.
        error: why it is not; the instance then exits.
    """

    epoch: int
    source_id: str
    link_epoch: int
    peers: list[Peer]
    error: str | None = None


class LinkClosed(Message, frozen=True):
    """Nothing that was sent on the link is written after this."""

    epoch: int
    source_id: str
    link_epoch: int


class TransferResult(Message, frozen=True):
    """The end of one side of a transfer.

    Attributes:
        sent: True from the sender, False from the receiver.
        seconds: from when the blocks were ready (sender) or asked for (receiver) to the end, less ``queued_s``.
        queued_s: time that went to other transfers on the link.
        error: None if every byte is there.
        error_kind: ``timeout``, ``stale``, ``checksum``, ``cancelled``, or ``backend``.
        checksums: if they were asked for, by rank of the sender: for each part that its blocks are cut
            into (one, unless the receiver has more ranks), one for each block.
    """

    epoch: int
    transfer_id: str
    sent: bool
    num_bytes: int
    seconds: float
    queued_s: float = 0.0
    error: str | None = None
    error_kind: str | None = None
    checksums: list[list[int]] | None = None


class InstanceFailed(Message, frozen=True):
    """An instance, or a rank of it, cannot serve and exits; why."""

    instance_id: str
    error: str


class Leaving(Message, frozen=True):
    """An instance has been told to end: no more plans; what it has not answered it will not answer."""

    epoch: int


# --- rank 0 of an instance -> its other ranks ----------------------------------------------------
# Plans come on a line of their own, encoded `StepPlan`s.


class BeginEpoch(Message, frozen=True):
    """Forget everything, and answer with `EpochBegun`.

    Attributes:
        epoch: of the instance.
        num_plans: so many plans have been sent since the start; the last of them is finished first.
    """

    epoch: int
    num_plans: int


# --- a rank -> rank 0 of its instance ------------------------------------------------------------


class EpochBegun(Message, frozen=True):
    """Nothing of the epoch before can touch the rank's arena any more. Attributes: peer: where it receives KV."""

    peer: Peer


# --- API server -> text process ------------------------------------------------------------------


class TextStreamOptions(Value, frozen=True):
    """How an output becomes text; see `hbserve.tokenizer.IncrementalDetokenizer`."""

    skip_special_tokens: bool
    stop: list[str]
    min_tokens: int


class EncodeText(Message, frozen=True):
    """Answered by `Encoded` or `TextFailed`."""

    query_id: int
    text: str
    add_special_tokens: bool


class EncodeChat(Message, frozen=True):
    """Answered by `Encoded` or `TextFailed`.

    Attributes:
        messages, tools: plain data, as chat templates take them.
    """

    query_id: int
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None


class CheckGrammar(Message, frozen=True):
    """Answered by `Checked` or `TextFailed`.

    Attributes:
        token_ids: an output without its end token, of which is asked whether it follows the grammar;
            None: whether the grammar can be followed at all.
    """

    query_id: int
    grammar: str
    vocab_size: int
    token_ids: list[int] | None


class OpenText(Message, frozen=True):
    """Begin a stream. ``token_ids``: what it has had already, in a process that has died; not answered."""

    stream: int
    options: TextStreamOptions
    token_ids: list[int]


class FeedText(Message, frozen=True):
    """Tokens of a stream, answered by one `StreamText`; see `hbserve.tokenizer.text_service.OutputStream`."""

    stream: int
    token_ids: list[int]
    shown: int
    last: bool


class CloseText(Message, frozen=True):
    """Forget a stream."""

    stream: int


# --- text process -> API server ------------------------------------------------------------------


class Encoded(Message, frozen=True):
    """Answer to `EncodeText` and `EncodeChat`."""

    query_id: int
    token_ids: list[int]


class Checked(Message, frozen=True):
    """Answer to `CheckGrammar`. ``problem``: why the output does not follow the grammar."""

    query_id: int
    problem: str | None = None


class TextFailed(Message, frozen=True):
    """A query that can never be answered; becomes an `InvalidRequestError`."""

    query_id: int
    error: str
    param: str | None


class OutputText(Value, frozen=True):
    """What tokens have become.

    Attributes:
        text: what may be shown now.
        num_tokens: tokens used; fewer than were given if a stop string ended the text before.
        stop_string: the one that ended it.
    """

    text: str
    num_tokens: int
    stop_string: str | None = None


class StreamText(Message, frozen=True):
    """Answer to `FeedText`."""

    stream: int
    output: OutputText


ClientMessage = AddRequest | AbortRequest | GetStats | SubscribeReady | SetWorkers | SetRole | GetWindow | MarkRotation
SchedulerReply = OutputBatch | Stats | Ready | NotReady | WorkerLost | RoleSet | Window
TransferCommand = OpenLink | CloseLink | ReceiveBlocks | FinishBlocks | CancelTransfer
TransferReply = LinkOpened | LinkClosed | TransferResult
InstanceCommand = Ping | StepPlan | TransferCommand | Shutdown
RankCommand = BeginEpoch | TransferCommand
RankReply = EpochBegun | TransferReply | StepResult | InstanceFailed
InstanceReply = Hello | Pong | StepResult | TransferReply | InstanceFailed | Leaving
TextRequest = EncodeText | EncodeChat | CheckGrammar | OpenText | FeedText | CloseText
TextReply = Encoded | Checked | TextFailed | StreamText
