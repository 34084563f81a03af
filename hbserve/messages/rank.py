"""Messages between rank 0 of an instance and its other ranks. `RankWork` comes encoded, on a line of its own."""

from __future__ import annotations

import msgspec

from hbserve.config import InstanceRole
from hbserve.messages.base import Message
from hbserve.messages.tiers import TierCommand, TierResult
from hbserve.messages.transfer import Peer, TransferCommand, TransferReply
from hbserve.messages.worker import InstanceFailed, StepLost, StepPlan, StepResult


class Standby(msgspec.Struct, frozen=True, kw_only=True):
    """Preparation of a standby process.

    Attributes:
        model: folder of the model that the process will run; None: it learns the model later.
        on_gpu: whether to import what only a GPU needs.
        yields: whether its imports leave the cores to processes that serve meanwhile.
    """

    model: str | None
    on_gpu: bool
    yields: bool


class BeginEpoch(Message, frozen=True):
    """Forget all state, and answer with `EpochBegun`.

    Attributes:
        epoch: epoch of the instance.
        num_plans: plans sent since the start; the rank first finishes the last of them.
    """

    epoch: int
    num_plans: int


class EpochBegun(Message, frozen=True):
    """Nothing of the epoch before can touch the rank's arena any more. ``peer``: where the rank receives KV."""

    peer: Peer


class CaptureGraph(Message, frozen=True):
    """Capture the CUDA graphs of one size of step, between the plans before and after this message.

    Attributes:
        phase: ``decode`` or ``prefill``.
        size: rows of a decode step; tokens of a step with prompts.
    """

    phase: InstanceRole
    size: int


RankWork = StepPlan | CaptureGraph
"""What a rank's main thread does, in order: the ranks of a group must launch the same work in the same order."""
RankCommand = BeginEpoch | StepLost | TransferCommand | TierCommand
RankReply = EpochBegun | TransferReply | TierResult | StepResult | InstanceFailed
