"""Messages between the scheduler of a running system and a new instance that its configuration does not name."""

from __future__ import annotations

from typing import Any

import msgspec

from hbserve.config import InstanceRole
from hbserve.messages.base import Message


class Join(Message, frozen=True):
    """Ask to become an instance of the system; answered by `Joined`.

    Attributes:
        address: where the instance will listen for the scheduler.
        kv_rank: the instance's number among the KV transfer peers; None: the scheduler gives it one.
        num_ranks: the instance's tensor-parallel ranks; None: the system's default.
    """

    instance_id: str
    role: InstanceRole
    address: str
    kv_rank: int | None
    num_ranks: int | None


class Joined(Message, frozen=True):
    """Answer to `Join`: the scheduler now waits for the instance at its address, or reports why it does not.

    Attributes:
        config: the system's configuration as plain data. It names files, and holds no secrets.
        kv_rank: the instance's number among the KV transfer peers.
        error: why the instance cannot join.
        is_taken: whether the reason is that a registered instance has the same name.
    """

    config: dict[str, Any] = msgspec.field(default_factory=dict)
    kv_rank: int = 0
    error: str | None = None
    is_taken: bool = False
