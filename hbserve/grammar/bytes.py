"""Matchers of bytes: what llguidance does with a grammar or a schema, tried out without any model's tokens."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

NUM_BYTES = 256


@cache
def _bytes() -> LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def byte_matcher(grammar: str, limits: LLParserLimits | None = None) -> LLMatcher:
    """Make a matcher whose tokens are the bytes; token ids from `NUM_BYTES` on are marks."""
    from llguidance import LLMatcher

    return LLMatcher(_bytes(), grammar, log_level=0, limits=limits)


def schema_matcher(schema: dict[str, Any], limits: LLParserLimits | None = None) -> LLMatcher:
    """Make a matcher of bytes for a schema's documents without white space."""
    from llguidance import LLMatcher

    overrides: Any = {"whitespace_flexible": False}
    return byte_matcher(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=overrides), limits)


def admits(matcher: LLMatcher, text: str) -> bool:
    """Return whether a matcher, which stays as it is, admits a whole text."""
    probe = matcher.deep_copy()
    return bool(probe.consume_tokens(list(text.encode()))) and bool(probe.is_accepting())
