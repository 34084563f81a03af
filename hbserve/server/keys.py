"""API keys: where they are read from, and the name of each. Logs have names, never keys."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from hbserve.config import ServerConfig
from hbserve.errors import ConfigError

API_KEYS_VARIABLE = "HBSERVE_API_KEYS"
ADMIN_KEY_VARIABLE = "HBSERVE_ADMIN_KEY"


class Keys:
    """The known keys, by their digests.

    Args:
        names: name by key; empty: requests need no key.
        admin: the administrator's key; None: the routes of administration are off.

    Attributes:
        are_required: whether requests need a key.
        has_admin: whether there is an administrator's key.
    """

    def __init__(self, names: Mapping[str, str], admin: str | None) -> None:
        # Keys are looked up by digest: then the time of a look-up tells an attacker nothing about a key.
        self._names = {_digest(key): name for key, name in names.items()}
        self._admin = None if admin is None else _digest(admin)
        self.are_required, self.has_admin = bool(names), admin is not None

    @staticmethod
    def load(config: ServerConfig) -> Keys:
        """Read the configured files and the environment.

        Raises:
            ConfigError: if a file cannot be read or has no key, or a key is invalid.
        """
        lines = os.environ.get(API_KEYS_VARIABLE, "").replace(",", "\n").splitlines()
        if config.api_keys_file is not None:
            lines += _read(config.api_keys_file, "server.api_keys_file")
        names = {}
        for number, line in enumerate(line for line in lines if line.strip() and not line.lstrip().startswith("#")):
            name, _, key = line.strip().rpartition(" ")
            names[_checked(key, f"server.api_keys_file or {API_KEYS_VARIABLE}")] = name.strip() or f"key-{number + 1}"
        if config.api_keys_file is not None and not names:  # an operator who names a file wants no open server
            message = f"server.api_keys_file: there is no key in {config.api_keys_file}"
            raise ConfigError(message, "server.api_keys_file")
        admin, source = os.environ.get(ADMIN_KEY_VARIABLE) or None, ADMIN_KEY_VARIABLE
        if config.admin_key_file is not None:
            source = "server.admin_key_file"
            admin = "".join(_read(config.admin_key_file, source)).strip()
        return Keys(names, None if admin is None else _checked(admin, source))

    def name_of(self, key: str) -> str | None:
        """Return the name of a key: ``admin`` for the administrator's; None if the key is unknown."""
        digest = _digest(key)
        return "admin" if digest == self._admin else self._names.get(digest)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def refuse_public(path: str, key: str) -> None:
    """Refuse a file of a secret that every user of this host may read; a group may, because an operator chose it.

    Raises:
        ConfigError: for such a file, or if there is no file.
    """
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: cannot read {path}: {error}", key) from None
    if mode & stat.S_IRWXO:
        raise ConfigError(f"{key}: every user of this host may read {path}; chmod 600 it", key)


def _read(path: str, key: str) -> list[str]:
    refuse_public(path, key)
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: cannot read {path}: {error}", key) from None


def _checked(key: str, where: str) -> str:
    if len(key) < 8 or not key.isascii() or not key.isprintable():
        raise ConfigError(f"{where}: a key must have 8 or more printable ASCII characters", where)
    return key
