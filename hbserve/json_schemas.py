"""JSON schemas as grammars: changes that let a model finish every document, and the check of finished documents.

llguidance follows most of JSON Schema 2020-12 and refuses by name what it cannot follow. `followable` removes what is
left: the places from which no document can be finished, and the bounds that llguidance does not hold. `problem_of`
checks a finished document again, by another library.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from hbserve.errors import InvalidRequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

Schema = dict[str, Any] | bool
NUM_BYTES = 256

_OF_SCHEMAS = {"properties", "patternProperties", "$defs", "definitions"}
_LISTS_OF_SCHEMAS = {"allOf", "anyOf", "oneOf", "prefixItems", "items"}
_SCHEMAS = {"items", "additionalProperties", "additionalItems"}
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_MAX_REFERENCES = 1000
_STEP = Decimal("1e-6")


def followable(schema: Schema) -> Schema:
    """Return a schema of the same documents from which a model can finish each document that it begins.

    - ``format`` is an annotation: values that llguidance does not know are left out.
    - Properties, items and choices that would never end, such as a node that requires a node, are forbidden.
    - Patterns of names that match nothing but declared names are left out.
    - An exclusive bound of numbers that llguidance does not hold becomes an inclusive one, 0.000001 further in.

    Raises:
        InvalidRequestError: if the schema has no finite document, or has a bound that cannot be held.
    """
    if not isinstance(schema, dict):
        return schema
    try:
        finite = _Finiteness(schema)
        if not finite.holds(schema):
            raise _refusal("it has no finite document: what it requires contains itself, or is forbidden")
        return _rewritten(schema, finite)
    except RecursionError:
        raise _refusal("it is nested too deeply") from None


def _rewritten(schema: dict[str, Any], finite: _Finiteness) -> dict[str, Any]:
    def child(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return _rewritten(value, finite) if finite.holds(value) else False

    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "format" and not (isinstance(value, str) and _is_known_format(value)):
            continue
        if key in _OF_SCHEMAS and isinstance(value, dict):
            value = {name: child(one) for name, one in value.items()}
        elif key in _LISTS_OF_SCHEMAS and isinstance(value, list):
            value = [child(one) for one in value]
        elif key in _SCHEMAS:
            value = child(value)
        result[key] = value
    if isinstance(result.get("patternProperties"), dict) and _patterns_are_dead(result):
        del result["patternProperties"]
    return _with_held_bounds(result)


class _Finiteness:
    """The schemas of a document that have a finite document.

    A schema whose ``required`` leads back to itself has none. References are decided by the least fixed point: none
    is finite until what it points to is.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._finite: set[str] = set()
        targets = [(reference, _target(root, reference)) for reference in {*_references(root)}]
        if len(targets) > _MAX_REFERENCES:  # would take too long to decide
            self._finite |= {reference for reference, _ in targets}
        while True:
            open_targets = [item for item in reversed(targets) if item[0] not in self._finite]
            self._finite |= {reference for reference, target in open_targets if self.holds(target)}
            if len(targets := [item for item in open_targets if item[0] not in self._finite]) == len(open_targets):
                return

    def holds(self, schema: Any) -> bool:
        """Return whether a schema has a finite document, as far as objects, arrays and choices decide that."""
        if not isinstance(schema, dict):
            return schema is not False
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in self._finite:
            return False
        if not all(self.holds(part) for part in _list(schema, "allOf")):
            return False
        for key in ("anyOf", "oneOf"):
            choices = _list(schema, key)
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
            required = [name for name in _list(schema, "required") if isinstance(name, str)]
            return all(self.holds(properties.get(name, others)) for name in required)
        if kind == "array":
            least = schema.get("minItems", 0)
            first = _list(schema, "prefixItems")
            others = schema.get("items", True)
            if isinstance(others, list):  # before 2020-12
                first, others = others, schema.get("additionalItems", True)
            if not isinstance(least, int | float) or least <= 0:
                return True
            return all(self.holds(item) for item in first[: int(least)]) and (least <= len(first) or self.holds(others))
        return True


def _list(schema: dict[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for one in value.values():
            yield from _references(one)
    elif isinstance(value, list):
        for one in value:
            yield from _references(one)


def _target(root: dict[str, Any], reference: str) -> Any:
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


# --- what llguidance does with a part of a schema ---------------------------------------------------------------------


@lru_cache(maxsize=1000)
def _is_known_format(name: str) -> bool:
    return "Unknown format" not in _matcher({"type": "string", "format": name}).get_error()


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
    matcher = _matcher(skeleton)
    if not matcher.consume_tokens(list(("{" + json.dumps(names[-1], ensure_ascii=False) + ":1,").encode())):
        return False  # llguidance refuses the schema, and says why
    matcher.compute_bitmask()
    return matcher.is_stopped()


def _with_held_bounds(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema, with exclusive bounds that llguidance does not hold replaced by inclusive ones."""
    kinds = schema.get("type", "number")
    if not ("exclusiveMinimum" in schema or "exclusiveMaximum" in schema) or "number" not in (
        kinds if isinstance(kinds, list) else [kinds]
    ):
        return schema
    bounds = {key: schema[key] for key in _BOUNDS if key in schema}
    if not all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in bounds.values()):
        return schema
    if _holds(bounds):
        return schema
    width = abs(Decimal(str(_high(bounds))) - Decimal(str(_low(bounds))))
    step = min(_STEP, width / 1000)
    narrow = dict(bounds)
    if "exclusiveMinimum" in narrow:
        del narrow["exclusiveMinimum"]
        narrow["minimum"] = float(Decimal(str(_low(bounds))) + step)
    if "exclusiveMaximum" in narrow:
        del narrow["exclusiveMaximum"]
        narrow["maximum"] = float(Decimal(str(_high(bounds))) - step)
    if not _holds(narrow):
        names = " and ".join(key for key in bounds if key.startswith("exclusive"))
        raise _refusal(f"{names} cannot be held here: {json.dumps(bounds)}; use minimum and maximum")
    return {key: value for key, value in schema.items() if key not in _BOUNDS} | narrow


def _low(bounds: dict[str, float]) -> float:
    return max((bounds[key] for key in ("minimum", "exclusiveMinimum") if key in bounds), default=-1e9)


def _high(bounds: dict[str, float]) -> float:
    return min((bounds[key] for key in ("maximum", "exclusiveMaximum") if key in bounds), default=1e9)


def _holds(bounds: dict[str, float]) -> bool:
    """Return whether llguidance allows no number at or near a bound that is out of bounds."""
    return _holds_bounds(tuple(sorted(bounds.items())))


@lru_cache(maxsize=1000)
def _holds_bounds(items: tuple[tuple[str, float], ...]) -> bool:
    bounds = dict(items)
    matcher = _matcher({"type": "number", **bounds})
    if matcher.is_error():
        return True  # it is refused with llguidance's reason
    for text in _numbers_near([0.0, *bounds.values()]):
        number = Decimal(text)
        is_within = (
            number >= Decimal(str(bounds.get("minimum", number)))
            and number <= Decimal(str(bounds.get("maximum", number)))
            and ("exclusiveMinimum" not in bounds or number > Decimal(str(bounds["exclusiveMinimum"])))
            and ("exclusiveMaximum" not in bounds or number < Decimal(str(bounds["exclusiveMaximum"])))
        )
        if not is_within:
            probe = matcher.deep_copy()
            if probe.consume_tokens(list(text.encode())) and probe.is_accepting():
                return False
    return True


def _numbers_near(values: list[float]) -> Iterator[str]:
    for value in values:
        plain = format(abs(Decimal(str(value))), "f")
        whole, _, fraction = plain.partition(".")
        texts = {plain, whole, f"{whole}.{fraction}0", f"{whole}.0", f"{whole}.{fraction}1", f"{int(whole) + 1}"}
        for text in texts:
            yield text
            yield f"-{text}"


@cache
def _bytes() -> LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def byte_matcher(grammar: str, limits: LLParserLimits | None = None) -> LLMatcher:
    """Make a matcher whose tokens are the bytes; token ids from `NUM_BYTES` on are marks."""
    from llguidance import LLMatcher

    return LLMatcher(_bytes(), grammar, log_level=0, limits=limits)


def _matcher(schema: dict[str, Any]) -> LLMatcher:
    """Make a matcher of bytes for a schema's documents without white space."""
    from llguidance import LLMatcher

    overrides: Any = {"whitespace_flexible": False}
    return byte_matcher(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=overrides))


# --- finished documents -----------------------------------------------------------------------------------------------


def problem_of(schema: Schema | str, document: str) -> str | None:
    """Say why a finished document does not fit its schema; None if it fits.

    Names and strings are not matched with patterns again: the grammar holds these, and a pattern may take for ever.
    """
    try:
        schema_value = json.loads(schema if isinstance(schema, str) else json.dumps(schema), parse_float=Decimal)
        value = json.loads(document, parse_float=Decimal, strict=False)
    except (ValueError, RecursionError) as error:
        return None if isinstance(error, RecursionError) else f"the output is no JSON document: {error}"
    if not isinstance(schema_value, dict):
        return None
    try:
        first = next(_checker(schema_value).iter_errors(value), None)
    except Exception:  # the checker cannot read this schema; the grammar has held it
        return None
    if first is None:
        return None
    where = "".join(f"[{json.dumps(part)}]" for part in first.absolute_path)
    return f"the output does not fit its schema: {first.validator} at ${where}"


def _checker(schema: dict[str, Any]) -> Any:
    """Make a checker that reaches no other host and matches no pattern."""
    import jsonschema
    from referencing import Registry

    cls = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return _extended(cls)(schema, registry=Registry())


@cache
def _extended(cls: Any) -> Any:
    import jsonschema

    def not_checked(*_: Any) -> None:
        return None

    others = cls.VALIDATORS["additionalProperties"]

    def additional(validator: Any, value: Any, instance: Any, schema: dict[str, Any]) -> Any:
        return None if "patternProperties" in schema else others(validator, value, instance, schema)

    def multiple(validator: Any, value: Any, instance: Any, schema: dict[str, Any]) -> Any:
        if validator.is_type(instance, "number") and Decimal(instance) % Decimal(value):
            yield jsonschema.ValidationError(f"{instance} is not a multiple of {value}")

    changed = {"pattern": not_checked, "patternProperties": not_checked, "additionalProperties": additional}
    return jsonschema.validators.extend(cls, {**changed, "multipleOf": multiple})


def _refusal(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"the JSON schema cannot be followed: {reason}", "grammar")
