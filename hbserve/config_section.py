"""What the sections of the configuration are made of."""

from __future__ import annotations

import difflib

import msgspec


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the sections: immutable, keyword-only, and strict about unknown keys."""


def nearest(name: str, valid: list[str]) -> str:
    """A hint such as ``; did you mean 'port'?``, or the list of valid names."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid are: {', '.join(sorted(valid))}"
