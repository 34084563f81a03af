"""Messages between an operator's client and the scheduler: statistics, and changes of instances."""

from __future__ import annotations

from typing import Any

from hbserve.config import InstanceRole
from hbserve.messages.base import Message, Seconds, Value


class GetStats(Message, frozen=True):
    """Ask for `Stats`, even while the system is not ready. ``recent``: with the last requests' timelines and events."""

    query_id: int
    recent: bool = False


class Stats(Message, frozen=True):
    """Answer to `GetStats`: plain numbers and names, in the shape of ``get_system_stats()``."""

    query_id: int
    stats: dict[str, Any]


class GetWindowMetrics(Message, frozen=True):
    """Ask for the `WindowMetrics` of the last ``seconds``."""

    query_id: int
    seconds: Seconds


class WindowMetrics(Message, frozen=True):
    """Answer to `GetWindowMetrics`: an `hbserve.metrics.window_metrics.AggregatedMetrics`, as plain data."""

    query_id: int
    metrics: dict[str, Any]


class GetLoad(Message, frozen=True):
    """Ask for the `RecentLoad` of the last ``seconds``."""

    query_id: int
    seconds: Seconds


class LoadEntry(Value, frozen=True):
    """A request that has come lately: when, in seconds after the first one, and its tokens."""

    arrival_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


class RecentLoad(Message, frozen=True):
    """Answer to `GetLoad`: the requests that have ended well, by arrival; best-effort ones are left out."""

    query_id: int
    entries: list[LoadEntry]


class SetRole(Message, frozen=True):
    """Change an instance's role, at once or when it has no work left; answered by `InstanceChanged`. ``deadline_s``:
    after this time the instance goes on in its old role."""

    query_id: int
    instance_id: str
    role: InstanceRole
    deadline_s: Seconds


class PrepareRoles(Message, frozen=True):
    """Open the KV links that instances would need in these roles, which they may get later; not answered."""

    roles: dict[str, InstanceRole]


class RemoveInstance(Message, frozen=True):
    """End an instance once it has no work left; answered by `InstanceChanged`. ``deadline_s``: after this time the
    instance goes on serving. ``has_ended``: an operator removed it while an earlier scheduler ran, and its process
    has ended. The scheduler then removes it even where it is the only one of its phase."""

    query_id: int
    instance_id: str
    deadline_s: Seconds
    has_ended: bool = False


class InstanceChanged(Message, frozen=True):
    """Answer to `SetRole` and `RemoveInstance`. ``error``: why nothing has changed; ``is_unknown``: whether the reason
    is that there is no such instance."""

    query_id: int
    error: str | None = None
    is_unknown: bool = False
