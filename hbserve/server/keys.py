"""API keys: where they come from, and who a request is from. Keys are never logged; their names are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from hbserve.config import ServerConfig
from hbserve.errors import ConfigError

API_KEYS_VARIABLE = "HBSERVE_API_KEYS"
ADMIN_KEY_VARIABLE = "HBSERVE_ADMIN_KEY"


class Keys:
    """Known keys by their digests.

    Args:
        users: key to name; empty: no key is asked for.
        admin: the key for administration; None: nobody may administrate.
    """

    def __init__(self, users: Mapping[str, str], admin: str | None) -> None:
        # Found by digest: how long a look-up takes says nothing about a key.
        self._names = {_digest(key): name for key, name in users.items()}
        self._admin = None if admin is None else _digest(admin)

    @staticmethod
    def load(config: ServerConfig) -> Keys:
        """From the configured files and the environment.

        Raises:
            ConfigError: naming the file that cannot be read or is without keys, or the key that is not one.
        """
        lines = os.environ.get(API_KEYS_VARIABLE, "").replace(",", "\n").splitlines()
        if config.api_keys_file is not None:
            lines += _read(config.api_keys_file, "server.api_keys_file")
        users = {}
        for number, line in enumerate(line for line in lines if line.strip() and not line.lstrip().startswith("#")):
            name, _, key = line.strip().rpartition(" ")
            users[_checked(key, f"server.api_keys_file or {API_KEYS_VARIABLE}")] = name.strip() or f"key-{number + 1}"
        if config.api_keys_file is not None and not users:  # who names a file does not want an open server
            raise ConfigError(
                f"server.api_keys_file: there is no key in {config.api_keys_file}", "server.api_keys_file"
            )
        admin, source = os.environ.get(ADMIN_KEY_VARIABLE) or None, ADMIN_KEY_VARIABLE
        if config.admin_key_file is not None:
            source = "server.admin_key_file"
            admin = "".join(_read(config.admin_key_file, source)).strip()
        return Keys(users, None if admin is None else _checked(admin, source))

    @property
    def are_asked_for(self) -> bool:
        """Whether a request needs a key."""
        return bool(self._names)

    @property
    def has_admin(self) -> bool:
        """Whether there is a key for administration."""
        return self._admin is not None

    def name_of(self, key: str) -> str | None:
        """Who this key belongs to, ``admin`` for the admin key; None: nobody."""
        digest = _digest(key)
        return "admin" if digest == self._admin else self._names.get(digest)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _read(path: str, key: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: cannot read {path}: {error}", key) from None


def _checked(key: str, where: str) -> str:
    if len(key) < 8 or not key.isascii() or not key.isprintable():
        raise ConfigError(f"{where}: a key must have 8 or more printable ASCII characters", where)
    return key
