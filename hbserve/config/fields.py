"""Parts of the sections: their base class, and the limits of their values.

A limit stands on the field that it limits, and its ``description`` completes the sentence "must be ...". Limits that
concern several keys, and powers of two, which `msgspec.Meta` cannot express, are in `hbserve.config.limits`.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

IMPORT_PATH = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*\Z"
_MAX_FLOAT = 1e9  # what follows from it stays finite, and within what the operating system waits for

PositiveInt = Annotated[int, Meta(ge=1, description="positive")]
NonNegativeInt = Annotated[int, Meta(ge=0, description="at least 0")]
PositiveFloat = Annotated[float, Meta(gt=0, le=_MAX_FLOAT, description="positive and at most 10^9")]
Seconds = Annotated[float, Meta(gt=0, le=1e6, description="positive and at most 10^6")]
"""Longer times overflow what the operating system waits for."""
NonNegativeSeconds = Annotated[float, Meta(ge=0, le=1e6, description="in 0..10^6")]
NonNegativeFloat = Annotated[float, Meta(ge=0, le=_MAX_FLOAT, description="in 0..10^9")]
Fraction = Annotated[float, Meta(gt=0, le=1, description="in (0, 1]")]
Percentage = Annotated[int, Meta(ge=1, le=100, description="in 1..100")]
Port = Annotated[int, Meta(ge=1, le=65535, description="in 1..65535")]
ServerPort = Annotated[int, Meta(ge=0, le=65535, description="in 0..65535")]
NAME_RULE = "1 to 64 letters, digits, '_', '.' or '-'"
InstanceName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*\Z", description=NAME_RULE)]
"""Name of an instance; `hbserve.config.limits` checks the length, since workers add a suffix to it."""
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


HostPort = Annotated[
    str,
    Meta(
        pattern=r"^(\[[0-9A-Fa-f:]+\]|[^\s:/\[\]]+):\d{1,5}\Z",
        description="an address like 127.0.0.1:50051 or [::1]:50051",
    ),
]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the sections: immutable, keyword-only, and strict about unknown keys."""
