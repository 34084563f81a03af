"""The OpenAI-compatible HTTP API."""

from hbserve.server.app import create_app
from hbserve.server.serve import serve

__all__ = ["create_app", "serve"]
