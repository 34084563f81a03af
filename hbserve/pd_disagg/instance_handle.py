"""The scheduler's view of one instance: its connection, its pool, its seats and its steps in flight."""

from __future__ import annotations

import heapq
import time
from collections import deque
from dataclasses import dataclass

import zmq

from hbserve.cluster_key import ClusterKey
from hbserve.config import InstanceConfig, InstanceRole, PerformanceConfig
from hbserve.kv_cache.storage_manager import UnifiedStorageManager
from hbserve.messages import Hello, InstanceCommand
from hbserve.pd_disagg.rpc import RpcClient
from hbserve.pd_disagg.sequence import Seat, Sequence

_SHORT_STEP_S = 2e-3
"""Result out, scheduling, plan in and launch take about 1 ms."""


@dataclass(slots=True)
class InflightRow:
    """One sequence's part of a step that has been sent and not confirmed."""

    sequence: Sequence
    attempt: int
    seat: Seat
    end: int  # positions below this have KV once the step is confirmed
    samples: bool


@dataclass(slots=True)
class InflightStep:
    """A step that has been sent and not confirmed."""

    step_id: int
    rows: list[InflightRow]
    prefill_rows: int = 0
    prefill_tokens: int = 0


class InstanceHandle:
    """One instance as the scheduler knows it.

    ``hello`` is None while the instance is not registered: not started yet, or lost.
    """

    def __init__(
        self,
        config: InstanceConfig,
        performance: PerformanceConfig,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        key: ClusterKey | None = None,
    ) -> None:
        self.config = config
        self.id = config.instance_id
        self.role: InstanceRole = config.instance_type
        self.rpc = RpcClient(context, address, key)
        self.hello: Hello | None = None
        self.last_seen = time.monotonic()
        self.lost_since: float | None = self.last_seen
        self.why_lost = "has not started yet"
        self.num_restarts = -1
        self.num_steps = 0
        self.num_tokens = 0
        self.busy_s = 0.0
        self.last_step_s = 0.0
        self._performance = performance
        self._reset()

    def _reset(self) -> None:
        self.inflight: deque[InflightStep] = deque()
        self.seats: dict[Sequence, Seat] = {}
        self.reserved: dict[Sequence, Seat] = {}
        self._free_slots = list(range(self._performance.max_num_seqs))

    @property
    def pipeline_depth(self) -> int:
        """Plans to have in flight: one more where a round trip takes longer than a step."""
        short = 0 < self.last_step_s < _SHORT_STEP_S
        return self._performance.pipeline_depth + short

    @property
    def ready(self) -> bool:
        """Whether plans can be sent."""
        return self.hello is not None

    @property
    def epoch(self) -> int:
        """Of the incarnation that is registered; 0 for none."""
        return self.hello.epoch if self.hello is not None else 0

    def register(self, hello: Hello) -> None:
        """A new incarnation is here, with an empty pool."""
        self.hello = hello
        self.lost_since = None
        self.last_seen = time.monotonic()
        self.num_restarts += 1
        self._reset()
        self.pool = UnifiedStorageManager(
            hello.num_blocks, hello.block_size, enable_prefix_caching=self._performance.enable_prefix_caching
        )

    def lose(self, why: str) -> list[InflightStep]:
        """The incarnation is gone; returns its steps that will never be confirmed."""
        self.hello = None
        self.lost_since = time.monotonic()
        self.why_lost = why
        unconfirmed = list(self.inflight)
        self._reset()
        return unconfirmed

    def send(self, command: InstanceCommand) -> None:
        """Send; what does not reach an instance is noticed by its silence."""
        self.rpc.send(command)

    @property
    def has_free_slot(self) -> bool:
        """Whether one more sequence can be seated."""
        return bool(self._free_slots)

    def take_slot(self) -> int:
        """The lowest free slot: low slots keep the worker's tables dense."""
        return heapq.heappop(self._free_slots)

    def reserve(self, sequence: Sequence, seat: Seat) -> None:
        """Keep a seat for a sequence that is still prefilled elsewhere."""
        self.reserved[sequence] = seat

    def activate(self, sequence: Sequence, seat: Seat) -> None:
        """From the next plan on, the sequence takes part."""
        self.reserved.pop(sequence, None)
        self.seats[sequence] = seat

    def release(self, sequence: Sequence, seat: Seat) -> None:
        """Free a seat. Steps in flight may still name its slot; the worker works in order, so no harm."""
        if seat.epoch != self.epoch:
            return  # the incarnation is gone and all its seats with it
        self.seats.pop(sequence, None)
        self.reserved.pop(sequence, None)
        heapq.heappush(self._free_slots, seat.slot)

    @property
    def num_tokens_to_prefill(self) -> int:
        """Prompt tokens that are seated here and not planned: the load that placement looks at."""
        return sum(max(0, seat.num_tokens_at_entry - seat.num_planned) for seat in self.seats.values())
