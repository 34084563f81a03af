"""The scheduler's view of one worker: its connection, and its steps in flight."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import zmq

from hbserve.config import InstanceRole
from hbserve.messages.worker import Hello, InstanceCommand, StepResult
from hbserve.policy.dispatch_timer import DispatchTimer
from hbserve.rpc.cluster_key import ClusterKey
from hbserve.rpc.instance_line import RpcClient
from hbserve.scheduler.sequence import InflightStep

_SHORT_STEP_S = 2e-3
"""Result out, scheduling, plan in and launch take about 1 ms."""


@dataclass(slots=True)
class Work:
    """What has been done: confirmed steps, sampled tokens, seconds of the device, and of the host to launch them."""

    num_steps: int = 0
    num_tokens: int = 0
    busy_s: float = 0.0
    host_s: float = 0.0

    def add(self, other: Work) -> None:
        """Count another's as well."""
        self.num_steps += other.num_steps
        self.num_tokens += other.num_tokens
        self.busy_s += other.busy_s
        self.host_s += other.host_s


class WorkerHandle:
    """One worker as the scheduler knows it: its connection and its steps in flight.

    ``hello`` is None while it is not registered: not started yet, or lost.

    Attributes:
        started_as: the role of its process' configuration, which it introduces itself with.
        prepared_for: the role that it has got ready for last.
        percentage: its share of the device.
        timing: of its steps in flight: when the next one is to be planned.
        is_retiring: it gets no more plans where another worker can, and is told to end when nothing
            is in flight.
        is_introduced: it has been told of the sequences that ran when it came.
        cell: its place on the board of the workers on its arenas; None: it is not on it.
        has_waited_for: the last step of another worker that one of its plans waits for.
        results: of its oldest steps in flight, which are not confirmed before those that they come after.
    """

    def __init__(
        self,
        worker_id: str,
        role: InstanceRole,
        percentage: int,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        key: ClusterKey | None = None,
    ) -> None:
        self.id = worker_id
        self.role = self.started_as = self.prepared_for = role
        self.percentage = percentage
        self.rpc = RpcClient(context, address, key)
        self.hello: Hello | None = None
        self.last_seen = time.monotonic()
        self.inflight: deque[InflightStep] = deque()
        self.timing = DispatchTimer()
        self.is_retiring = False
        self.is_told_to_end = False
        self.is_introduced = False
        self.cell: int | None = None
        self.has_waited_for = 0
        self.results: deque[StepResult] = deque()
        self.work = Work()
        self.last_step_s = 0.0

    def pipeline_depth(self, configured: int) -> int:
        """Plans to have in flight: one more where a round trip takes longer than a step."""
        return configured + (0 < self.last_step_s < _SHORT_STEP_S)

    @property
    def ready(self) -> bool:
        """Whether plans can be sent."""
        return self.hello is not None

    @property
    def epoch(self) -> int:
        """Of the incarnation that is registered; 0 for none."""
        return self.hello.epoch if self.hello is not None else 0

    @property
    def owns_memory(self) -> bool:
        """Whether the pool's memory is its own, and lost with it."""
        return self.hello is None or self.hello.arena_epoch == self.hello.epoch

    def can_follow(self, other: WorkerHandle) -> bool:
        """Whether a step of it can be planned before the other one's last is done: it waits on the device's side."""
        return other.ready and other.role is self.role and None not in (self.cell, other.cell)

    def send(self, command: InstanceCommand) -> None:
        """Send; what does not reach a worker is noticed by its silence."""
        self.rpc.send(command)
