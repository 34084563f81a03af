"""The border to clients, operators and supervisors: what they may ask, which part answers, and what is sent back."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable

import msgspec
import zmq

from hbserve.config import Config
from hbserve.messages.admin import GetStats, GetWindowMetrics, RemoveInstance, SetRole, Stats, WindowMetrics
from hbserve.messages.client import (
    AbortRequest,
    AddRequest,
    ClientMessage,
    OutputBatch,
    RequestOutput,
    Resumed,
    SchedulerReply,
    SubscribeReady,
)
from hbserve.messages.membership import Join
from hbserve.messages.supervisor import MarkRotation, ReportEvent, SetWorkers
from hbserve.rpc.async_socket import AsyncSocket
from hbserve.rpc.cluster_key import ClusterKey
from hbserve.rpc.inbox import Inbox
from hbserve.rpc.instance_line import bind
from hbserve.scheduler.drains import Drains
from hbserve.scheduler.readiness import Readiness
from hbserve.scheduler.request_lifecycle import RequestLifecycle
from hbserve.scheduler.sequence import Sequence
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
    if len(prompt) >= max_model_len:
        error = f"the prompt has {len(prompt)} tokens; at most {max_model_len - 1} leave room for an answer"
        return _refuse(request, "InvalidRequestError", error, "prompt")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        return _refuse(request, "InvalidRequestError", f"token ids must be in 0..{vocab_size - 1}", "prompt")
    sampling = request.sampling
    others = [*request.end_token_ids, *(sampling.stop_token_ids or ()), *(sampling.logit_bias or ())]
    if others and (min(others) < 0 or max(others) >= vocab_size):  # a worker would fail at such a row
        error = f"the ids of end tokens, stop tokens and biases must be in 0..{vocab_size - 1}"
        return _refuse(request, "InvalidRequestError", error, "stop_token_ids")
    if sampling.max_tokens is None:
        return _refuse(request, "InvalidRequestError", "max_tokens is not resolved", "max_tokens")
    if sampling.seed is None and not sampling.greedy:
        return _refuse(request, "InvalidRequestError", "seed is not resolved", "seed")
    if request.resumed is not None:
        return _validate_resumed(
            request, request.resumed, min(len(prompt) + sampling.max_tokens, max_model_len), vocab_size
        )
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


class ClientServer:
    """Receives from any number of clients, hands each message to the part that it is for, and batches the output.

    Args:
        address: where clients connect.
        on_client_gone: called with the identity of a client that can no longer be reached.

    Raises:
        StartupError: if the address cannot be had.
    """

    def __init__(
        self,
        config: Config,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        on_client_gone: Callable[[bytes], None],
    ) -> None:
        self._max_waiting_requests = config.performance.max_waiting_requests
        self._max_queue_s = config.scheduler.max_queue_s
        self._socket = AsyncSocket(context.socket(zmq.ROUTER))
        self._socket.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a client that left raises an error
        self._doorkeeper = bind(self._socket, address, "the scheduler", ClusterKey.of(config))
        self._encoder = msgspec.msgpack.Encoder()
        self._inbox: Inbox[ClientMessage] = Inbox(self._socket, ClientMessage, "a client")
        self._outputs: defaultdict[bytes, list[RequestOutput]] = defaultdict(list)
        self._on_client_gone = on_client_gone
        self._num_arrivals = 0

    # --- messages in -----------------------------------------------------------------------------

    async def serve(
        self,
        requests: RequestLifecycle,
        readiness: Readiness,
        stats: SystemStats,
        drains: Drains,
        workers: WorkerRegistry,
        wake: Callable[[], None],
    ) -> None:
        """Receive messages until cancelled; ``wake`` makes the scheduler plan after each."""
        while True:
            client, message = await self._inbox.receive()
            if isinstance(message, AddRequest):
                self._on_request(client, message, requests, readiness)
            elif isinstance(message, AbortRequest):
                sequence = requests.get(client, message.request_id)
                if sequence is not None:
                    requests.finish(sequence, message.finish_reason)
            elif isinstance(message, SubscribeReady):
                readiness.subscribe(client, message.deadline_s)
            elif isinstance(message, GetStats):
                self.reply(client, Stats(query_id=message.query_id, stats=stats.collect(message.recent)))
            elif isinstance(message, GetWindowMetrics):
                self.reply(client, WindowMetrics(query_id=message.query_id, metrics=stats.window(message.seconds)))
            elif isinstance(message, SetRole):
                drains.set_role(client, message)
            elif isinstance(message, RemoveInstance):
                workers.remove(client, message)
            elif isinstance(message, Join):
                workers.join(client, message)
            elif isinstance(message, SetWorkers):
                workers.set_workers(client, message)
            elif isinstance(message, MarkRotation):
                stats.mark_rotation(message.begins)
            elif isinstance(message, ReportEvent):
                stats.report_event(message)
            wake()

    def _on_request(self, client: bytes, request: AddRequest, requests: RequestLifecycle, readiness: Readiness) -> None:
        """Take a new request, or tell its client why not."""
        requests.counts["requests"] += 1
        refusal = validate(request, readiness, requests.get(client, request.request_id) is not None)
        if refusal is None:
            sequence = self._new_sequence(client, request, readiness)
            if request.resumed is None:  # else an earlier scheduler has accepted it
                refusal = self._overload(sequence, requests)
        if refusal is None:
            requests.add(sequence)
            return
        requests.counts["refused"] += 1
        logger.debug("request %s: refused: %s", request.request_id, refusal.error)
        self.push(client, refusal)

    def _new_sequence(self, client: bytes, request: AddRequest, readiness: Readiness) -> Sequence:
        self._num_arrivals += 1
        assert readiness.max_model_len is not None
        return Sequence.of_request(client, request, self._num_arrivals, readiness.max_model_len)

    def _overload(self, sequence: Sequence, requests: RequestLifecycle) -> RequestOutput | None:
        """Return the output that refuses a request because too many wait already, or it would wait for too long."""
        limit, max_queue_s = self._max_waiting_requests, self._max_queue_s
        is_full = len(requests.waiting) >= limit
        if not is_full and max_queue_s is None:
            return None
        wait_s = requests.predicted_ttft_s(sequence)
        if is_full:
            error = f"{limit} requests are waiting (performance.max_waiting_requests)"
            return _refuse(sequence.request, "OverloadedError", error, retry_after_s=wait_s)
        if max_queue_s is not None and wait_s > max_queue_s:
            error = f"the first token would take about {wait_s:.1f} s (scheduler.max_queue_s is {max_queue_s:g})"
            return _refuse(sequence.request, "OverloadedError", error, retry_after_s=wait_s - max_queue_s)
        return None

    # --- messages out ----------------------------------------------------------------------------

    def push(self, client: bytes, output: RequestOutput) -> None:
        """Add to the client's next batch."""
        self._outputs[client].append(output)

    def flush(self) -> None:
        """Send every client its batch."""
        while self._outputs:
            client, outputs = self._outputs.popitem()
            self.reply(client, OutputBatch(outputs=outputs))

    def reply(self, client: bytes, reply: SchedulerReply) -> None:
        """Send at once."""
        try:
            self._socket.send([client, self._encoder.encode(reply)])
        except zmq.ZMQError:  # EHOSTUNREACH
            self._outputs.pop(client, None)
            self._on_client_gone(client)

    def close(self) -> None:
        """Close; what was just sent may still leave."""
        self._socket.close(linger_ms=200)
        if self._doorkeeper is not None:
            self._doorkeeper.close()
