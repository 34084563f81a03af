"""The check of finished JSON documents against their schemas, by another library than the one that made them."""

from __future__ import annotations

import json
from decimal import Decimal
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from hbserve.grammar.bytes import admits, schema_matcher
from hbserve.grammar.matcher import parser_limits
from hbserve.grammar.parts import Schema

if TYPE_CHECKING:
    from llguidance import LLMatcher


def problem_of(schema: Schema | str, document: str) -> str | None:
    """Say why a finished document does not fit its schema; None if it fits.

    Names are matched with patterns by llguidance, because Python's patterns may take for ever. Strings are not matched
    again: the grammar holds their patterns.
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
    """Make a checker that reaches no other host, and leaves patterns to llguidance."""
    import jsonschema
    from referencing import Registry

    cls = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return _extended(cls)(schema, registry=Registry())


@cache
def _extended(cls: Any) -> Any:
    import jsonschema

    def not_checked(*_: Any) -> None:
        return None

    def by_pattern(validator: Any, patterns: Any, instance: Any, schema: dict[str, Any]) -> Any:
        for pattern, part in patterns.items() if validator.is_type(instance, "object") else ():
            for name, value in instance.items():
                if _matches(pattern, name):
                    yield from validator.descend(value, part, path=name, schema_path=pattern)

    def additional(validator: Any, others: Any, instance: Any, schema: dict[str, Any]) -> Any:
        if not validator.is_type(instance, "object"):
            return
        patterns = schema.get("patternProperties", {})
        for name, value in instance.items():
            if name in schema.get("properties", {}) or any(_matches(pattern, name) for pattern in patterns):
                continue
            yield from validator.descend(value, others, path=name)

    def multiple(validator: Any, value: Any, instance: Any, schema: dict[str, Any]) -> Any:
        if validator.is_type(instance, "number") and Decimal(instance) % Decimal(value):
            yield jsonschema.ValidationError(f"{instance} is not a multiple of {value}")

    changed = {"pattern": not_checked, "patternProperties": by_pattern, "additionalProperties": additional}
    return jsonschema.validators.extend(cls, {**changed, "multipleOf": multiple})


def _matches(pattern: str, name: str) -> bool:
    """Return whether a name fits a pattern, as the grammar reads it; False if it cannot be read."""
    return admits(_pattern_matcher(pattern), json.dumps(name, ensure_ascii=False))


@lru_cache(maxsize=1000)
def _pattern_matcher(pattern: str) -> LLMatcher:
    return schema_matcher({"type": "string", "pattern": pattern}, parser_limits())
