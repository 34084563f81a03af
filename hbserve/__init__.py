"""HBServe: LLM serving with prefill and decode as separate workers under one CPU scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hbserve.lazy import lazy_attributes

if TYPE_CHECKING:
    from hbserve.config import Config
    from hbserve.config.flat import KVTransferBackend, PdDisaggConfig
    from hbserve.sampling_params import SamplingParams
    from hbserve.system.disaggregated_llm import DisaggregatedLLM
    from hbserve.system.llm import LLM

__version__ = "0.2.0.dev0"
"""The one source of the version: of packages, ``/version`` and ``hbserve version``. CONTRIBUTING.md has the rules."""
__all__ = ["LLM", "Config", "DisaggregatedLLM", "KVTransferBackend", "PdDisaggConfig", "SamplingParams"]

__getattr__: Any = lazy_attributes(
    {
        "LLM": "hbserve.system.llm",
        "Config": "hbserve.config",
        "DisaggregatedLLM": "hbserve.system.disaggregated_llm",
        "KVTransferBackend": "hbserve.config.flat",
        "PdDisaggConfig": "hbserve.config.flat",
        "SamplingParams": "hbserve.sampling_params",
    },
    __name__,
)
