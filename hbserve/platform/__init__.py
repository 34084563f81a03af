"""The only room that knows which device there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hbserve.lazy import lazy_attributes

if TYPE_CHECKING:
    from hbserve.platform.base import Platform, SharedArena
    from hbserve.platform.choice import make_platform, resolve_device, set_priority
    from hbserve.platform.partition import Partition

__all__ = [
    "Partition",
    "Platform",
    "SharedArena",
    "make_platform",
    "resolve_device",
    "set_priority",
]

# Launchers look after MPS without importing torch.
__getattr__: Any = lazy_attributes(
    {
        "Partition": "hbserve.platform.partition",
        "Platform": "hbserve.platform.base",
        "SharedArena": "hbserve.platform.base",
        "make_platform": "hbserve.platform.choice",
        "resolve_device": "hbserve.platform.choice",
        "set_priority": "hbserve.platform.choice",
    },
    __name__,
)
