"""Bounds of numbers in JSON schemas: those that llguidance does not hold become narrower, or are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any

from hbserve.grammar.bytes import admits, schema_matcher
from hbserve.grammar.parts import list_of, refusal, target

_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_LOWER = ("minimum", "exclusiveMinimum")
_SPREADING = ("allOf", "anyOf", "oneOf", "$ref")
_STEP = Decimal("1e-6")
_MAX_CASES = 64

Bounds = dict[str, float]


@dataclass(frozen=True)
class _Case:
    """Bounds that a number has to keep in one combination of choices, and in how many places they are written."""

    bounds: Bounds
    num_places: int


_Cases = list[_Case | None]
"""None: no number with a fraction fits this combination."""


class HeldBounds:
    """The bounds of numbers in a schema, which may be spread over ``allOf``, ``anyOf`` and references.

    Args:
        root: the whole schema.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._cases_of: dict[str, _Cases] = {}  # by reference

    def hold(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Return a part, with exclusive bounds that llguidance does not hold replaced by inclusive ones.

        Raises:
            InvalidRequestError: if bounds cannot be held.
        """
        own = _own_bounds(schema)
        if own and _admits_fractions(schema) and not _holds(own):
            schema = {key: value for key, value in schema.items() if key not in _BOUNDS} | _narrowed(own)
        if not any(key in schema for key in _SPREADING):
            return schema
        cases = [case for case in self._cases(schema) if case is not None]
        not_held = [case.bounds for case in cases if case.num_places > 1 and not _holds(case.bounds)]
        if not not_held:
            return schema
        if len(cases) > 1:
            names = " and ".join(sorted({key for bounds in not_held for key in bounds if key.startswith("exclusive")}))
            raise refusal(f"{names} cannot be held where bounds are spread over choices; write them into its choices")
        return schema | {"allOf": [*list_of(schema, "allOf"), _narrowed(not_held[0])]}

    def _cases(self, schema: Any) -> _Cases:
        if not isinstance(schema, dict):
            return [None] if schema is False else [_Case({}, 0)]
        if not _admits_fractions(schema):
            return [None]
        own = _own_bounds(schema)
        cases: _Cases = [_Case(own, 1 if own else 0)]
        for part in list_of(schema, "allOf"):
            cases = _joined(cases, self._cases(part))
        if isinstance(schema.get("$ref"), str):
            cases = _joined(cases, self._cases_at(schema["$ref"]))
        for key in ("anyOf", "oneOf"):
            if choices := list_of(schema, key):
                cases = _joined(cases, [case for choice in choices for case in self._cases(choice)])
        return cases

    def _cases_at(self, reference: str) -> _Cases:
        if reference not in self._cases_of:
            self._cases_of[reference] = [_Case({}, 0)]  # of a reference that leads back to itself
            self._cases_of[reference] = self._cases(target(self._root, reference))
        return self._cases_of[reference]


def _joined(cases: _Cases, others: _Cases) -> _Cases:
    joined: _Cases = []
    for case in cases:
        for other in others:
            one = None
            if case is not None and other is not None:
                one = _Case(_tightest(case.bounds, other.bounds), case.num_places + other.num_places)
            if one not in joined:
                joined.append(one)
    if len(joined) <= _MAX_CASES:
        return joined
    if any(key.startswith("exclusive") for case in joined if case is not None for key in case.bounds):
        raise refusal("bounds of a number are spread over too many choices")
    return [_Case({}, 0)]


def _tightest(bounds: Bounds, others: Bounds) -> Bounds:
    return bounds | {
        key: max(value, bounds.get(key, value)) if key in _LOWER else min(value, bounds.get(key, value))
        for key, value in others.items()
    }


def _own_bounds(schema: dict[str, Any]) -> Bounds:
    return {
        key: schema[key]
        for key in _BOUNDS
        if isinstance(schema.get(key), int | float) and not isinstance(schema[key], bool)
    }


def _admits_fractions(schema: dict[str, Any]) -> bool:
    kinds = schema.get("type", "number")
    has_constants = "enum" in schema or "const" in schema
    return "number" in (kinds if isinstance(kinds, list) else [kinds]) and not has_constants


def _narrowed(bounds: Bounds) -> Bounds:
    """Return inclusive bounds in place of exclusive ones, 0.000001 further in.

    Raises:
        InvalidRequestError: llguidance does not hold these either.
    """
    step = min(_STEP, abs(Decimal(str(_high(bounds))) - Decimal(str(_low(bounds)))) / 1000)
    narrow = dict(bounds)
    if "exclusiveMinimum" in narrow:
        del narrow["exclusiveMinimum"]
        narrow["minimum"] = float(Decimal(str(_low(bounds))) + step)
    if "exclusiveMaximum" in narrow:
        del narrow["exclusiveMaximum"]
        narrow["maximum"] = float(Decimal(str(_high(bounds))) - step)
    if not _holds(narrow):
        names = " and ".join(key for key in bounds if key.startswith("exclusive"))
        raise refusal(f"{names} cannot be held here: {json.dumps(bounds)}; use minimum and maximum")
    return narrow


def _low(bounds: Bounds) -> float:
    return max((bounds[key] for key in _LOWER if key in bounds), default=-1e9)


def _high(bounds: Bounds) -> float:
    return min((bounds[key] for key in ("maximum", "exclusiveMaximum") if key in bounds), default=1e9)


def _holds(bounds: Bounds) -> bool:
    """Return whether llguidance allows no number at or near a bound that is out of bounds."""
    if not ("exclusiveMinimum" in bounds or "exclusiveMaximum" in bounds):
        return True
    return _holds_bounds(tuple(sorted(bounds.items())))


@lru_cache(maxsize=1000)
def _holds_bounds(items: tuple[tuple[str, float], ...]) -> bool:
    bounds = dict(items)
    matcher = schema_matcher({"type": "number", **bounds})
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
        if not is_within and admits(matcher, text):
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
