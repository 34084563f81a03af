"""The OpenAI-compatible HTTP API. `hbserve.server.app` shows the path of a request."""

from hbserve.server.app import create_app
from hbserve.server.serve import serve

__all__ = ["create_app", "serve"]
