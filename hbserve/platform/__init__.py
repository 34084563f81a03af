"""The only room that knows the device: its memory, streams, shares, and how processes share its memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hbserve.lazy import lazy_attributes

if TYPE_CHECKING:
    from hbserve.platform.base import Platform, SharedArena
    from hbserve.platform.choice import make_platform, resolve_device, set_priority

__all__ = ["Partition", "Platform", "SharedArena", "make_platform", "resolve_device", "set_priority"]


@dataclass(frozen=True)
class Partition:
    """The share of a device that one process gets.

    Attributes:
        percentage: percentage of the device's multiprocessors; on the CPU, of the instance's threads.
        end: whether the process gets the first or the last multiprocessors. Processes at different ends have
            multiprocessors in common only if their percentages add up to more than 100.
        priority: 0 is normal, 1 is below: work with priority 1 yields to work with priority 0.
    """

    percentage: int = 100
    end: Literal["first", "last"] = "first"
    priority: int = 0


# Lazy, because launchers use `mps` without importing torch.
__getattr__: Any = lazy_attributes(
    {
        "Platform": "hbserve.platform.base",
        "SharedArena": "hbserve.platform.base",
        "make_platform": "hbserve.platform.choice",
        "resolve_device": "hbserve.platform.choice",
        "set_priority": "hbserve.platform.choice",
    },
    __name__,
)
