"""``oneOf`` in JSON schemas: it is ``anyOf`` where each document fits one choice at most."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from typing import Any

from hbserve.grammar.parts import children, list_of, target

_MAX_CHOICES = 100
_MAX_DEPTH = 16  # of references to references, and of properties that tell choices apart


def with_choices(root: dict[str, Any]) -> dict[str, Any]:
    """Return a schema with ``anyOf`` in place of each ``oneOf`` whose choices are told apart.

    Two choices are told apart by their types, by their constants, or by a property of both whose choices are told
    apart. A document must then have that property, also where the schema has a default for it: pydantic writes the
    discriminator of a union so. llguidance decides on the ``oneOf`` that are left.
    """
    if not any("oneOf" in schema for schema in _schemas(root)):
        return root
    root = copy.deepcopy(root)
    for schema in list(_schemas(root)):
        if isinstance(schema.get("oneOf"), list):
            _convert(schema, root)
    return root


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        for child in children(schema):
            yield from _schemas(child)


def _convert(schema: dict[str, Any], root: dict[str, Any]) -> None:
    schema.pop("discriminator", None)  # it would have llguidance believe that choices are told apart
    choices = [choice for choice in schema["oneOf"] if choice is not False]
    if len(choices) > _MAX_CHOICES:
        return
    whole = [_resolved(choice, root) for choice in choices]
    pairs = {
        (first, second): _difference(whole[first], whole[second], root)
        for first, second in itertools.combinations(range(len(choices)), 2)
    }
    if None in pairs.values():
        return
    for pair, name in pairs.items():
        for number in pair if name else ():
            required = list_of(whole[number], "required")
            if name not in required:
                whole[number]["required"] = [*required, name]
    del schema["oneOf"]
    if "anyOf" in schema:
        schema["allOf"] = [*list_of(schema, "allOf"), {"anyOf": choices}]
    else:
        schema["anyOf"] = choices


def _resolved(schema: Any, root: dict[str, Any]) -> Any:
    """Return what a reference points to, if the schema is one and says nothing else of the document."""
    for _ in range(_MAX_DEPTH):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str) or set(schema) - {"$ref", "title", "description", "default", "examples"}:
            break
        schema = target(root, reference)
    return schema


def _difference(first: Any, second: Any, root: dict[str, Any], depth: int = 0) -> str | None:
    """Return the property that tells two schemas apart; "" if none is needed, None if nothing does."""
    first, second = _resolved(first, root), _resolved(second, root)
    if not isinstance(first, dict) or not isinstance(second, dict) or depth > _MAX_DEPTH:
        return None
    kinds, others = _kinds(first), _kinds(second)
    if kinds is not None and others is not None and not kinds & others:
        return ""
    values, other_values = _values(first), _values(second)
    if values is not None and other_values is not None and not values & other_values:
        return ""
    if kinds != {"object"} or others != {"object"} or values is not None or other_values is not None:
        return None
    properties, other_properties = first.get("properties"), second.get("properties")
    if not isinstance(properties, dict) or not isinstance(other_properties, dict):
        return None
    common = [name for name in properties if name in other_properties]
    return next((n for n in common if _difference(properties[n], other_properties[n], root, depth + 1) == ""), None)


def _kinds(schema: dict[str, Any]) -> set[str] | None:
    """Return the types of a schema's documents, with ``number`` for integers too; None for any."""
    kinds = schema.get("type")
    if kinds is None:
        values = _constants(schema)
        return None if values is None else {_kind(value) for value in values}
    listed = kinds if isinstance(kinds, list) else [kinds]
    return {"number" if kind == "integer" else str(kind) for kind in listed}


def _kind(value: Any) -> str:
    for kind, name in ((bool, "boolean"), (str, "string"), (int | float, "number"), (list, "array"), (dict, "object")):
        if isinstance(value, kind):
            return name
    return "null"


def _constants(schema: dict[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _values(schema: dict[str, Any]) -> set[str] | None:
    """Return a schema's constants, each as a text that equal values share; None if it has other documents."""
    constants = _constants(schema)
    return None if constants is None else {json.dumps(_normal(value), sort_keys=True) for value in constants}


def _normal(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _normal(one) for key, one in value.items()}
    return [_normal(one) for one in value] if isinstance(value, list) else value
