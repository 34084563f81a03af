"""``structured_outputs``, vLLM's way to say what form an output must have."""

from __future__ import annotations

import json
from typing import Any

from pydantic import Field

from hbserve.errors import InvalidRequestError
from hbserve.grammar import ANY_JSON_OBJECT, json_schema
from hbserve.server.bodies.border import Body
from hbserve.tokenizer.conversation import not_too_deep

_PARAM = "structured_outputs"


class StructuredOutputs(Body):
    """The form of an output; exactly one of the fields is given.

    Attributes:
        json_: a JSON schema, as an object or as text.
        regex: expression that the whole output matches, in the syntax of Rust's ``regex``; no look-around.
        choice: the output is one of these texts.
        grammar: in llguidance's Lark dialect, or in llama.cpp's GBNF.
        json_object: any JSON object.
    """

    model_config = Body.model_config | {"populate_by_name": True}
    KEEPS_EMPTY = frozenset({"json"})

    json_: Any = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def as_grammar(self) -> str:
        """Return the grammar of such outputs.

        Raises:
            InvalidRequestError: none or several of the fields are given, or one cannot be honoured.
        """
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, _FIELDS[name]) is not None]
        given += ["json_object"] if self.json_object else []
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise InvalidRequestError(
                f"{_PARAM} needs one of json, regex, choice, grammar and json_object; it has {found}", _PARAM
            )
        try:
            return self._as_grammar()
        except (InvalidRequestError, ValueError) as error:
            raise InvalidRequestError(f"{_PARAM}.{given[0]}: {error}", _PARAM) from None

    def _as_grammar(self) -> str:
        if self.regex is not None:
            from llguidance import LLMatcher

            lark: str = json.loads(LLMatcher.grammar_from_regex(self.regex))["grammars"][0]["lark_grammar"]
            return lark
        if self.choice is not None:
            return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in self.choice)
        if self.grammar is not None:
            return _lark(self.grammar)
        if self.json_object:
            return json_schema(ANY_JSON_OBJECT)
        schema = json.loads(self.json_) if isinstance(self.json_, str) else self.json_
        if not isinstance(schema, dict):
            raise ValueError("must be a JSON schema: an object")
        return json_schema(not_too_deep(schema))


_FIELDS = {"json": "json_", "regex": "regex", "choice": "choice", "grammar": "grammar"}


def _lark(grammar: str) -> str:
    """Return a grammar in the Lark dialect; rules of GBNF have ``::=``."""
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

    try:
        lark: str = gbnf_to_lark(grammar)
    except (GbnfToLarkError, RecursionError) as error:
        raise ValueError(f"not a grammar in GBNF: {error}") from None
    return lark
