"""Parts of a JSON schema: where other schemas are in it, and what its references point to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hbserve.errors import InvalidRequestError

Schema = dict[str, Any] | bool

OF_SCHEMAS = {"properties", "patternProperties", "$defs", "definitions"}
LISTS_OF_SCHEMAS = {"allOf", "anyOf", "oneOf", "prefixItems", "items"}
SCHEMAS = {"items", "additionalProperties", "additionalItems"}


def children(schema: dict[str, Any]) -> Iterator[Any]:
    """Iterate over the schemas directly within a schema."""
    for key, value in schema.items():
        if key in OF_SCHEMAS and isinstance(value, dict):
            yield from value.values()
        elif key in LISTS_OF_SCHEMAS and isinstance(value, list):
            yield from value
        elif key in SCHEMAS:
            yield value


def list_of(schema: dict[str, Any], key: str) -> list[Any]:
    """Return the list under a key; an empty one if there is no list."""
    value = schema.get(key)
    return value if isinstance(value, list) else []


def references(value: Any) -> Iterator[str]:
    """Iterate over the references anywhere in a schema."""
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for one in value.values():
            yield from references(one)
    elif isinstance(value, list):
        for one in value:
            yield from references(one)


def target(root: dict[str, Any], reference: str) -> Any:
    """Return what a reference points to; True for one that is no path in this document: llguidance decides on it."""
    path, _, fragment = reference.partition("#")
    if path or (fragment and not fragment.startswith("/")):
        return True
    value: Any = root
    for part in fragment.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return True
    return value


def refusal(reason: str) -> InvalidRequestError:
    """Return the error of a schema that cannot be followed."""
    return InvalidRequestError(f"the JSON schema cannot be followed: {reason}", "grammar")
