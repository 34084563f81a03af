"""Supervisors of workers, who start and end their processes, and the scheduler."""

from __future__ import annotations

from hbserve.config import InstanceRole
from hbserve.messages.base import Message, Value


class WorkerSpec(Value, frozen=True):
    """A worker of an instance whose memory a resident process holds.

    Attributes:
        role: the phase that it does; ``unified`` does both.
        percentage: its share of the device.
        address: where it listens for the scheduler.
    """

    worker_id: str
    role: InstanceRole
    percentage: int
    address: str


class SetWorkers(Message, frozen=True):
    """Which workers an instance has from now on; from whoever starts and ends them.

    A worker that the scheduler knows and that is named nowhere here retires: it gets no more plans
    once another can do its phase, and is told to end when nothing of it is in flight.

    Attributes:
        arena_epoch: of the memory that they are attached to, or 0 while there is none. Where it is
            not the one before, that memory and all KV in it are lost.
        gone: names of workers whose processes have ended: nothing of theirs can write any more.
        prefill_percentage, decode_percentage: each phase's share while both are busy.
        mixed: both phases go to the unified worker, in the same steps.
        reason: why, in words.
    """

    instance_id: str
    arena_epoch: int
    workers: list[WorkerSpec]
    gone: list[str]
    prefill_percentage: int
    decode_percentage: int
    mixed: bool = False
    reason: str = ""


class WorkerLost(Message, frozen=True):
    """To whoever sent `SetWorkers`: a worker failed or does not answer; its process must be ended."""

    worker_id: str
    reason: str


class MarkRotation(Message, frozen=True):
    """A rotation begins, or is over: latencies of the time between are left out of windows."""

    begins: bool
