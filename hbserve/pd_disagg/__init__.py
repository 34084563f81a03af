"""Prefill and decode on separate instances under one CPU scheduler.

The public names are found here, wherever they live: a whole system is put together in `hbserve.system`,
above this room, and no module of this room imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hbserve.lazy import lazy_attributes

if TYPE_CHECKING:
    from hbserve.config.flat import KVTransferBackend, PdDisaggConfig
    from hbserve.system.disaggregated_llm import DisaggregatedLLM
    from hbserve.system.llm import LLM

__all__ = ["LLM", "DisaggregatedLLM", "KVTransferBackend", "PdDisaggConfig"]

__getattr__: Any = lazy_attributes(
    {
        "LLM": "hbserve.system.llm",
        "DisaggregatedLLM": "hbserve.system.disaggregated_llm",
        "KVTransferBackend": "hbserve.config.flat",
        "PdDisaggConfig": "hbserve.config.flat",
    },
    __name__,
)
