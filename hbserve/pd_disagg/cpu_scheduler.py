"""The CPU scheduler: sole owner of every request and every block table.

One event loop. Messages change the books; after each batch of messages `_schedule` admits waiting
requests, fills every worker's pipeline with plans and sends clients what is new. A mode is nothing
but the roles of the instances and the pools behind them: the code below asks "is the decode seat
the prefill seat?", never "which mode is this?".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import defaultdict

import msgspec
import zmq

from hbserve.cluster_key import ClusterKey
from hbserve.config import Config
from hbserve.import_path import load_class
from hbserve.messages import (
    AbortRequest,
    AddRequest,
    ClientMessage,
    GetStats,
    Hello,
    InstanceFailed,
    InstanceReply,
    Leaving,
    LinkClosed,
    LinkOpened,
    NotReady,
    Ping,
    Ready,
    RequestOutput,
    Stats,
    StepResult,
    SubscribeReady,
    TokenLogprobs,
    TransferResult,
)
from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.metrics.tracing import RequestTracer
from hbserve.pd_disagg import system_stats
from hbserve.pd_disagg.admission import Admission, release_seat
from hbserve.pd_disagg.client_port import ClientPort
from hbserve.pd_disagg.instance_handle import InstanceHandle
from hbserve.pd_disagg.scheduler_metrics import SchedulerMetrics
from hbserve.pd_disagg.sequence import Phase, Seat, Sequence
from hbserve.pd_disagg.step_planner import StepPlanner
from hbserve.pd_disagg.timeline import EventLog, recent_requests
from hbserve.pd_disagg.transfer_ledger import Transfer, TransferLedger
from hbserve.pd_disagg.waiting_queue import WaitingQueue

logger = logging.getLogger(__name__)

_RETRY_DELAY_S = 0.1
_LONGEST_RETRY_DELAY_S = 5.0


class CpuScheduler:
    """Requests in, plans out, tokens back.

    To schedule by another policy, subclass it, override `_schedule_waiting_requests` and name the
    class in the configuration as ``performance.scheduler: package.module:Class``.

    Args:
        config: of the system.
        client_address: where clients connect.
        instance_addresses: where each instance listens, by id.

    Raises:
        StartupError: if the client address cannot be had.
    """

    def __init__(self, config: Config, client_address: str, instance_addresses: dict[str, str]) -> None:
        self.config = config
        self.waiting: list[Sequence] = []
        """Requests not yet admitted, oldest first. A policy may reorder it."""
        self.events = EventLog()
        self.counts: defaultdict[str, int] = defaultdict(int)
        endpoint = config.telemetry.otlp_endpoint
        tracer = None if endpoint is None else RequestTracer(endpoint, time.monotonic)
        self.metrics = SchedulerMetrics(SemiPDMetricsCollector(), config.scheduler, tracer)
        self.start_time = time.monotonic()
        self._epoch = secrets.randbits(62) + 1
        self._sequences: dict[tuple[bytes, str], Sequence] = {}
        self.transfers = TransferLedger(config.kv_transfer.verify)
        self._arrivals = 0
        self._queue = WaitingQueue(config)
        self._planner = StepPlanner(config, self.transfers, self._preempt, self._queue.policy)
        self._subscribers: dict[bytes, float] = {}
        self._max_model_len: int | None = None
        self._vocab_size = 0
        self._wake = asyncio.Event()
        self._stop = asyncio.Event()
        key = ClusterKey.of(config)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._clients = ClientPort(self._context, client_address, self._abort_all_of, key)
        self.instances = {
            instance.instance_id: InstanceHandle(
                instance, config.performance, self._context, instance_addresses[instance.instance_id], key
            )
            for instance in config.gpu_instances
        }
        self._admission = Admission(self.instances, config, self._queue.policy, self.transfers.is_open)

    # --- life ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until `stop`."""
        tasks = [asyncio.create_task(self._serve_clients()), asyncio.create_task(self._tick())]
        for instance in self.instances.values():
            tasks.append(asyncio.create_task(self._serve_instance(instance)))
            tasks.append(asyncio.create_task(self._watch_connection(instance)))
        tasks.append(asyncio.create_task(self._run_schedule()))
        stopped = asyncio.create_task(self._stop.wait())
        done, _ = await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in (stopped, *tasks):
            task.cancel()
        await asyncio.gather(stopped, *tasks, return_exceptions=True)
        for instance in self.instances.values():
            instance.rpc.close()
        self._clients.close()
        self._context.term()
        self.metrics.close()
        for task in done:
            if task is not stopped:
                task.result()  # raises: none of them ends on its own otherwise

    def stop(self) -> None:
        """Make `run` return."""
        self._stop.set()

    @property
    def num_open_requests(self) -> int:
        """Requests that have not ended, waiting ones included."""
        return len(self._sequences)

    async def _run_schedule(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self._schedule_waiting_requests()
            for worker in self.instances.values():
                while worker.ready and len(worker.inflight) < worker.pipeline_depth:
                    if not self._planner.plan_step(worker):
                        break
                    if self.waiting:
                        self._wake.set()  # what this step took may leave room for more
            self._clients.flush()

    async def _tick(self) -> None:
        """Heartbeats and deadlines."""
        interval = self.config.rpc.heartbeat_interval_s
        last = time.monotonic()
        while True:
            now = time.monotonic()
            was_asleep = now - last > 4 * interval + 1.0  # then their silence may be ours
            last = now
            for instance in self.instances.values():
                instance.send(Ping(scheduler_epoch=self._epoch, known_epoch=instance.epoch))
                silence = now - instance.last_seen
                if instance.ready and silence > self.config.rpc.heartbeat_timeout_s and not was_asleep:
                    self._lose(instance, f"no sign of life for {silence:.1f} s")
            self._check_deadlines(now)
            self.metrics.observe_system(self.waiting, self.instances.values())
            self._wake.set()  # what was lost or given up just now must be planned again, and said
            await asyncio.sleep(interval)

    def _check_deadlines(self, now: float) -> None:
        for client, deadline in list(self._subscribers.items()):
            if now > deadline:
                del self._subscribers[client]
                self._clients.reply(client, NotReady(reason=f"not ready in time: {self._who_is_missing()}"))
        for does in ("prefills", "decodes"):
            instances = [instance for instance in self.instances.values() if getattr(instance.role, does)]
            since = [instance.lost_since for instance in instances if instance.lost_since is not None]
            if len(since) < len(instances) or now - max(since) < self.config.rpc.recovery_timeout_s:
                continue
            for sequence in list(self.waiting):
                self._fail(sequence, f"no instance that {does} came back: {self._who_is_missing()}")

    def _who_is_missing(self) -> str:
        missing = [f"{i.id} at {i.rpc.address} ({i.why_lost})" for i in self.instances.values() if not i.ready]
        return ", ".join(missing) or "nobody"

    # --- clients ---------------------------------------------------------------------------------

    async def _serve_clients(self) -> None:
        while True:
            try:
                client, message = await self._clients.receive()
            except msgspec.DecodeError as error:
                logger.error("dropped a message that is no client message: %s", error)
                continue
            self._on_client_message(client, message)
            self._wake.set()

    def _on_client_message(self, client: bytes, message: ClientMessage) -> None:
        if isinstance(message, AddRequest):
            self._add(client, message)
        elif isinstance(message, AbortRequest):
            sequence = self._sequences.get((client, message.request_id))
            if sequence is not None:
                self._finish(sequence, message.finish_reason)
        elif isinstance(message, GetStats):
            stats = system_stats.collect(self)
            if message.recent:
                requests = recent_requests(self.metrics.collector)
                stats["recent"] = {"requests": requests, "events": self.events.as_list()}
            self._clients.reply(client, Stats(query_id=message.query_id, stats=stats))
        elif isinstance(message, SubscribeReady):
            self._subscribers[client] = time.monotonic() + message.deadline_s
            self._announce_ready()

    def _add(self, client: bytes, request: AddRequest) -> None:
        self.counts["requests"] += 1
        refusal = self._refusal(client, request)
        if refusal is None:
            sequence = self._new_sequence(client, request)
            refusal = self._overload(sequence)
        if refusal is not None:
            self.counts["refused"] += 1
            self._clients.push(client, refusal)
            return
        self._sequences[client, request.request_id] = sequence
        self._queue.insert(self.waiting, sequence)
        self.metrics.arrived(sequence)

    def _new_sequence(self, client: bytes, request: AddRequest) -> Sequence:
        self._arrivals += 1
        max_tokens = request.sampling.max_tokens
        assert max_tokens is not None
        assert self._max_model_len is not None
        return Sequence(
            client=client,
            request=request,
            arrival=self._arrivals,
            tokens=list(request.prompt_token_ids),
            end_token_ids=frozenset(request.end_token_ids),
            max_total_tokens=min(len(request.prompt_token_ids) + max_tokens, self._max_model_len),
        )

    def _refusal(self, client: bytes, request: AddRequest) -> RequestOutput | None:
        """Why a request cannot be taken, as the output that says so."""

        if self._max_model_len is None:
            return _refuse(request, "OverloadedError", f"starting; waiting for {self._who_is_missing()}")
        if (client, request.request_id) in self._sequences:
            return _refuse(request, "InvalidRequestError", f"request id {request.request_id!r} is in use", "request_id")
        prompt = request.prompt_token_ids
        if not prompt:
            return _refuse(request, "InvalidRequestError", "the prompt is empty", "prompt")
        if len(prompt) >= self._max_model_len:
            what = f"the prompt has {len(prompt)} tokens; at most {self._max_model_len - 1} leave room for an answer"
            return _refuse(request, "InvalidRequestError", what, "prompt")
        if min(prompt) < 0 or max(prompt) >= self._vocab_size:
            return _refuse(request, "InvalidRequestError", f"token ids must be in 0..{self._vocab_size - 1}", "prompt")
        if request.sampling.max_tokens is None:
            return _refuse(request, "InvalidRequestError", "max_tokens is not resolved", "max_tokens")
        return None

    def _overload(self, sequence: Sequence) -> RequestOutput | None:
        """Why a request is sent away now rather than late: too many wait, or for too long."""
        limit, max_queue_s = self.config.performance.max_waiting_requests, self.config.scheduler.max_queue_s
        if len(self.waiting) < limit and max_queue_s is None:
            return None
        wait_s = self._queue.predicted_ttft_s(
            sequence, self.waiting, self.instances.values(), self._admission.is_full, time.monotonic()
        )
        if len(self.waiting) >= limit:
            what = f"{limit} requests are waiting (performance.max_waiting_requests)"
            return _refuse(sequence.request, "OverloadedError", what, retry_after_s=wait_s)
        if max_queue_s is not None and wait_s > max_queue_s:
            what = f"the first token would take about {wait_s:.1f} s (scheduler.max_queue_s is {max_queue_s:g})"
            return _refuse(sequence.request, "OverloadedError", what, retry_after_s=wait_s - max_queue_s)
        return None

    def _abort_all_of(self, client: bytes) -> None:
        """A client has gone, and nobody wants its requests any more."""
        self._subscribers.pop(client, None)
        for sequence in [s for s in self._sequences.values() if s.client == client]:
            self._close(sequence, "aborted")

    def _announce_ready(self) -> None:
        if not all(instance.ready for instance in self.instances.values()) or self.transfers.is_connecting:
            return
        assert self._max_model_len is not None
        for client in list(self._subscribers):
            del self._subscribers[client]
            self._clients.reply(client, Ready(max_model_len=self._max_model_len, vocab_size=self._vocab_size))

    # --- instances -------------------------------------------------------------------------------

    async def _serve_instance(self, instance: InstanceHandle) -> None:
        while True:
            try:
                reply = await instance.rpc.receive()
            except msgspec.DecodeError as error:
                logger.error("dropped a message of %s that is no reply: %s", instance.id, error)
                continue
            self._on_instance_reply(instance, reply)
            self._wake.set()

    async def _watch_connection(self, instance: InstanceHandle) -> None:
        while True:
            await instance.rpc.wait_disconnected()
            self._lose(instance, "its connection broke")
            self._wake.set()

    def _on_instance_reply(self, instance: InstanceHandle, reply: InstanceReply) -> None:
        if isinstance(reply, Hello):
            self._register(instance, reply)
            return
        if isinstance(reply, InstanceFailed):
            self._lose(instance, reply.error)
            for client in list(self._subscribers):
                del self._subscribers[client]
                self._clients.reply(client, NotReady(reason=f"{instance.id}: {reply.error}"))
            return
        if reply.epoch != instance.epoch:
            return  # from an incarnation that has been given up
        instance.last_seen = time.monotonic()
        if isinstance(reply, StepResult):
            if reply.error is not None:
                self._lose(instance, f"a step failed: {reply.error}")
            else:
                self._on_step_result(instance, reply)
        elif isinstance(reply, TransferResult):
            self._on_transfer_result(reply)
        elif isinstance(reply, LinkOpened):
            self.transfers.on_link_opened(instance, reply)
            self._announce_ready()
        elif isinstance(reply, LinkClosed):
            self.transfers.on_link_closed(instance, reply)
        elif isinstance(reply, Leaving):
            self._lose(instance, "it is ending")

    def _register(self, instance: InstanceHandle, hello: Hello) -> None:
        if hello.epoch == instance.epoch:
            return
        problem = self._misfit(instance, hello)
        if problem is not None:
            logger.error("%s", problem)
            instance.why_lost = problem
            return
        if instance.ready:
            self._lose(instance, "it started again")
        instance.register(hello)
        self.transfers.connect(self.instances.values())
        others = [i.hello.max_model_len for i in self.instances.values() if i.hello is not None]
        self._max_model_len = min(others) if self._max_model_len is None else min(self._max_model_len, *others)
        self._vocab_size = hello.vocab_size
        logger.info("%s registered: %s, %d KV blocks", instance.id, hello.device, hello.num_blocks)
        self.events.note("ready", instance.id, f"{hello.device}, {hello.num_blocks} KV blocks")
        self._announce_ready()

    def _misfit(self, instance: InstanceHandle, hello: Hello) -> str | None:
        """Why an instance cannot work with the others."""
        if hello.instance_id != instance.id or hello.role != instance.role:
            return f"{instance.rpc.address} is {hello.role} {hello.instance_id!r}, not {instance.role} {instance.id!r}"
        for other in self.instances.values():
            if other is instance or other.hello is None:
                continue
            mine, theirs = (
                (each.block_size, each.block_bytes, each.vocab_size, len(each.peers)) for each in (hello, other.hello)
            )
            if mine != theirs:
                return (
                    f"{instance.id} and {other.id} do not fit: (block size, block bytes, vocabulary, ranks) "
                    f"is {mine} and {theirs}; do they run the same model with the same settings?"
                )
        return None

    def _lose(self, instance: InstanceHandle, why: str) -> None:
        """An instance is gone: what was there is computed again, from tokens that are all here."""
        if not instance.ready:
            instance.why_lost = why
            return
        logger.warning("lost %s: %s", instance.id, why)
        self.events.note("lost", instance.id, why)
        seated = [
            sequence for sequence in self._sequences.values() if any(seat.worker is instance for seat in sequence.seats)
        ]
        failed = self.transfers.lose(instance)
        instance.lose(why)
        for sequence in seated:
            self._retry(sequence, f"{instance.id} was lost: {why}")
        self._retry_all(failed, f"{instance.id} was lost: {why}")

    # --- results ---------------------------------------------------------------------------------

    def _on_step_result(self, worker: InstanceHandle, result: StepResult) -> None:
        step = worker.inflight.popleft()
        assert step.step_id == result.step_id, "a worker answers in order"
        worker.num_steps += 1
        worker.busy_s += result.busy_s
        worker.last_step_s = result.busy_s
        samples = iter(zip(result.token_ids, result.logprobs or [None] * len(result.token_ids), strict=True))
        now = time.monotonic()
        last_token_times: list[float | None] = []
        for row in step.rows:
            sample = next(samples) if row.samples else None
            sequence, seat = row.sequence, row.seat
            if row.attempt == sequence.attempt and sequence.phase is not Phase.FINISHED:
                self._advance(sequence, seat, row.end)
                if sample is not None:
                    last_token_times.append(sequence.last_token_time)
                    sequence.last_token_time = now
                    self._on_token(sequence, seat, *sample)
            seat.pool.unpin(seat.owner)
        assert next(samples, None) is None, "more samples than rows that sample"
        self._queue.step_done(step, result.busy_s)
        self.metrics.step_done(worker.id, step, result.busy_s, now, last_token_times)

    def _advance(self, sequence: Sequence, seat: Seat, num_computed: int) -> None:
        """KV up to ``num_computed`` is there; full blocks become sharable."""
        seat.num_computed = num_computed
        if not self.config.performance.enable_prefix_caching:
            return
        full = num_computed // seat.pool.block_size
        if full > seat.num_sealed:
            hashes = sequence.hashes(seat.pool.block_size)
            for index in range(seat.num_sealed, full):
                seat.pool.seal_block(seat.owner, index, hashes[index])
            seat.num_sealed = full

    def _on_token(self, sequence: Sequence, seat: Seat, token: int, logprobs: TokenLogprobs | None) -> None:
        assert seat.num_computed == len(sequence.tokens), "a token for another position than the next"
        sequence.tokens.append(token)
        seat.worker.num_tokens += 1
        self.counts["generated_tokens"] += 1
        is_first = sequence.first_token_time is None
        if is_first:
            sequence.first_token_time = time.monotonic()
            self.metrics.first_token(sequence)
        finish_reason = None
        if token in sequence.end_token_ids:
            finish_reason = "stop"
        elif len(sequence.tokens) >= sequence.max_total_tokens:
            finish_reason = "length"
        self._clients.push(
            sequence.client,
            RequestOutput(
                request_id=sequence.request.request_id,
                token_ids=[token],
                logprobs=None if logprobs is None else [logprobs],
                finish_reason=finish_reason,
                num_cached_tokens=(sequence.num_cached_tokens or 0) if is_first else 0,
            ),
        )
        if finish_reason is not None:
            self._close(sequence, "completed")
        elif seat is sequence.prefill_seat and seat is not sequence.decode_seat:
            self._leave_prefill(sequence, seat)
        else:
            sequence.phase = Phase.DECODING

    def _leave_prefill(self, sequence: Sequence, seat: Seat) -> None:
        """The prompt is done; its blocks stay pinned here until they have arrived where decode happens."""
        release_seat(sequence, seat)
        sequence.prefill_seat = None
        sequence.phase = Phase.TRANSFERRING
        sequence.prefilled_at = time.monotonic()
        self._start_decoding_if_arrived(sequence)

    def _on_transfer_result(self, result: TransferResult) -> None:
        outcome = self.transfers.on_result(result)
        if outcome.failed:
            logger.warning("KV transfer %s failed: %s", result.transfer_id, result.error)
            self.events.note("fault", f"KV transfer {result.transfer_id}", result.error or "")
            self._retry_all(outcome.failed, f"KV transfer: {result.error}")
            self.transfers.connect(self.instances.values())
        transfer = outcome.arrived
        if transfer is None or transfer.attempt != transfer.sequence.attempt:
            return
        sequence = transfer.sequence
        sequence.open_transfers.discard(transfer.transfer_id)
        if sequence.phase is Phase.TRANSFERRING and not sequence.open_transfers:
            self.transfers.count_exposed(transfer, time.monotonic() - sequence.prefilled_at)
        self._start_decoding_if_arrived(sequence)

    def _retry_all(self, failed: list[Transfer], why: str) -> None:
        for transfer in failed:
            if transfer.attempt == transfer.sequence.attempt and transfer.sequence.phase is not Phase.FINISHED:
                self._retry(transfer.sequence, why)

    def _start_decoding_if_arrived(self, sequence: Sequence) -> None:
        if sequence.phase is not Phase.TRANSFERRING or sequence.open_transfers:
            return
        seat = sequence.decode_seat
        assert seat is not None
        self._advance(sequence, seat, seat.num_tokens_at_entry)
        sequence.phase = Phase.DECODING
        seat.worker.activate(sequence, seat)
        self.metrics.decode_may_start(sequence)

    # --- ends ------------------------------------------------------------------------------------

    def _close(self, sequence: Sequence, outcome: str) -> None:
        """Take a request off the books; its blocks return when nothing in flight can touch them.

        Args:
            outcome: ``completed``, ``aborted`` or ``failed``.
        """
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        self._release_all_seats(sequence)
        sequence.phase = Phase.FINISHED
        del self._sequences[sequence.client, sequence.request.request_id]
        self.counts[outcome] += 1
        self._queue.ended(time.monotonic())
        self.metrics.ended(sequence, outcome)

    def _finish(self, sequence: Sequence, reason: str, error: str | None = None) -> None:
        """End a request for another reason than its tokens."""
        self._close(sequence, {"abort": "aborted", "error": "failed"}.get(reason, "completed"))
        self._clients.push(
            sequence.client,
            RequestOutput(
                request_id=sequence.request.request_id,
                token_ids=[],
                finish_reason=reason,
                error=error,
                error_kind=None if error is None else "RequestFailedError",
            ),
        )

    def _fail(self, sequence: Sequence, error: str) -> None:
        self._finish(sequence, "error", error)

    def _retry(self, sequence: Sequence, why: str) -> None:
        """An attempt failed through no fault of the request: compute again, but not for ever."""
        sequence.num_failures += 1
        if sequence.num_failures >= self.config.kv_transfer.max_attempts:
            self._fail(sequence, f"gave up after {sequence.num_failures} attempts; the last: {why}")
        else:
            self.counts["retries"] += 1
            self.metrics.retried(sequence)
            self._put_back(sequence)
            # Not at once: what made it fail may take a moment to be noticed.
            delay_s = min(_RETRY_DELAY_S * 2 ** (sequence.num_failures - 1), _LONGEST_RETRY_DELAY_S)
            sequence.retry_at = time.monotonic() + delay_s
            asyncio.get_running_loop().call_later(delay_s, self._wake.set)

    def _preempt(self, sequence: Sequence) -> None:
        self.counts["preemptions"] += 1
        self.metrics.preempted(sequence)
        self._put_back(sequence)

    def _put_back(self, sequence: Sequence) -> None:
        """Back to waiting, with all its tokens; whatever is in flight for it is void."""
        self._release_all_seats(sequence)
        sequence.attempt += 1
        sequence.phase = Phase.WAITING
        sequence.num_blocks_dispatched = 0
        sequence.open_transfers.clear()
        self._queue.insert(self.waiting, sequence)

    def _release_all_seats(self, sequence: Sequence) -> None:
        for seat in sequence.seats:
            release_seat(sequence, seat)
        sequence.prefill_seat = sequence.decode_seat = None

    # --- admission -------------------------------------------------------------------------------

    async def _schedule_waiting_requests(self) -> None:
        """Admit waiting requests in the order of ``scheduler.policy``: the hook for other policies.

        An override may reorder ``self.waiting`` and calls ``self._admit(sequence)``, which gives a
        request its seats and removes it from ``self.waiting``, or returns False if nothing fits now.
        """
        now = time.monotonic()
        for sequence in list(self._queue.in_order(self.waiting, self.instances.values(), now)):
            if sequence.retry_at <= now and not self._admit(sequence):
                break

    def _admit(self, sequence: Sequence) -> bool:
        """Seat a request for prefill and decode, both or neither."""
        if not self._admission.seat(sequence):
            return False
        self.waiting.remove(sequence)
        sequence.phase = Phase.PREFILLING
        if sequence.num_cached_tokens is None:
            assert sequence.prefill_seat is not None
            sequence.num_cached_tokens = min(sequence.prefill_seat.num_planned, sequence.num_prompt_tokens)
            self.counts["prompt_tokens"] += sequence.num_prompt_tokens
            self.counts["cached_prompt_tokens"] += sequence.num_cached_tokens
            self.metrics.seated(sequence)
        return True


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


async def serve(config: Config, client_address: str, instance_addresses: dict[str, str], stop: asyncio.Event) -> None:
    """Run the configured scheduler until ``stop`` is set."""
    scheduler_class: type[CpuScheduler] = CpuScheduler
    if config.performance.scheduler is not None:
        scheduler_class = load_class(config.performance.scheduler, CpuScheduler, "performance.scheduler")
    scheduler = scheduler_class(config, client_address, instance_addresses)
    running = asyncio.create_task(scheduler.run())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([running, stopped], return_when=asyncio.FIRST_COMPLETED)
    scheduler.stop()
    stopped.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await stopped
    await running
