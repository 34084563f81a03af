"""Every key of the configuration with its type, from the fields of the sections: the source of flags and hints; and
errors that name a key.
"""

from __future__ import annotations

import functools
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import msgspec

from hbserve.config.fields import Section
from hbserve.config.sections import Config
from hbserve.errors import ConfigError


@functools.cache
def types_of(section: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the types of a section's fields, by name."""
    return {field.name: field.type for field in msgspec.structs.fields(section)}


def parts_of(kind: Any) -> list[Any]:
    """Return a type with its parts: members of a union, items of a tuple, limits of an annotated type."""
    inner = get_args(kind) if get_origin(kind) is not Literal else ()
    return [kind, *(part for member in inner for part in parts_of(member))]


def section_in(kind: Any) -> type[Section] | None:
    """Return the section that a key holds, if it holds one; it may be optional."""
    is_union = get_origin(kind) in (Union, UnionType)
    for member in get_args(kind) if is_union else (kind,):
        if isinstance(member, type) and issubclass(member, Section):
            return member
    return None


@functools.cache
def all_keys() -> dict[str, Any]:
    """Return the type of every key, by dotted name such as ``server.port``.

    A section within a section, such as ``semi_pd.slo``, is a key, and so are its fields. The list ``gpu_instances`` is
    one key.
    """
    keys: dict[str, Any] = {}

    def add(section: type[msgspec.Struct], prefix: str) -> None:
        for name, kind in types_of(section).items():
            inner = section_in(kind)
            if inner is None or prefix:
                keys[prefix + name] = kind
            if inner is not None:
                add(inner, f"{prefix}{name}.")

    add(Config, "")
    return keys


def error_at(key: str, what: str) -> ConfigError:
    """Return an error that begins with the key that is wrong."""
    return ConfigError(f"{key}: {what}" if key else what, key)
