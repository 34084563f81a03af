"""An instance that is not in the configuration and the scheduler of a running system, before they know each other."""

from __future__ import annotations

from typing import Any

import msgspec

from hbserve.config import InstanceRole
from hbserve.messages.base import Message


class Join(Message, frozen=True):
    """An instance wants to be one of the system's; answered by `Joined`.

    Attributes:
        address: where it will listen for the scheduler.
        kv_rank: its number among the KV transfer peers, if it has one already; None: give it one.
        num_ranks: its tensor-parallel ranks; None: as many as the system's instances have by default.
    """

    instance_id: str
    role: InstanceRole
    address: str
    kv_rank: int | None
    num_ranks: int | None


class Joined(Message, frozen=True):
    """Answer to `Join`: the scheduler now waits for the instance at its address, or says why not.

    Attributes:
        config: of the system, as plain data. It names files, and holds no secrets.
        kv_rank: the instance's.
        error: why it cannot join.
        is_taken: the error is that its name is in use by an instance that is there.
    """

    config: dict[str, Any] = msgspec.field(default_factory=dict)
    kv_rank: int = 0
    error: str | None = None
    is_taken: bool = False
