"""Prefill and decode on separate instances under one CPU scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hbserve.lazy import lazy_attributes

if TYPE_CHECKING:
    from hbserve.pd_disagg.config import KVTransferBackend, PdDisaggConfig
    from hbserve.pd_disagg.disaggregated_llm import DisaggregatedLLM
    from hbserve.pd_disagg.llm import LLM

__all__ = ["LLM", "DisaggregatedLLM", "KVTransferBackend", "PdDisaggConfig"]

__getattr__: Any = lazy_attributes(
    {
        "LLM": "hbserve.pd_disagg.llm",
        "DisaggregatedLLM": "hbserve.pd_disagg.disaggregated_llm",
        "KVTransferBackend": "hbserve.pd_disagg.config",
        "PdDisaggConfig": "hbserve.pd_disagg.config",
    },
    __name__,
)
