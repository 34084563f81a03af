"""The scheduler's side of the border to clients, operators and supervisors: who asks what, and who answers it.

The scheduler's end of the border to its clients.

Which requests are taken.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable

import msgspec
import zmq

from hbserve.config import Config
from hbserve.messages.admin import GetStats, GetWindow, RemoveInstance, SetRole, Stats, Window
from hbserve.messages.client import (
    AbortRequest,
    AddRequest,
    ClientMessage,
    OutputBatch,
    RequestOutput,
    SchedulerReply,
    SubscribeReady,
)
from hbserve.messages.membership import Join
from hbserve.messages.supervisor import MarkRotation, SetWorkers
from hbserve.rpc.async_socket import AsyncSocket
from hbserve.rpc.cluster_key import ClusterKey
from hbserve.rpc.instance_line import bind
from hbserve.scheduler.drains import Drains
from hbserve.scheduler.readiness import Readiness
from hbserve.scheduler.request_lifecycle import RequestLifecycle
from hbserve.scheduler.sequence import Sequence
from hbserve.scheduler.stats import SystemStats
from hbserve.scheduler.worker_registry import WorkerRegistry

logger = logging.getLogger(__name__)


class Intake:
    """Turns a client's request into a sequence on the books, or says at once why not.

    Args:
        config: for the limits of the queue.
        requests: where those go that are taken.
        readiness: what the model takes, once that is known.
    """

    def __init__(self, config: Config, requests: RequestLifecycle, readiness: Readiness) -> None:
        self._max_waiting_requests = config.performance.max_waiting_requests
        self._max_queue_s = config.scheduler.max_queue_s
        self._requests = requests
        self._readiness = readiness
        self._arrivals = 0

    def take(self, client: bytes, request: AddRequest) -> RequestOutput | None:
        """Put a request on the books; returns the output that says why not, if it is refused."""
        self._requests.counts["requests"] += 1
        refusal = self._misfit(client, request)
        if refusal is None:
            sequence = self._new_sequence(client, request)
            refusal = self._overload(sequence)
        if refusal is not None:
            self._requests.counts["refused"] += 1
            return refusal
        self._requests.add(sequence)
        return None

    def _new_sequence(self, client: bytes, request: AddRequest) -> Sequence:
        self._arrivals += 1
        max_model_len, max_tokens = self._readiness.max_model_len, request.sampling.max_tokens
        assert max_model_len is not None
        assert max_tokens is not None
        return Sequence(
            client=client,
            request=request,
            arrival=self._arrivals,
            tokens=list(request.prompt_token_ids),
            end_token_ids=frozenset(request.end_token_ids),
            max_total_tokens=min(len(request.prompt_token_ids) + max_tokens, max_model_len),
        )

    def _misfit(self, client: bytes, request: AddRequest) -> RequestOutput | None:
        """Why a request can never be taken, or not before the system is ready."""
        max_model_len, vocab_size = self._readiness.max_model_len, self._readiness.vocab_size
        if max_model_len is None:
            return _refuse(request, "OverloadedError", f"starting; waiting for {self._readiness.who_is_missing()}")
        if self._requests.get(client, request.request_id) is not None:
            return _refuse(request, "InvalidRequestError", f"request id {request.request_id!r} is in use", "request_id")
        prompt = request.prompt_token_ids
        if not prompt:
            return _refuse(request, "InvalidRequestError", "the prompt is empty", "prompt")
        if len(prompt) >= max_model_len:
            what = f"the prompt has {len(prompt)} tokens; at most {max_model_len - 1} leave room for an answer"
            return _refuse(request, "InvalidRequestError", what, "prompt")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            return _refuse(request, "InvalidRequestError", f"token ids must be in 0..{vocab_size - 1}", "prompt")
        if request.sampling.max_tokens is None:
            return _refuse(request, "InvalidRequestError", "max_tokens is not resolved", "max_tokens")
        return None

    def _overload(self, sequence: Sequence) -> RequestOutput | None:
        """Why a request is sent away now rather than late: too many wait, or for too long."""
        limit, max_queue_s = self._max_waiting_requests, self._max_queue_s
        is_full = len(self._requests.waiting) >= limit
        if not is_full and max_queue_s is None:
            return None
        wait_s = self._requests.predicted_ttft_s(sequence)
        if is_full:
            what = f"{limit} requests are waiting (performance.max_waiting_requests)"
            return _refuse(sequence.request, "OverloadedError", what, retry_after_s=wait_s)
        if max_queue_s is not None and wait_s > max_queue_s:
            what = f"the first token would take about {wait_s:.1f} s (scheduler.max_queue_s is {max_queue_s:g})"
            return _refuse(sequence.request, "OverloadedError", what, retry_after_s=wait_s - max_queue_s)
        return None


def _refuse(
    request: AddRequest, kind: str, error: str, param: str | None = None, retry_after_s: float | None = None
) -> RequestOutput:
    """The output that says that a request is not taken; ``kind`` is a class in `hbserve.errors`."""
    return RequestOutput(
        request_id=request.request_id,
        token_ids=[],
        finish_reason="error",
        error=error,
        error_kind=kind,
        error_param=param,
        retry_after_s=retry_after_s,
    )


class ClientPort:
    """Receives from any number of clients and batches what goes back to each.

    Args:
        context: the scheduler's ZeroMQ context.
        address: where clients connect.
        on_gone: called with the identity of a client that can no longer be reached.
        key: that clients over TCP must have.

    Raises:
        StartupError: if the address cannot be had.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        on_gone: Callable[[bytes], None],
        key: ClusterKey | None = None,
    ) -> None:
        self._socket = AsyncSocket(context.socket(zmq.ROUTER))
        self._socket.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a client that left is an error we see
        self._keeper = bind(self._socket, address, "the scheduler", key)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ClientMessage)
        self._outputs: defaultdict[bytes, list[RequestOutput]] = defaultdict(list)
        self._on_gone = on_gone

    async def receive(self) -> tuple[bytes, ClientMessage]:
        """The next message and who sent it.

        Raises:
            msgspec.DecodeError: if what came is not a client message.
        """
        client, payload = await self._socket.receive()
        return client, self._decoder.decode(payload)

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
            self._on_gone(client)

    def close(self) -> None:
        """Close; what was just sent may still leave."""
        self._socket.close(linger_ms=200)
        if self._keeper is not None:
            self._keeper.close()


class ClientDesk:
    """Takes every message to whoever it is for.

    Args:
        port: where they come in.
        intake: for new requests.
        requests: for those that are given up.
        readiness: for clients that wait for it.
        stats: for questions.
        drains: for instances that shall change their roles.
        workers: for workers and instances that come and go.
        wake: has the scheduler plan again.
    """

    def __init__(
        self,
        port: ClientPort,
        intake: Intake,
        requests: RequestLifecycle,
        readiness: Readiness,
        stats: SystemStats,
        drains: Drains,
        workers: WorkerRegistry,
        wake: Callable[[], None],
    ) -> None:
        self._port = port
        self._intake = intake
        self._requests = requests
        self._readiness = readiness
        self._stats = stats
        self._drains = drains
        self._workers = workers
        self._wake = wake

    async def serve(self) -> None:
        """Until cancelled."""
        while True:
            try:
                client, message = await self._port.receive()
            except msgspec.DecodeError as error:
                logger.error("dropped a message that is no client message: %s", error)
                continue
            self._on_message(client, message)
            self._wake()

    def _on_message(self, client: bytes, message: ClientMessage) -> None:
        if isinstance(message, AddRequest):
            refusal = self._intake.take(client, message)
            if refusal is not None:
                self._port.push(client, refusal)
        elif isinstance(message, AbortRequest):
            sequence = self._requests.get(client, message.request_id)
            if sequence is not None:
                self._requests.finish(sequence, message.finish_reason)
        elif isinstance(message, SubscribeReady):
            self._readiness.subscribe(client, message.deadline_s)
        elif isinstance(message, GetStats):
            stats = self._stats.collect(recent=message.recent)
            self._port.reply(client, Stats(query_id=message.query_id, stats=stats))
        elif isinstance(message, GetWindow):
            metrics = self._stats.window(message.seconds)
            self._port.reply(client, Window(query_id=message.query_id, metrics=metrics))
        elif isinstance(message, SetRole):
            self._drains.set_role(client, message)
        elif isinstance(message, RemoveInstance):
            self._workers.remove(client, message)
        elif isinstance(message, Join):
            self._workers.join(client, message)
        elif isinstance(message, SetWorkers):
            self._workers.set_workers(client, message)
        elif isinstance(message, MarkRotation):
            self._stats.mark_rotation(message.begins)
