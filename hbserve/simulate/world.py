"""A simulated system: the real scheduler core with simulated workers, links, supervisors and clients around it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from hbserve.config import Config, InstanceRole
from hbserve.messages.admin import GetStats, Stats
from hbserve.messages.client import AddRequest, ClientMessage, OutputBatch, SchedulerReply
from hbserve.messages.worker import InstanceReply
from hbserve.policy.step_time_predictor import StepTimePredictor
from hbserve.sampling_params import SamplingParams
from hbserve.scheduler.core_io import FromClient, FromWorker, InboxEvent, Outbox, Start
from hbserve.scheduler.scheduler import CpuScheduler
from hbserve.simulate.clock import Event, SimulatedClock
from hbserve.simulate.device import SimulatedDevice, SimulatedWorker
from hbserve.simulate.requests import VOCAB_SIZE, SimulatedRequest
from hbserve.simulate.tiers import SimulatedHostTier

REQUEST_DELAY_S, TOKEN_DELAY_S = 3.4e-3, 2.4e-3
"""Times of a request from its client to the scheduler, and of a token back, over HTTP; medians, measured on an H200's
host (docs/benchmarks.md)."""
_CLIENT = b"client"
_MAX_PAUSE_S = 3600.0
"""Simulated time without the end of a request after which the system counts as stuck."""


class SimulatedSystem:
    """A scheduler's core, and what its shell connects it to.

    Messages take the time that they took where it was measured: of clients here, of workers in
    `hbserve.simulate.device`; others take none. Everything that happens at one time is one inbox.

    Args:
        num_blocks: of each instance's KV pool.
        ttft_target_ms, tpot_target_ms: targets that each request carries; None: none.
        num_host_blocks: of a tier in the host's memory; 0: there is none.
        acceptance: how often a token that is guessed is right; None: nothing guesses.

    Attributes:
        devices: by instance.
        on_outputs: called with each batch of outputs; None: outputs are dropped.
    """

    def __init__(
        self,
        config: Config,
        steps: StepTimePredictor,
        num_blocks: int,
        ttft_target_ms: float | None = None,
        tpot_target_ms: float | None = None,
        num_host_blocks: int = 0,
        acceptance: float | None = None,
    ) -> None:
        self.config = config
        self.clock = clock = SimulatedClock()
        host = SimulatedHostTier(num_host_blocks) if num_host_blocks else None
        self.devices = {
            instance.instance_id: SimulatedDevice(clock, steps, num_blocks, number, host)
            for number, instance in enumerate(config.gpu_instances)
        }
        self._acceptance = acceptance
        self._targets = ttft_target_ms, tpot_target_ms
        self._device_list = list(self.devices.values())
        self._listeners: dict[str, SimulatedWorker] = {}  # by address
        self._connections: dict[int, SimulatedWorker] = {}
        self._connection_of: dict[str, int] = {}  # by worker
        self._inbox: list[InboxEvent] = []
        self._is_woken = False
        self._alarm: Event | None = None
        self._alarm_at = math.inf
        self.on_outputs: Callable[[OutputBatch], None] | None = None
        self._replies: list[SchedulerReply] = []
        self._open: dict[str, SimulatedRequest] = {}
        self._num_requests = 0
        self._last_end = 0.0
        self._is_given_up = False
        self._on_ended: Callable[[SimulatedRequest], bool] | None = None
        addresses = {}
        for instance in config.gpu_instances:
            if instance.instance_type is not InstanceRole.SEMI_PD:
                name = instance.instance_id
                self.start_worker(name, name, instance.instance_type, 100, None)
                addresses[name] = name
        self.core = CpuScheduler(config, addresses, Start(now=0.0, time_ns=1))
        self._step()
        self._settle()

    def start_worker(
        self,
        instance_id: str,
        worker_id: str,
        role: InstanceRole,
        percentage: int,
        on_exit: Callable[[SimulatedWorker], None] | None,
    ) -> SimulatedWorker:
        """Start a worker, which listens at its name. The scheduler must be told of it, unless it is configured."""
        worker = SimulatedWorker(
            worker_id,
            role,
            percentage,
            self.devices[instance_id],
            lambda reply: self._from_worker(worker_id, reply),
            self._device_list.__getitem__,
            on_exit,
        )
        self._listeners[worker_id] = worker
        return worker

    # --- the scheduler's shell -------------------------------------------------------------------

    def post(self, event: InboxEvent) -> None:
        """Put an event into the inbox of the scheduler's next step, which comes at once."""
        self._inbox.append(event)
        if not self._is_woken:
            self._is_woken = True
            self.clock.at(self.clock.now, self._step_if_woken)

    def ask(self, message: ClientMessage) -> SchedulerReply:
        """Send a query, and return the answer, which is immediate."""
        self.post(FromClient(b"operator", message))
        self._replies.clear()
        self._step()
        [reply] = self._replies
        return reply

    @property
    def tier_stats(self) -> dict[str, dict[str, Any]]:
        """Statistics of the tiers, by name, as ``get_system_stats()["kv_tiers"]`` has them."""
        reply = self.ask(GetStats(query_id=0))
        assert isinstance(reply, Stats)
        tiers: dict[str, dict[str, Any]] = reply.stats["kv_tiers"]
        return tiers

    def tell(self, message: ClientMessage) -> None:
        """Send a message of a supervisor."""
        self.post(FromClient(b"supervisor", message))

    def _from_worker(self, worker_id: str, reply: InstanceReply) -> None:
        connection = self._connection_of.get(worker_id)
        if connection is not None:
            self.post(FromWorker(connection, reply))

    def _settle(self) -> None:
        """Let all workers register."""
        self.clock.run(self.clock.now)

    def _step_if_woken(self) -> None:
        if self._is_woken:
            self._step()

    def _on_alarm(self) -> None:
        self._alarm, self._alarm_at = None, math.inf
        self._step()

    def _step(self) -> None:
        self._is_woken = False
        inbox, self._inbox = self._inbox, []
        self._act(self.core.step(self.clock.now, inbox))

    def _act(self, outbox: Outbox) -> None:
        for connection, address in outbox.connects:
            worker = self._listeners.pop(address)
            self._connections[connection] = worker
            self._connection_of[worker.id] = connection
        for connection, command in outbox.to_workers:
            self._connections[connection].on_command(command)
        for client, reply in outbox.to_clients:
            if client != _CLIENT:
                self._replies.append(reply)
            elif self.on_outputs is not None and isinstance(reply, OutputBatch):
                self.on_outputs(reply)
        for connection in outbox.disconnects:
            del self._connection_of[self._connections.pop(connection).id]
        for ended in outbox.ended:
            request, times = self._open.pop(ended.request_id), ended.metrics
            assert ended.outcome == "completed", f"request {ended.request_id}: {ended.outcome}"
            assert times.first_token_time is not None
            assert times.completion_time is not None
            request.first_token_time = times.first_token_time + TOKEN_DELAY_S
            request.completion_time = times.completion_time + TOKEN_DELAY_S
            request.cached_tokens, request.num_preemptions = times.cached_tokens, times.num_preemptions
            self._last_end = self.clock.now
            if self._on_ended is not None and not self._on_ended(request):
                self._is_given_up = True
        if outbox.call_at != self._alarm_at:
            if self._alarm is not None:
                self._alarm.cancel()
            self._alarm_at = outbox.call_at
            self._alarm = self.clock.at(self._alarm_at, self._on_alarm)

    # --- requests --------------------------------------------------------------------------------

    def serve(
        self, requests: list[SimulatedRequest], on_ended: Callable[[SimulatedRequest], bool] | None = None
    ) -> None:
        """Serve requests, which are sorted by arrival, until all have ended.

        Args:
            on_ended: called with each request that has ended; returns whether to go on.
        """
        self._on_ended = on_ended
        arrivals = iter(requests)
        self._expect(arrivals)
        while (self._open or self._num_requests < len(requests)) and not self._is_given_up:
            self.clock.advance()
            if self.clock.now - max(self._last_end, requests[0].arrival) > _MAX_PAUSE_S and self._open:
                raise AssertionError(f"{len(self._open)} requests make no progress")
        self._settle()

    def _expect(self, arrivals: Iterator[SimulatedRequest]) -> None:
        request = next(arrivals, None)
        if request is not None:
            self.clock.at(request.arrival + REQUEST_DELAY_S, lambda: self._arrive(request, arrivals))

    def _arrive(self, request: SimulatedRequest, arrivals: Iterator[SimulatedRequest]) -> None:
        self._num_requests += 1
        request_id = str(self._num_requests)
        self._open[request_id] = request
        ttft_ms, tpot_ms = (None, None) if request.is_batch else self._targets
        if ttft_ms is not None and request.ttft_target_ms is not None:
            ttft_ms = request.ttft_target_ms
        sampling = SamplingParams(
            temperature=0,
            max_tokens=request.output_tokens,
            ttft_ms=ttft_ms,
            tpot_ms=tpot_ms,
            priority="batch" if request.is_batch else None,
        )
        tokens = request.tokens(self._num_requests)
        predicted = None
        if self._acceptance is not None:  # workers sample each token's position
            rng = random.Random(self._num_requests)
            ends = range(request.prompt_tokens, request.prompt_tokens + request.output_tokens)
            predicted = [(end + (rng.random() >= self._acceptance)) % VOCAB_SIZE for end in ends]
        message = AddRequest(
            request_id=request_id,
            prompt_token_ids=tokens,
            end_token_ids=[],
            sampling=sampling,
            age_s=REQUEST_DELAY_S,
            predicted_token_ids=predicted,
        )
        self.post(FromClient(_CLIENT, message))
        self._expect(arrivals)
