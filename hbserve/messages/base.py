"""Base classes of messages."""

from __future__ import annotations

from typing import Annotated

import msgspec

MAX_SECONDS = 1e9
Seconds = Annotated[float, msgspec.Meta(ge=0, le=MAX_SECONDS)]
"""A time that a message asks for: never a NaN or infinite."""


class Message(msgspec.Struct, tag=True, array_like=True, frozen=True, kw_only=True):
    """Base of all messages. They are arrays, not maps, because both ends run the same version."""


class Value(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """Base of the parts of messages."""


class TokenLogprobs(Value, frozen=True):
    """Log-probabilities at one position.

    Attributes:
        token: log-probability of the token there.
        top_ids, top: the most likely tokens, best first, and their log-probabilities.
        rank: of a prompt's token: its place among all tokens, 1 for the most likely; 0: not determined.
    """

    token: float
    top_ids: list[int]
    top: list[float]
    rank: int = 0
