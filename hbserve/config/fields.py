"""Parts of the sections: their base class, the limits of their values, and hints for misspelt names.

A limit stands on the field that it limits, and its ``description`` completes the sentence "must be ...". Limits that
concern several keys, and powers of two, which `msgspec.Meta` cannot express, are in `hbserve.config.validation`.
"""

from __future__ import annotations

import difflib
import reprlib
import sys
from typing import Annotated, Any

import msgspec
from msgspec import Meta

IMPORT_PATH = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*\Z"
_MAX_FLOAT = sys.float_info.max  # refuses inf; NaN passes no comparison

PositiveInt = Annotated[int, Meta(ge=1, description="positive")]
NonNegativeInt = Annotated[int, Meta(ge=0, description="at least 0")]
PositiveFloat = Annotated[float, Meta(gt=0, le=_MAX_FLOAT, description="positive and finite")]
NonNegativeFloat = Annotated[float, Meta(ge=0, le=_MAX_FLOAT, description="at least 0 and finite")]
Fraction = Annotated[float, Meta(gt=0, le=1, description="in (0, 1]")]
Percentage = Annotated[int, Meta(ge=1, le=100, description="in 1..100")]
Port = Annotated[int, Meta(ge=1, le=65535, description="in 1..65535")]
ServerPort = Annotated[int, Meta(ge=0, le=65535, description="in 0..65535")]
NAME_RULE = "1 to 64 letters, digits, '_', '.' or '-'"
InstanceName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*\Z", description=NAME_RULE)]
"""Name of an instance; `hbserve.config.validation` checks the length, since workers add a suffix to it."""
ImportPath = Annotated[str, Meta(pattern=IMPORT_PATH, description="'package.module:Class'")]
Origin = Annotated[
    str,
    Meta(
        pattern=r"^(\*|null|[A-Za-z][A-Za-z0-9+.-]*://[^/\s]+)\Z",
        description="'*', or an origin like https://example.org, without a path",
    ),
]
TraceUrl = Annotated[
    str, Meta(pattern=r"^https?://[^/\s]+/\S+\Z", description="a URL with a path, like http://127.0.0.1:4318/v1/traces")
]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the sections: immutable, keyword-only, and strict about unknown keys."""


_MAX_SHOWN = 200


class _Repr(reprlib.Repr):
    """Short forms of values, however large they are."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 256 else f"an integer of {x.bit_length()} bits"

    def repr_str(self, x: str, level: int) -> str:
        return repr(x) if len(x) <= _MAX_SHOWN else repr(x[:_MAX_SHOWN])[:-1] + "...'"


def shown(value: Any) -> str:
    """Return a value for an error text: as ``repr`` if that is short, else its beginning."""
    text = _Repr().repr(value)
    return text if len(text) <= 2 * _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def nearest(name: str, valid: list[str]) -> str:
    """Return a hint such as ``; did you mean 'port'?``, or the list of valid names."""
    name = name[:_MAX_SHOWN]  # difflib takes time in proportion to the square
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid are: {', '.join(sorted(valid))}"
