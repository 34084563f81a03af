"""What messages are made of."""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, tag=True, array_like=True, frozen=True, kw_only=True):
    """Base of all messages. Arrays, not maps: both ends run the same version."""


class Value(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """Base of the parts of messages."""


class TokenLogprobs(Value, frozen=True):
    """Log-probabilities at one output position.

    Attributes:
        token: of the chosen token.
        top_ids, top: the most likely tokens, best first, and theirs.
    """

    token: float
    top_ids: list[int]
    top: list[float]
