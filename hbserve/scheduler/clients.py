"""The border to clients, operators and supervisors: what they may ask, and which part answers."""

from __future__ import annotations

import logging

import msgspec

from hbserve.config import Config
from hbserve.messages.admin import (
    GetLoad,
    GetStats,
    GetWindowMetrics,
    PrepareRoles,
    RecentLoad,
    RemoveInstance,
    SetRole,
    Stats,
    WindowMetrics,
)
from hbserve.messages.client import (
    AbortRequest,
    AddRequest,
    Attach,
    ClientMessage,
    RequestOutput,
    Resumed,
    SubscribeReady,
)
from hbserve.messages.membership import Join
from hbserve.messages.supervisor import MarkRotation, ReportEvent, SetWorkers
from hbserve.scheduler.core_io import Clock, OutboxWriter
from hbserve.scheduler.drains import Drains
from hbserve.scheduler.readiness import Readiness
from hbserve.scheduler.requests.lifecycle import RequestLifecycle
from hbserve.scheduler.sequence import Sequence, max_total_tokens
from hbserve.scheduler.stats import SystemStats
from hbserve.scheduler.worker_registry import WorkerRegistry

logger = logging.getLogger(__name__)


def validate(request: AddRequest, readiness: Readiness, id_is_in_use: bool) -> RequestOutput | None:
    """Return the output that refuses a request which can never be taken, or not before the system is ready."""
    max_model_len, vocab_size = readiness.max_model_len, readiness.vocab_size
    if max_model_len is None:
        return _refuse(request, "OverloadedError", f"starting; waiting for {readiness.name_missing()}")
    if id_is_in_use:
        return _refuse(request, "InvalidRequestError", f"request id {request.request_id!r} is in use", "request_id")
    prompt = request.prompt_token_ids
    if not prompt:
        return _refuse(request, "InvalidRequestError", "the prompt is empty", "prompt")
    if len(prompt) >= max_model_len + (request.sampling.max_tokens == 0):
        error = f"the prompt has {len(prompt)} tokens; at most {max_model_len - 1} leave room for an answer"
        return _refuse(request, "InvalidRequestError", error, "prompt")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        return _refuse(request, "InvalidRequestError", f"token ids must be in 0..{vocab_size - 1}", "prompt")
    sampling = request.sampling
    others = [*request.end_token_ids, *(sampling.stop_token_ids or ()), *(sampling.logit_bias or ())]
    if others and (min(others) < 0 or max(others) >= vocab_size):  # a worker would fail at such a row
        error = f"the ids of end tokens, stop tokens and biases must be in 0..{vocab_size - 1}"
        return _refuse(request, "InvalidRequestError", error, "stop_token_ids")
    predicted = request.predicted_token_ids
    if predicted and (min(predicted) < 0 or max(predicted) >= vocab_size):
        return _refuse(request, "InvalidRequestError", f"token ids must be in 0..{vocab_size - 1}", "prediction")
    if sampling.max_tokens is None:
        return _refuse(request, "InvalidRequestError", "max_tokens is not resolved", "max_tokens")
    if sampling.seed is None and not sampling.greedy:
        return _refuse(request, "InvalidRequestError", "seed is not resolved", "seed")
    if request.resumed is not None:
        most = max_total_tokens(len(prompt), sampling.max_tokens, max_model_len)
        return _validate_resumed(request, request.resumed, most, vocab_size)
    return None


def _validate_resumed(
    request: AddRequest, resumed: Resumed, max_total_tokens: int, vocab_size: int
) -> RequestOutput | None:
    """Return the output that refuses a request whose progress cannot be true."""
    num_prompt_tokens, token_ids = len(request.prompt_token_ids), resumed.token_ids
    if num_prompt_tokens + len(token_ids) >= max_total_tokens:
        error = f"{len(token_ids)} output tokens leave nothing to generate"
        return _refuse(request, "InvalidRequestError", error, "resumed")
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        return _refuse(request, "InvalidRequestError", f"token ids must be in 0..{vocab_size - 1}", "resumed")
    if not 0 <= resumed.num_scored < num_prompt_tokens or bool(token_ids) != (resumed.first_token_age_s is not None):
        return _refuse(request, "InvalidRequestError", "the progress contradicts itself", "resumed")
    return None


def _refuse(
    request: AddRequest, kind: str, error: str, param: str | None = None, retry_after_s: float | None = None
) -> RequestOutput:
    """Return the output that refuses a request; ``kind`` is a class in `hbserve.errors`."""
    return RequestOutput(
        request_id=request.request_id,
        token_ids=[],
        finish_reason="error",
        error=error,
        error_kind=kind,
        error_param=param,
        retry_after_s=retry_after_s,
    )


class ClientMessages:
    """Hands each message of a client, an operator or a supervisor to the part that it is for."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        outbox: OutboxWriter,
        requests: RequestLifecycle,
        readiness: Readiness,
        stats: SystemStats,
        drains: Drains,
        workers: WorkerRegistry,
    ) -> None:
        self._max_waiting_requests = config.performance.max_waiting_requests
        self._max_queue_s = config.scheduler.max_queue_s
        self._targets = config.scheduler
        self._clock = clock
        self._outbox = outbox
        self._requests = requests
        self._readiness = readiness
        self._stats = stats
        self._drains = drains
        self._workers = workers
        self._num_arrivals = 0
        self._connections: dict[str, bytes] = {}  # by client id

    def on_message(self, client: bytes, message: ClientMessage) -> None:
        """Have a message answered, now or later."""
        if isinstance(message, AddRequest):
            self._on_request(client, message)
        elif isinstance(message, AbortRequest):
            sequence = self._requests.get(client, message.request_id)
            if sequence is not None:
                self._requests.finish(sequence, message.finish_reason)
        elif isinstance(message, Attach):
            self._attach(client, message.client_id)
        elif isinstance(message, SubscribeReady):
            self._readiness.subscribe(client, message.deadline_s)
        elif isinstance(message, GetStats):
            self._outbox.reply(client, Stats(query_id=message.query_id, stats=self._stats.collect(message.recent)))
        elif isinstance(message, GetWindowMetrics):
            self._outbox.reply(
                client, WindowMetrics(query_id=message.query_id, metrics=self._stats.window(message.seconds))
            )
        elif isinstance(message, GetLoad):
            self._outbox.reply(client, RecentLoad(query_id=message.query_id, entries=self._stats.load(message.seconds)))
        elif isinstance(message, SetRole):
            self._drains.set_role(client, message)
        elif isinstance(message, PrepareRoles):
            self._drains.prepare(message)
        elif isinstance(message, RemoveInstance):
            self._workers.remove(client, message)
        elif isinstance(message, Join):
            self._workers.join(client, message)
        elif isinstance(message, SetWorkers):
            self._workers.set_workers(client, message)
        elif isinstance(message, MarkRotation):
            self._stats.mark_rotation(message.begins)
        elif isinstance(message, ReportEvent):
            self._stats.report_event(message)
            if message.kind == "given_up":
                self._workers.coverage.on_given_up(message.subject, message.text)

    def _attach(self, client: bytes, client_id: str) -> None:
        """Answer a client; nothing goes over an earlier connection of the same client any more."""
        before, self._connections[client_id] = self._connections.get(client_id, client), client
        if before != client:
            self._end(before)
        self._readiness.attach(client)

    def on_gone(self, client: bytes) -> None:
        """A client cannot be reached any more."""
        self._connections = {name: other for name, other in self._connections.items() if other != client}
        self._end(client)

    def _end(self, client: bytes) -> None:
        self._readiness.on_client_gone(client)
        self._requests.abort_all_of(client)

    def _on_request(self, client: bytes, request: AddRequest) -> None:
        """Take a new request, or tell its client why not."""
        requests = self._requests
        requests.counts["requests"] += 1
        refusal = validate(request, self._readiness, requests.get(client, request.request_id) is not None)
        if refusal is None:
            sequence = self._new_sequence(client, self._with_target(request))
            if request.resumed is None:  # else an earlier scheduler has accepted it
                refusal = self._overload(sequence)
        if refusal is None:
            requests.add(sequence)
            return
        requests.counts["refused"] += 1
        logger.debug("request %s: refused: %s", request.request_id, refusal.error)
        self._outbox.push(client, refusal)

    def _with_target(self, request: AddRequest) -> AddRequest:
        """Give a request without a TTFT target the default one for its prompt's length, if there is such a rule."""
        targets, sampling = self._targets, request.sampling
        if not targets.ttft_ms_per_1k_tokens or targets.targets_are_soft:
            return request
        if sampling.ttft_ms is not None or sampling.priority is not None:
            return request
        ttft_ms = targets.ttft_target_ms(len(request.prompt_token_ids))
        return msgspec.structs.replace(request, sampling=msgspec.structs.replace(sampling, ttft_ms=ttft_ms))

    def _new_sequence(self, client: bytes, request: AddRequest) -> Sequence:
        self._num_arrivals += 1
        max_model_len = self._readiness.max_model_len
        assert max_model_len is not None
        return Sequence.of_request(client, request, self._num_arrivals, max_model_len, self._clock.now)

    def _overload(self, sequence: Sequence) -> RequestOutput | None:
        """Return the output that refuses a request because too many wait already, or it would wait for too long."""
        limit, max_queue_s = self._max_waiting_requests, self._max_queue_s
        waiting, is_batch = self._requests.waiting, sequence.is_batch
        # Each kind has its own limit: best-effort requests refuse no others.
        is_full = len(waiting) >= limit and sum(other.is_batch is is_batch for other in waiting) >= limit
        if not is_full and (max_queue_s is None or is_batch):
            return None
        wait_s = self._requests.predicted_ttft_s(sequence)
        if is_full:
            error = f"{limit} requests are waiting (performance.max_waiting_requests)"
            return _refuse(sequence.request, "OverloadedError", error, retry_after_s=wait_s)
        if max_queue_s is not None and wait_s > max_queue_s:
            error = f"the first token would take about {wait_s:.1f} s (scheduler.max_queue_s is {max_queue_s:g})"
            return _refuse(sequence.request, "OverloadedError", error, retry_after_s=wait_s - max_queue_s)
        return None
