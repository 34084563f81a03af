"""The only room that knows which device there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hbserve.lazy import lazy_attributes

if TYPE_CHECKING:
    from hbserve.platform.base import Partition, Platform, SharedArena
    from hbserve.platform.choice import enter_partition, make_platform, partition_environment, resolve_device

__all__ = [
    "Partition",
    "Platform",
    "SharedArena",
    "enter_partition",
    "make_platform",
    "partition_environment",
    "resolve_device",
]

# Launchers look after MPS without importing torch.
__getattr__: Any = lazy_attributes(
    {
        "Partition": "hbserve.platform.base",
        "Platform": "hbserve.platform.base",
        "SharedArena": "hbserve.platform.base",
        "enter_partition": "hbserve.platform.choice",
        "make_platform": "hbserve.platform.choice",
        "partition_environment": "hbserve.platform.choice",
        "resolve_device": "hbserve.platform.choice",
    },
    __name__,
)
