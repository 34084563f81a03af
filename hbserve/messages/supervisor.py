"""Messages between supervisors, which start and end the processes of workers, and the scheduler."""

from __future__ import annotations

from typing import Literal

import msgspec

from hbserve.config import InstanceRole
from hbserve.messages.base import Message, Value


class WorkerSpec(Value, frozen=True):
    """Description of a worker of an instance whose memory a resident process holds.

    Attributes:
        role: the phase that it computes; ``unified`` computes both.
        percentage: its share of the device.
        address: where it listens for the scheduler.
    """

    worker_id: str
    role: InstanceRole
    percentage: int
    address: str


class SetWorkers(Message, frozen=True):
    """Set the workers of an instance; sent by the supervisor that starts and ends them.

    The message names every process that may write to the memory. A worker that the scheduler knows but the message
    does not name has ended. A scheduler that has just started therefore learns from one message which workers must
    have finished the steps of the scheduler before it.

    Attributes:
        arena_epoch: epoch of the memory that the workers are attached to, or 0 while there is none. If it has changed,
            the old memory and all KV in it are lost.
        draining: workers that get no more plans once another worker can compute their phase, and that are told to exit
            when they have nothing in flight.
        prefill_percentage, decode_percentage: each phase's share while both are busy.
        mixed: both phases go to the unified worker, in the same steps.
        reason: why, in words.
    """

    instance_id: str
    arena_epoch: int
    workers: list[WorkerSpec]
    draining: list[WorkerSpec]
    prefill_percentage: int
    decode_percentage: int
    mixed: bool = False
    reason: str = ""


class WorkerLost(Message, frozen=True):
    """A worker failed or does not answer; the supervisor that sent `SetWorkers` must end its process."""

    worker_id: str
    reason: str


EventKind = Literal[
    "ready",
    "retired",
    "left",
    "role",
    "plan",
    "profile",
    "rotation",
    "recovered",
    "scheduler_restarted",
    "scheduler_lost",
    "lost",
    "memory_lost",
    "recovery_failed",
    "rotation_failed",
    "slo_failed",
    "transfer_failed",
    "tier_failed",
    "join_refused",
    "unserved",
    "instance_restarted",
    "text_restarted",
    "grammar_restarted",
    "start_failed",
    "given_up",
    "message_dropped",
    "descriptors_low",
    "reload_failed",
    "bug",
]
"""Kinds of events of a system; from ``scheduler_lost`` on they are faults. docs/failures.md explains them."""


class ReportEvent(Message, frozen=True):
    """Something has happened that the scheduler cannot see: it keeps and counts the events of all processes.

    ``given_up`` with an instance as its subject also tells the scheduler that this instance does not come back.

    Attributes:
        subject: the instance, worker or process that it is about.
    """

    kind: EventKind
    subject: str
    text: str


class Predecessor(Message, frozen=True):
    """What a scheduler is told of the one before it, by the launcher that has started both.

    Attributes:
        reason: why it has ended, in words.
        failed: whether it failed on its own, so that a request may be the cause.
        num_restarts: restarts since the start of the system, this one included.
        given_up: instances that do not come back, by id, and why.
        removed: instances of the configuration that operators have removed.
    """

    reason: str
    failed: bool
    num_restarts: int
    given_up: dict[str, str] = msgspec.field(default_factory=dict)
    removed: list[str] = msgspec.field(default_factory=list)


class MarkRotation(Message, frozen=True):
    """A rotation begins or has ended; windows of metrics leave out latencies of the time between."""

    begins: bool
