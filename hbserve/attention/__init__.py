"""Attention over the paged KV cache."""

from __future__ import annotations

import torch

from hbserve.attention.base import AttentionBackend, AttentionBatch
from hbserve.attention.flash_attn import FlashAttnBackend
from hbserve.attention.flashinfer import FlashInferBackend
from hbserve.attention.sdpa import SdpaBackend
from hbserve.attention.triton_paged import TritonBackend
from hbserve.errors import ConfigError
from hbserve.hints import nearest
from hbserve.model_spec import ModelSpec
from hbserve.platform import Platform

__all__ = ["AttentionBackend", "AttentionBatch", "select_attention_backend"]

_ORDER: tuple[type[AttentionBackend], ...] = (FlashInferBackend, FlashAttnBackend, TritonBackend, SdpaBackend)
_BACKENDS = {backend.name: backend for backend in _ORDER}
"""Backends in the order in which ``auto`` tries them."""


def select_attention_backend(
    name: str, spec: ModelSpec, dtype: torch.dtype, platform: Platform
) -> type[AttentionBackend]:
    """Return the backend of that name; for ``auto``, the first one that supports the model and the device.

    Raises:
        ConfigError: no backend has that name, or it cannot serve the model there; the text gives the reason.
    """
    key = "model.attention_backend"
    if name != "auto":
        if name not in _BACKENDS:
            raise ConfigError(f"{key}: no backend {name!r}{nearest(name, [*_BACKENDS, 'auto'])}")
        reason = _BACKENDS[name].supports(spec, dtype, platform)
        if reason is not None:
            raise ConfigError(f"{key}: {name} {reason}")
        return _BACKENDS[name]
    reasons = {candidate: backend.supports(spec, dtype, platform) for candidate, backend in _BACKENDS.items()}
    for candidate, reason in reasons.items():
        if reason is None:
            return _BACKENDS[candidate]
    listed = "; ".join(f"{candidate} {reason}" for candidate, reason in reasons.items())
    raise ConfigError(f"{key}: no backend supports this model on {platform.name}: {listed}")
