"""The address of a running server, as commands get it by ``--url``."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from hbserve.errors import ConfigError
from hbserve.hints import shown


def server_url(text: str) -> SplitResult:
    """Return the parts of an address such as ``http://127.0.0.1:8000``, which may have a path.

    Raises:
        ConfigError: it is none.
    """
    try:
        parts = urlsplit(text.rstrip("/"))
        is_address = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except ValueError:  # a port that is no number, or too large; half of an IPv6 address
        is_address = False
    if not is_address:
        raise ConfigError(f"--url must be an address such as http://127.0.0.1:8000, got {shown(text)}")
    return parts
