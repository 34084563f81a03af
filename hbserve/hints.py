"""Texts of errors: values in short, and hints for misspelt names."""

from __future__ import annotations

import difflib
import reprlib
from typing import Any

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
