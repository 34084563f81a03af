"""Rank 0 of an instance and its other ranks. Plans come on a line of their own, encoded `StepPlan`s."""

from __future__ import annotations

import msgspec

from hbserve.messages.base import Message
from hbserve.messages.transfer import Peer, TransferCommand, TransferReply
from hbserve.messages.worker import InstanceFailed, StepLost, StepResult


class Standby(msgspec.Struct, frozen=True, kw_only=True):
    """How a process falls asleep.

    Attributes:
        model: the folder of the model that it will run; None: it will be told what the model is.
        on_gpu: whether to import what only a GPU needs.
        yields: its imports are in no hurry, and leave the cores to what serves meanwhile.
    """

    model: str | None
    on_gpu: bool
    yields: bool


class BeginEpoch(Message, frozen=True):
    """Forget everything, and answer with `EpochBegun`.

    Attributes:
        epoch: of the instance.
        num_plans: so many plans have been sent since the start; the last of them is finished first.
    """

    epoch: int
    num_plans: int


class EpochBegun(Message, frozen=True):
    """Nothing of the epoch before can touch the rank's arena any more. Attributes: peer: where it receives KV."""

    peer: Peer


RankCommand = BeginEpoch | StepLost | TransferCommand
RankReply = EpochBegun | TransferReply | StepResult | InstanceFailed
