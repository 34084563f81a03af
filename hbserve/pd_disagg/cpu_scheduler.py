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
from typing import Any

import msgspec
import zmq

from hbserve.cluster_key import ClusterKey
from hbserve.config import Config, InstanceRole
from hbserve.import_path import load_class
from hbserve.messages import (
    AbortRequest,
    AddRequest,
    ClientMessage,
    GetStats,
    GetWindow,
    Hello,
    InstanceFailed,
    InstanceReply,
    Leaving,
    LinkClosed,
    LinkOpened,
    MarkRotation,
    NotReady,
    Ping,
    Ready,
    RequestOutput,
    SetRole,
    SetWorkers,
    Shutdown,
    Stats,
    StepResult,
    SubscribeReady,
    TokenLogprobs,
    TransferResult,
    Window,
    WorkerLost,
    WorkerSpec,
)
from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.metrics.tracing import RequestTracer
from hbserve.pd_disagg import system_stats
from hbserve.pd_disagg.admission import Admission, release_seat
from hbserve.pd_disagg.client_port import ClientPort
from hbserve.pd_disagg.instance_handle import InflightStep, InstanceHandle, WorkerHandle
from hbserve.pd_disagg.role_changes import RoleChanges
from hbserve.pd_disagg.scheduler_metrics import SchedulerMetrics
from hbserve.pd_disagg.sequence import Phase, Seat, Sequence
from hbserve.pd_disagg.step_planner import StepPlanner
from hbserve.pd_disagg.timeline import EventLog, recent_requests
from hbserve.pd_disagg.transfer_ledger import Transfer, TransferLedger
from hbserve.pd_disagg.waiting_queue import WaitingQueue

logger = logging.getLogger(__name__)

_RETRY_DELAY_S = 0.1
_GREETING_INTERVAL_S = 0.02
_WINDOW_VALUES = 256  # of each latency, in a window that is sent
_LONGEST_RETRY_DELAY_S = 5.0


class CpuScheduler:
    """Requests in, plans out, tokens back.

    To schedule by another policy, subclass it, override `_schedule_waiting_requests` and name the
    class in the configuration as ``performance.scheduler: package.module:Class``.

    Args:
        config: of the system.
        client_address: where clients connect.
        instance_addresses: where each instance listens, by id; an instance without an address has
            its workers announced by `SetWorkers`.

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
                instance, config.performance, self._context, instance_addresses.get(instance.instance_id), key
            )
            for instance in config.gpu_instances
        }
        if config.semi_pd.slo is not None:
            for handle in self.instances.values():
                handle.decode_interval_s = config.semi_pd.slo.decode_interval_ms / 1000
        self._worker_tasks: dict[WorkerHandle, list[asyncio.Task[None]]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._worker_launchers: dict[str, bytes] = {}
        self._role_changes = RoleChanges(self.instances, self.transfers, self._clients.reply)
        self._admission = Admission(self.instances, config, self._queue.policy, self.transfers.is_open)

    # --- life ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until `stop`."""
        tasks = [asyncio.create_task(self._serve_clients()), asyncio.create_task(self._tick())]
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for instance, worker in self._all_workers():
            self._serve_worker(instance, worker)
        tasks.append(asyncio.create_task(self._run_schedule()))
        stopped = asyncio.create_task(self._stop.wait())
        ends: list[asyncio.Future[Any]] = [stopped, self._failure, *tasks]
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in (stopped, *tasks):
            task.cancel()
        await asyncio.gather(stopped, *tasks, return_exceptions=True)
        for _, worker in self._all_workers():
            await self._drop_worker(worker)
        await asyncio.gather(*self._closing)
        self._clients.close()
        self._context.term()
        self.metrics.close()
        for end in done:
            if end is not stopped:
                end.result()  # raises: none of them ends on its own otherwise

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
            for instance in self.instances.values():
                for worker, phases in instance.choose_workers().items():
                    depth = worker.pipeline_depth(self.config.performance.pipeline_depth)
                    wait_s = instance.decode_wait_s(worker, phases, time.monotonic())
                    if wait_s is not None:
                        depth = 1
                        if wait_s and not worker.inflight:
                            self._wake_in(instance, wait_s)
                            continue
                    while len(worker.inflight) < depth:
                        if not self._planner.plan_step(instance, worker, phases):
                            break
                        worker.last_plan_time = time.monotonic()
                        if self.waiting:
                            self._wake.set()  # what this step took may leave room for more
                self._end_retired(instance)
            self._role_changes.proceed()
            self._clients.flush()

    def _wake_in(self, instance: InstanceHandle, seconds: float) -> None:
        """Schedule again then; one timer per instance."""
        if instance.timer is not None:
            instance.timer.cancel()
        instance.timer = asyncio.get_running_loop().call_later(seconds, self._wake.set)

    async def _tick(self) -> None:
        """Heartbeats and deadlines."""
        interval = self.config.rpc.heartbeat_interval_s
        last = time.monotonic()
        while True:
            now = time.monotonic()
            was_asleep = now - last > 4 * interval + 1.0  # then their silence may be ours
            last = now
            for instance, worker in list(self._all_workers()):
                self._ping(worker)
                silence = now - worker.last_seen
                if worker.ready and silence > self.config.rpc.heartbeat_timeout_s and not was_asleep:
                    self._lose(instance, worker, f"no sign of life for {silence:.1f} s")
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
        missing = []
        for instance in self.instances.values():
            if not instance.ready:
                at = "".join(f" at {worker.rpc.address}" for worker in instance.workers.values())
                missing.append(f"{instance.id}{at} ({instance.why_lost})")
        missing += [f"the KV link {source}->{target} (not open yet)" for source, target in self.transfers.connecting]
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
        elif isinstance(message, SetRole):
            self._role_changes.ask(client, message)
        elif isinstance(message, SetWorkers):
            self._set_workers(client, message)
        elif isinstance(message, GetWindow):
            self.metrics.observe_system(self.waiting, self.instances.values())
            window = self.metrics.collector.get_current_window_metrics(message.seconds).thinned(_WINDOW_VALUES)
            self._clients.reply(client, Window(query_id=message.query_id, metrics=msgspec.to_builtins(window)))
        elif isinstance(message, MarkRotation):
            if message.begins:
                self.metrics.collector.begin_exclusion()
            else:
                self.metrics.collector.end_exclusion()

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
        if not all(instance.ready for instance in self.instances.values()) or self.transfers.connecting:
            return
        assert self._max_model_len is not None
        for client in list(self._subscribers):
            del self._subscribers[client]
            self._clients.reply(client, Ready(max_model_len=self._max_model_len, vocab_size=self._vocab_size))

    # --- instances -------------------------------------------------------------------------------

    def _all_workers(self) -> list[tuple[InstanceHandle, WorkerHandle]]:
        return [(instance, worker) for instance in self.instances.values() for worker in instance.workers.values()]

    def _serve_worker(self, instance: InstanceHandle, worker: WorkerHandle) -> None:
        tasks = [
            asyncio.create_task(self._receive_from(instance, worker)),
            asyncio.create_task(self._watch_connection(instance, worker)),
        ]
        for task in tasks:
            task.add_done_callback(self._on_worker_task_end)
        self._worker_tasks[worker] = tasks

    def _on_worker_task_end(self, task: asyncio.Task[None]) -> None:
        """None of them ends on its own."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._failure.done():
            self._failure.set_exception(error)

    async def _drop_worker(self, worker: WorkerHandle) -> None:
        tasks = self._worker_tasks.pop(worker, [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        worker.rpc.close()

    def _ping(self, worker: WorkerHandle) -> None:
        worker.send(Ping(scheduler_epoch=self._epoch, known_epoch=worker.epoch))

    async def _receive_from(self, instance: InstanceHandle, worker: WorkerHandle) -> None:
        while True:
            try:
                reply = await worker.rpc.receive()
            except msgspec.DecodeError as error:
                logger.error("dropped a message of %s that is no reply: %s", worker.id, error)
                continue
            self._on_instance_reply(instance, worker, reply)
            self._wake.set()

    async def _watch_connection(self, instance: InstanceHandle, worker: WorkerHandle) -> None:
        while True:
            await worker.rpc.wait_disconnected()
            self._lose(instance, worker, "its connection broke")
            self._wake.set()

    def _on_instance_reply(self, instance: InstanceHandle, worker: WorkerHandle, reply: InstanceReply) -> None:
        if isinstance(reply, Hello):
            self._register(instance, worker, reply)
            return
        if isinstance(reply, InstanceFailed):
            self._lose(instance, worker, reply.error)
            for client in list(self._subscribers):
                del self._subscribers[client]
                self._clients.reply(client, NotReady(reason=f"{instance.id}: {reply.error}"))
            return
        if reply.epoch != worker.epoch:
            return  # from an incarnation that has been given up
        worker.last_seen = time.monotonic()
        if isinstance(reply, StepResult):
            if reply.error is not None:
                self._lose(instance, worker, f"a step failed: {reply.error}")
            else:
                self._on_step_result(worker, reply)
        elif isinstance(reply, TransferResult):
            self._on_transfer_result(reply)
        elif isinstance(reply, LinkOpened):
            self.transfers.on_link_opened(instance, reply)
            self._announce_ready()
        elif isinstance(reply, LinkClosed):
            self.transfers.on_link_closed(instance, reply)
        elif isinstance(reply, Leaving):
            self._lose(instance, worker, "it is ending")

    def _register(self, instance: InstanceHandle, worker: WorkerHandle, hello: Hello) -> None:
        if hello.epoch == worker.epoch:
            return
        problem = self._misfit(worker, hello)
        if problem is not None:
            logger.error("%s", problem)
            instance.why_lost = problem
            return
        if worker.ready:
            self._lose(instance, worker, "it started again")
        instance.register(worker, hello)
        self.transfers.connect(self.instances.values())
        others = [i.hello.max_model_len for i in self.instances.values() if i.hello is not None]
        self._max_model_len = min(others) if self._max_model_len is None else min(self._max_model_len, *others)
        self._vocab_size = hello.vocab_size
        logger.info("%s registered: %s, %d KV blocks", worker.id, hello.device, hello.num_blocks)
        self.events.note("ready", worker.id, f"{hello.device}, {hello.num_blocks} KV blocks")
        self._announce_ready()

    def _misfit(self, worker: WorkerHandle, hello: Hello) -> str | None:
        """Why a worker cannot work with the others."""
        if hello.instance_id != worker.id or hello.role != worker.started_as:
            return f"{worker.rpc.address} is {hello.role} {hello.instance_id!r}, not {worker.started_as} {worker.id!r}"
        for _, other in self._all_workers():
            if other is worker or other.hello is None:
                continue
            mine, theirs = ((each.block_size, each.head_bytes, each.vocab_size) for each in (hello, other.hello))
            if mine != theirs:
                return (
                    f"{worker.id} and {other.id} do not fit: (block size, bytes of a KV head, vocabulary) "
                    f"is {mine} and {theirs}; do they run the same model with the same settings?"
                )
        return None

    def _lose(self, instance: InstanceHandle, worker: WorkerHandle, why: str) -> None:
        """A worker is gone: what was there is computed again, from tokens that are all here."""
        if not worker.ready:
            instance.note_lost(why)
            return
        logger.log(logging.INFO if worker.is_retiring else logging.WARNING, "lost %s: %s", worker.id, why)
        self.events.note("retired" if worker.is_retiring else "lost", worker.id, why)
        if worker.owns_memory:
            worker.hello = None
            worker.inflight.clear()
            self._lose_memory(instance, f"{instance.id} was lost: {why}")
            return
        # The memory is intact, but until the process has ended it may still write: see `_set_workers`.
        worker.hello = None
        instance.note_lost(why)
        if not worker.is_retiring:
            self._clients.reply(self._worker_launchers[instance.id], WorkerLost(worker_id=worker.id, reason=why))

    def _lose_memory(self, instance: InstanceHandle, why: str) -> None:
        seated = [s for s in self._sequences.values() if any(seat.worker is instance for seat in s.seats)]
        failed = self.transfers.lose(instance)
        instance.reset()
        instance.note_lost(why)
        for sequence in seated:
            self._retry(sequence, why)
        self._retry_all(failed, why)

    # --- workers on memory that another process holds --------------------------------------------

    def _set_workers(self, launcher: bytes, message: SetWorkers) -> None:
        instance = self.instances.get(message.instance_id)
        if instance is None or instance.id in instance.workers:
            logger.error("dropped a list of workers for %r, which is no such instance", message.instance_id)
            return
        self._worker_launchers[instance.id] = launcher
        shares = {
            InstanceRole.PREFILL: message.prefill_percentage,
            InstanceRole.DECODE: message.decode_percentage,
        }
        if shares != instance.shares:
            split = ", ".join(f"{phase} {share} %" for phase, share in shares.items())
            self.events.note("rotation", instance.id, f"{split}: {message.reason}" if message.reason else split)
        instance.shares = shares
        if instance.arena_epoch not in (0, message.arena_epoch):
            logger.warning("lost the memory of %s: %s", instance.id, message.reason)
            for worker in list(instance.workers.values()):
                instance.forget_worker(worker)
                self._close_later(worker)
            self._lose_memory(instance, f"the memory of {instance.id} was lost: {message.reason}")
        for worker_id in message.gone:
            if worker_id in instance.workers:
                worker = instance.workers[worker_id]
                self._take_back(instance.forget_worker(worker))
                self._close_later(worker)
        named = {spec.worker_id for spec in message.workers}
        for worker in instance.workers.values():
            worker.is_retiring = worker.id not in named
        for spec in message.workers:
            if spec.worker_id not in instance.workers:
                worker = self._new_worker(spec)
                instance.workers[worker.id] = worker
                self._serve_worker(instance, worker)
                self._greet(worker)

    def _new_worker(self, spec: WorkerSpec) -> WorkerHandle:
        key = ClusterKey.of(self.config)
        return WorkerHandle(spec.worker_id, spec.role, spec.percentage, self._context, spec.address, key)

    def _greet(self, worker: WorkerHandle) -> None:
        """Ask for its `Hello` until it comes: sooner than at the next heartbeat."""
        if worker in self._worker_tasks and not worker.ready:
            self._ping(worker)
            asyncio.get_running_loop().call_later(_GREETING_INTERVAL_S, self._greet, worker)

    def _take_back(self, unconfirmed: list[InflightStep]) -> None:
        """Steps that nobody will confirm, of a process that cannot write any more: others do them again."""
        for step in unconfirmed:
            for row in step.rows:
                sequence, seat = row.sequence, row.seat
                seat.pool.unpin(seat.owner)
                if row.attempt != sequence.attempt or sequence.phase is Phase.FINISHED or not seat.num_inflight:
                    continue
                seat.roll_back()
                sequence.num_setbacks += 1
                if sequence.num_setbacks >= self.config.kv_transfer.max_attempts:
                    self._fail(sequence, f"{sequence.num_setbacks} workers in a row were lost in its steps")

    def _end_retired(self, instance: InstanceHandle) -> None:
        """Have workers end that have nothing left to do, where others can do their phase."""
        for worker in instance.workers.values():
            if worker.ready and worker.is_retiring and not worker.is_told_to_end and not worker.inflight:
                others = [other for other in instance.workers.values() if other.ready and not other.is_retiring]
                if any(other.role is worker.role for other in others):
                    worker.is_told_to_end = True
                    worker.send(Shutdown())

    def _close_later(self, worker: WorkerHandle) -> None:
        task = asyncio.create_task(self._drop_worker(worker))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # --- results ---------------------------------------------------------------------------------

    def _on_step_result(self, worker: WorkerHandle, result: StepResult) -> None:
        step = worker.inflight.popleft()
        assert step.step_id == result.step_id, "a worker answers in order"
        worker.work.num_steps += 1
        worker.work.busy_s += result.busy_s
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
                    worker.work.num_tokens += 1
                    last_token_times.append(sequence.last_token_time)
                    sequence.last_token_time = now
                    self._on_token(sequence, seat, *sample)
            seat.num_inflight -= 1
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
        sequence.num_setbacks = 0
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
