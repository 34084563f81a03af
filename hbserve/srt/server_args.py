"""Arguments of a server, under the names of SGLang."""

from __future__ import annotations

from dataclasses import dataclass

from hbserve.config.flat import PdDisaggConfig

__all__ = ["SemiPDPortArgs", "ServerArgs"]

ServerArgs = PdDisaggConfig


@dataclass
class SemiPDPortArgs:
    """Address of the HTTP server, which replaces that of the configuration; None: the configuration's.

    The processes of an instance have no ports: they find each other by private sockets.
    """

    host: str | None = None
    port: int | None = None
