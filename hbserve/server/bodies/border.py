"""The border where bodies of requests enter: what is refused, and what asks for nothing.

Parameters are strict: a misspelt one is refused, with the nearest name. A value that asks for nothing is no reason to
refuse a request, so it is left out before the check. `Lenient` bodies (tools) ignore what they do not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from hbserve.tokenizer.conversation import not_too_deep

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "audio": (),
    "best_of": (1,),
    "detokenize": (True,),
    "early_stopping": (),
    "function_call": ("none", "auto"),
    "functions": (),
    "include_reasoning": (True,),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "moderation": (),
    "no_repeat_ngram_size": (),
    "num_beams": (1,),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "spaces_between_special_tokens": (True,),
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "typical_p": (1,),
    "use_beam_search": (),
    "web_search_options": (),
}
"""Parameters of OpenAI and other servers that are not supported, with documented defaults beside `_is_nothing`."""
_REASONS = {
    "response_format": " here; send structured_outputs",
    "suffix": ": insertion needs a model trained for it",
    "functions": "; send tools",
    "function_call": "; send tool_choice",
}

AnyJson = Annotated[dict[str, Any], AfterValidator(not_too_deep)]


class Body(BaseModel):
    """Base of all bodies. Unknown parameters are refused, unless their value asks for nothing.

    Types are not converted, but JSON knows only one kind of number: ``5.0`` is an integer.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    KEEPS_EMPTY: ClassVar[frozenset[str]] = frozenset()
    """Optional parameters whose empty text, list or object means something."""

    _is_light: bool = True

    @property
    def is_light(self) -> bool:
        """Whether an event loop may do the work that the body decides."""
        return self._is_light

    @is_light.setter
    def is_light(self, value: bool) -> None:
        self._is_light = value

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = _fields_of(cls)
        kept = {}
        is_refused = False
        for name, value in data.items():
            field = fields.get(name)
            if field is None:
                if not (is_refused or _is_nothing(value) or _is_default(value, NEUTRAL.get(name, ()))):
                    kept[name] = value
                    is_refused = True  # one is enough: there may be thousands, and the client is told of the first
            elif not field.is_optional or not field.is_nothing(value, name in cls.KEEPS_EMPTY):
                kept[name] = field.with_integers(value)
        return kept


class Lenient(BaseModel):
    """Base of what clients take from elsewhere and pass on, such as tools: unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)


def unsupported(name: str) -> str | None:
    """Return why a known parameter is refused; None if the parameter is unknown."""
    return f"{name} is not supported{_REASONS.get(name, '')}" if name in NEUTRAL else None


class _Field:
    """What the border must know of a parameter. ``kinds``: types of its value, without those inside lists."""

    def __init__(self, annotation: Any, is_optional: bool) -> None:
        kinds = _kinds(annotation)
        self.is_optional = is_optional
        self._takes_bool = bool in kinds or Any in kinds
        self._takes_number = int in kinds or float in kinds or Any in kinds
        self._is_integer = int in kinds and float not in kinds
        self._has_integers = list[int] in kinds

    def is_nothing(self, value: Any, keeps_empty: bool) -> bool:
        """Return whether the value of an optional parameter is as good as no parameter."""
        if value is None:
            return True
        if isinstance(value, bool):
            return not value and not self._takes_bool
        if isinstance(value, int | float):
            return value == 0 and not self._takes_number
        return _is_empty(value) and not keeps_empty

    def with_integers(self, value: Any) -> Any:
        """Return the value with whole numbers as integers, where integers are wanted."""
        if self._is_integer and isinstance(value, float):
            return whole(value)
        if self._has_integers and isinstance(value, list):
            return [whole(item) if isinstance(item, float) else item for item in value]
        return value


@cache
def _fields_of(body: type[Body]) -> Mapping[str, _Field]:
    return {
        field.alias or name: _Field(field.annotation, not field.is_required())
        for name, field in body.model_fields.items()
    }


def _kinds(annotation: Any) -> set[Any]:
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return set().union(*map(_kinds, get_args(annotation)))
    return _kinds(get_args(annotation)[0]) if origin is Annotated else {annotation}


def whole(value: float) -> int | float:
    """Return a number without a fraction as an integer of at most 64 bits, any other as it is."""
    return int(value) if -(2.0**63) <= value < 2.0**64 and value.is_integer() else value


def _is_empty(value: Any) -> bool:
    return isinstance(value, str | list | dict) and not value


def _is_nothing(value: Any) -> bool:
    return value is None or _is_empty(value) or (isinstance(value, bool | int | float) and value == 0)


def _is_default(value: Any, defaults: tuple[Any, ...]) -> bool:
    """Compare with documented defaults; true is not 1."""
    return any(value == default and isinstance(value, bool) == isinstance(default, bool) for default in defaults)


def all_of(values: list[Any], kind: type) -> bool:
    """Return whether all values are of the type ``kind``; a bool does not count as an int."""
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
