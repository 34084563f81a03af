"""Prefill and decode as workers that share one device, its weights and its KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hbserve.lazy import lazy_attributes

if TYPE_CHECKING:
    from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager
    from hbserve.semi_pd.resident_process_manager import ResidentProcessManager
    from hbserve.slo.constraints import SMAllocation

__all__ = ["ProcessRotationManager", "ResidentProcessManager", "SMAllocation"]

__getattr__: Any = lazy_attributes(
    {
        "ProcessRotationManager": "hbserve.semi_pd.process_rotation_manager",
        "ResidentProcessManager": "hbserve.semi_pd.resident_process_manager",
        "SMAllocation": "hbserve.slo.constraints",
    },
    __name__,
)
