"""The OpenAI-compatible HTTP API. `hbserve.server.app` shows the path of a request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hbserve.lazy import lazy_attributes
from hbserve.server.serve import serve

if TYPE_CHECKING:
    from hbserve.server.app import create_app

__all__ = ["create_app", "serve"]

__getattr__: Any = lazy_attributes({"create_app": "hbserve.server.app"}, __name__)
