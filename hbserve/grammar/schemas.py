"""JSON schemas as grammars: changes that let a model finish every document that it begins.

llguidance follows most of JSON Schema 2020-12 and refuses by name what it cannot follow. `followable` removes what is
left: the places from which no document can be finished, and what llguidance does not hold.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from hbserve.grammar.bounds import HeldBounds
from hbserve.grammar.bytes import schema_matcher
from hbserve.grammar.choices import with_choices
from hbserve.grammar.parts import (
    LISTS_OF_SCHEMAS,
    OF_SCHEMAS,
    SCHEMAS,
    Schema,
    list_of,
    references,
    refusal,
    target,
)

_MAX_REFERENCES = 1000


def followable(schema: Schema) -> Schema:
    """Return a schema of the same documents from which a model can finish each document that it begins.

    - ``format`` is an annotation: values that llguidance does not know are left out.
    - Properties, items and choices that would never end, such as a node that requires a node, are forbidden.
    - Patterns of names that match nothing but declared names are left out.
    - An exclusive bound of numbers that llguidance does not hold becomes an inclusive one, 0.000001 further in.
    - ``oneOf`` is ``anyOf``, if each document fits one choice at most.

    Raises:
        InvalidRequestError: if the schema has no finite document, or has a bound that cannot be held.
    """
    if not isinstance(schema, dict):
        return schema
    try:
        schema = with_choices(schema)
        finite = _Finiteness(schema)
        if not finite.holds(schema):
            raise refusal("it has no finite document: what it requires contains itself, or is forbidden")
        return _rewritten(schema, finite, HeldBounds(schema))
    except RecursionError:
        raise refusal("it is nested too deeply") from None


def _rewritten(schema: dict[str, Any], finite: _Finiteness, bounds: HeldBounds) -> dict[str, Any]:
    def child(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return _rewritten(value, finite, bounds) if finite.holds(value) else False

    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "format" and not (isinstance(value, str) and _is_known_format(value)):
            continue
        if key in OF_SCHEMAS and isinstance(value, dict):
            value = {name: child(one) for name, one in value.items()}
        elif key in LISTS_OF_SCHEMAS and isinstance(value, list):
            value = [child(one) for one in value]
        elif key in SCHEMAS:
            value = child(value)
        result[key] = value
    if isinstance(result.get("patternProperties"), dict) and _patterns_are_dead(result):
        del result["patternProperties"]
    return bounds.hold(result)


class _Finiteness:
    """The schemas of a document that have a finite document.

    A schema whose ``required`` leads back to itself has none. References are decided by the least fixed point: none
    is finite until what it points to is.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._finite: set[str] = set()
        targets = [(reference, target(root, reference)) for reference in {*references(root)}]
        if len(targets) > _MAX_REFERENCES:  # would take too long to decide
            self._finite |= {reference for reference, _ in targets}
        while True:
            open_targets = [item for item in reversed(targets) if item[0] not in self._finite]
            self._finite |= {reference for reference, pointed in open_targets if self.holds(pointed)}
            if len(targets := [item for item in open_targets if item[0] not in self._finite]) == len(open_targets):
                return

    def holds(self, schema: Any) -> bool:
        """Return whether a schema has a finite document, as far as objects, arrays and choices decide that."""
        if not isinstance(schema, dict):
            return schema is not False
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in self._finite:
            return False
        if not all(self.holds(part) for part in list_of(schema, "allOf")):
            return False
        for key in ("anyOf", "oneOf"):
            choices = list_of(schema, key)
            if choices and not any(self.holds(choice) for choice in choices):
                return False
        if "enum" in schema or "const" in schema or "type" not in schema:
            return True
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        return any(self._kind_holds(schema, kind) for kind in kinds) or not kinds

    def _kind_holds(self, schema: dict[str, Any], kind: Any) -> bool:
        if kind == "object":
            properties = schema.get("properties")
            properties = properties if isinstance(properties, dict) else {}
            others = True if "patternProperties" in schema else schema.get("additionalProperties", True)
            required = [name for name in list_of(schema, "required") if isinstance(name, str)]
            return all(self.holds(properties.get(name, others)) for name in required)
        if kind == "array":
            least = schema.get("minItems", 0)
            first = list_of(schema, "prefixItems")
            others = schema.get("items", True)
            if isinstance(others, list):  # before 2020-12
                first, others = others, schema.get("additionalItems", True)
            if not isinstance(least, int | float) or least <= 0:
                return True
            return all(self.holds(item) for item in first[: int(least)]) and (least <= len(first) or self.holds(others))
        return True


# --- what llguidance does with a part of a schema ---------------------------------------------------------------------


@lru_cache(maxsize=1000)
def _is_known_format(name: str) -> bool:
    return "Unknown format" not in schema_matcher({"type": "string", "format": name}).get_error()


def _patterns_are_dead(schema: dict[str, Any]) -> bool:
    """Return whether no name is left for ``patternProperties`` beside the declared ones.

    llguidance then allows a comma after the last declared name, and no token after that comma.
    """
    properties, patterns = schema.get("properties"), schema["patternProperties"]
    others = schema.get("additionalProperties", True)
    if others is not False or not isinstance(properties, dict) or not properties:
        return False
    names = list(properties)
    skeleton = {
        "type": "object",
        "properties": {name: {"const": 1} for name in names},
        "patternProperties": {
            pattern: False if value is False else {"const": 1} for pattern, value in patterns.items()
        },
        "additionalProperties": False,
    }
    matcher = schema_matcher(skeleton)
    if not matcher.consume_tokens(list(("{" + json.dumps(names[-1], ensure_ascii=False) + ":1,").encode())):
        return False  # llguidance refuses the schema, and says why
    matcher.compute_bitmask()
    return matcher.is_stopped()
