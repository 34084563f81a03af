"""Whoever operates a system and the scheduler: what it has to tell, and changes of its instances."""

from __future__ import annotations

from typing import Any

from hbserve.config import InstanceRole
from hbserve.messages.base import Message


class GetStats(Message, frozen=True):
    """Ask for `Stats`; answered even while the system is not ready.

    Attributes:
        recent: with ``recent``: the last requests' timelines and the last events.
    """

    query_id: int
    recent: bool = False


class Stats(Message, frozen=True):
    """Answer to `GetStats`: plain numbers and names, the shape of ``get_system_stats()``."""

    query_id: int
    stats: dict[str, Any]


class GetWindow(Message, frozen=True):
    """Ask for the `Window` of the last ``seconds``."""

    query_id: int
    seconds: float


class Window(Message, frozen=True):
    """Answer to `GetWindow`: an `hbserve.metrics.window_metrics.AggregatedMetrics`, as plain data."""

    query_id: int
    metrics: dict[str, Any]


class SetRole(Message, frozen=True):
    """Have an instance change its role once it has nothing left to do; answered by `InstanceChanged`.

    Attributes:
        deadline_s: then it goes on as it was.
    """

    query_id: int
    instance_id: str
    role: InstanceRole
    deadline_s: float


class RemoveInstance(Message, frozen=True):
    """Have an instance end once it has nothing left to do; answered by `InstanceChanged`.

    Attributes:
        deadline_s: then it goes on as it was.
    """

    query_id: int
    instance_id: str
    deadline_s: float


class InstanceChanged(Message, frozen=True):
    """Answer to `SetRole` and `RemoveInstance`.

    Attributes:
        error: why nothing has changed.
        is_unknown: because there is no such instance.
    """

    query_id: int
    error: str | None = None
    is_unknown: bool = False
