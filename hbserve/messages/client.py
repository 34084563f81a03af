"""Messages between clients (the API server, `LLM`) and the scheduler: requests in, tokens out."""

from __future__ import annotations

from typing import Annotated

import msgspec

from hbserve.messages.admin import (
    GetLoad,
    GetStats,
    GetWindowMetrics,
    InstanceChanged,
    PrepareRoles,
    RecentLoad,
    RemoveInstance,
    SetRole,
    Stats,
    WindowMetrics,
)
from hbserve.messages.base import Message, Seconds, TokenLogprobs, Value
from hbserve.messages.membership import Join, Joined
from hbserve.messages.supervisor import MarkRotation, ReportEvent, SetWorkers, WorkerLost
from hbserve.sampling_params import SamplingParams

# --- client -> scheduler --------------------------------------------------------------------------


class Resumed(Value, frozen=True):
    """What the client has of a request that an earlier scheduler served; the new one goes on from there.

    Attributes:
        token_ids: output tokens.
        num_scored: prompt tokens whose log-probabilities it has, not counting the first token, which has none.
        first_token_age_s: time since the first output token came; None: there is none.
    """

    token_ids: list[int]
    num_scored: int = 0
    first_token_age_s: Seconds | None = None


class AddRequest(Message, frozen=True):
    """Generate tokens after a prompt. ``sampling.n`` is 1 here, because the client makes n requests of it.

    Attributes:
        request_id: unique among the client's open requests.
        end_token_ids: tokens that end the output: the model's, unless they are ignored, and the request's.
        sampling: with ``seed`` and ``max_tokens`` resolved.
        age_s: time that the request has waited at its client, which counts as if it had waited at the scheduler.
        resumed: progress under an earlier scheduler; None: no scheduler had the request.
        predicted_token_ids: the output that the client expects, as far as it knows; None: it expects nothing.
    """

    request_id: str
    prompt_token_ids: list[int]
    end_token_ids: list[int]
    sampling: SamplingParams
    age_s: Seconds = 0.0
    resumed: Resumed | None = None
    predicted_token_ids: list[int] | None = None


class AbortRequest(Message, frozen=True):
    """Abort a request in any state. An unknown id is ignored, because the request may just have ended."""

    request_id: str
    finish_reason: str = "abort"


class Attach(Message, frozen=True):
    """Ask for `Attached`; the first message on a connection, and later a sign of life.

    Attributes:
        client_id: the same for all connections of a client. Its requests over an earlier connection end.
    """

    client_id: Annotated[str, msgspec.Meta(max_length=64)]


class SubscribeReady(Message, frozen=True):
    """Ask for `Ready` when all instances are registered, or `NotReady` at the deadline."""

    deadline_s: Seconds


# --- scheduler -> client --------------------------------------------------------------------------


class RequestOutput(Value, frozen=True):
    """New tokens of one request, or its end.

    Attributes:
        finish_reason: ``stop`` (an end token, which is the last of ``token_ids``), ``length``, ``abort``, ``error``, or
            None while the request goes on.
        error: what went wrong; ``error_kind`` names the class in `hbserve.errors` that the client raises.
        num_cached_tokens: prompt tokens whose KV came from the prefix cache (first output only).
        prompt_logprobs: of the next prompt tokens, from the second on; such an output has no tokens and is no end.
        retry_after_s: time after which a refused request may be accepted.
        num_accepted, num_rejected: tokens of the request's prediction that the step has tried: right and wrong ones.
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
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_accepted: int = 0
    num_rejected: int = 0


class OutputBatch(Message, frozen=True):
    """New outputs of a client's requests since the last batch."""

    outputs: list[RequestOutput]


class Attached(Message, frozen=True):
    """Answer to `Attach`, at once; and once more when the scheduler begins to take requests.

    Attributes:
        scheduler_epoch: differs at every start of the scheduler.
        takes_requests: whether an instance has registered. Until then requests would be refused.
        after_failure: whether the scheduler before this one failed on its own, so that a request may be the cause.
        ended: why no request can be served any more: instances without which nothing works have been given up.
    """

    scheduler_epoch: int
    takes_requests: bool
    after_failure: bool = False
    ended: str | None = None


class Ready(Message, frozen=True):
    """All instances are registered.

    Attributes:
        max_model_len: limit of the tokens of prompt and output together.
        formats: `hbserve.messages.worker.Hello.formats` of the instances.
    """

    max_model_len: int
    vocab_size: int
    formats: dict[str, str] = msgspec.field(default_factory=dict)


class NotReady(Message, frozen=True):
    """The deadline has passed, or an instance has reported why it cannot serve."""

    reason: str


ClientMessage = (
    AddRequest
    | AbortRequest
    | Attach
    | SubscribeReady
    | GetStats
    | GetWindowMetrics
    | GetLoad
    | SetRole
    | PrepareRoles
    | RemoveInstance
    | Join
    | SetWorkers
    | MarkRotation
    | ReportEvent
)
"""Messages that arrive at the scheduler's client port, from clients, operators, supervisors and new instances."""

SchedulerReply = (
    OutputBatch
    | Attached
    | Ready
    | NotReady
    | Stats
    | WindowMetrics
    | RecentLoad
    | InstanceChanged
    | Joined
    | WorkerLost
)
"""Messages that the scheduler sends from that port."""
