"""The tokens of a model as grammars see them, and the check of a grammar before it is followed."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hbserve.errors import InvalidRequestError
from hbserve.grammar.bytes import NUM_BYTES, byte_matcher
from hbserve.grammar.documents import problem_of
from hbserve.grammar.matcher import DEAD_END, Matcher, parser_limits, reason_of
from hbserve.grammar.schemas import followable

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_GRAMMAR_CHARACTERS = 200_000

_MAX_PROBLEM_CHARACTERS = 300
_NO_FORCING = '%llguidance {"no_forcing": true}'
_WHITE_SPACE = r"( |\n {0,16})?"  # a small model fills it: every space may be a token

_RULE_OF_JSON = re.compile(r"^(?P<head>\w+(?:\[[^\]\n]*\])?: %json )(?P<schema>\{.*\})$", re.MULTILINE)
_CAPTURED_JSON = re.compile(r"^(?P<name>\w+)\[capture\]: %json (?P<schema>\{.*\})$", re.MULTILINE)

_MAX_CHECK_CPU_S = 2.0
_MAX_TRIAL_CPU_S = 0.3
_MAX_TRIAL_MASK_CPU_S = 0.25
_NUM_TRIALS = 24
_TRIAL_TOKENS = 64
_MAX_MEAN_CPU_S = 0.03  # per token; workers allow no more in the long run
_TRIAL_BYTES = 64
_STRUCTURAL_BYTES = np.frombuffer(b'"{}[],:0', np.uint8)

ANY_JSON_OBJECT = '{"type": "object"}'


def json_schema(schema: dict[str, Any] | str) -> str:
    """Make the grammar of the JSON documents that a schema admits.

    Between their parts it allows nothing, a space, or a new line with its indentation: a model that may write any white
    space may never stop.

    Raises:
        InvalidRequestError: if the schema is not a JSON object; `Vocabulary.check` finds other errors.
    """
    _library()
    from llguidance import LLMatcher

    try:
        grammar: str = LLMatcher.grammar_from_json_schema(
            schema if isinstance(schema, str) else json.dumps(schema), overrides={"whitespace_pattern": _WHITE_SPACE}
        )
    except ValueError as error:
        raise InvalidRequestError(f"not a JSON schema: {error}", "response_format") from None
    return grammar


def json_rule(schema: dict[str, Any]) -> str:
    """Make the documents of `json_schema` the right side of a rule in a larger grammar."""
    return "%json " + json.dumps(schema | {"x-guidance": {"whitespace_pattern": _WHITE_SPACE}})


class Vocabulary:
    """Tokens of a tokenizer as bytes, which is how grammars see them.

    To make one takes about a second for a vocabulary of 150,000 tokens.

    Args:
        tokenizer: content of a tokenizer.json.
        vocab_size: columns of the model's logits, which may be more than there are tokens.

    Raises:
        InvalidRequestError: if grammars do not work with this model or on this machine.
    """

    def __init__(self, tokenizer: str, vocab_size: int) -> None:
        _library()
        from llguidance import LLTokenizer

        self.vocab_size = vocab_size
        document = json.loads(tokenizer)
        self._added_texts = [token["content"] for token in document.get("added_tokens", ())]
        decoder = document.get("decoder") or {}
        if decoder.get("type") == "Metaspace":  # in the form that llguidance understands
            space = {"type": "Replace", "pattern": {"String": decoder["replacement"]}, "content": " "}
            document["decoder"] = {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}]}
            tokenizer = json.dumps(document)
        try:
            self._tokenizer: LLTokenizer = LLTokenizer(tokenizer, n_vocab=vocab_size)
        except ValueError as error:
            raise InvalidRequestError(
                f"structured output does not work with this tokenizer: {error}", "grammar"
            ) from None

    def check(self, grammar: str) -> str:
        """Compile a grammar, and try it out: some outputs are begun at random.

        Takes up to `_MAX_CHECK_CPU_S` for a grammar that is accepted, and has no limit for one that is refused.

        Returns:
            The grammar to follow: of the same outputs, without what llguidance cannot follow to an end.

        Raises:
            InvalidRequestError: if the grammar is wrong, too complex, or leads into a dead end; the message says which.
        """
        if len(grammar) > MAX_GRAMMAR_CHARACTERS:
            raise InvalidRequestError(f"the grammar has more than {MAX_GRAMMAR_CHARACTERS} characters", "grammar")
        started = time.thread_time()
        followed = self._unforced(_without_dead_ends(grammar))
        matcher = self._matcher(followed)
        problem = matcher.get_error() or _problem_at_start(matcher.deep_copy())
        if not problem and time.thread_time() - started > _MAX_CHECK_CPU_S:
            problem = "it is too complex: it takes too long to compile; make it smaller"
        problem = problem or self._problem_in_trials(matcher, followed)
        if problem:
            if "oneOf constraints are not supported" in problem:
                problem = "the choices of a oneOf are not told apart by types, or constants of a property; use anyOf"
            reason = " ".join(problem.replace("<non-verbose/>", "").split())
            raise InvalidRequestError(f"the grammar cannot be followed: {reason[:_MAX_PROBLEM_CHARACTERS]}", "grammar")
        return followed

    def _problem_in_trials(self, matcher: LLMatcher, grammar: str) -> str | None:
        """Begin some outputs at random, and say why one of them cannot go on; None if all can.

        Trials with the model's tokens find masks that take too long; trials with single bytes, which are cheap, find
        dead ends.
        """
        chance = random.Random(0)
        deadline = time.thread_time() + _MAX_TRIAL_CPU_S
        problem = _trial(matcher.deep_copy(), self.vocab_size, _TRIAL_TOKENS, chance, deadline)
        by_bytes = byte_matcher(grammar, parser_limits())
        if problem is not None or by_bytes.is_error():  # it names tokens of the model
            return problem
        deadline = time.thread_time() + _MAX_TRIAL_CPU_S
        for _ in range(_NUM_TRIALS):
            if time.thread_time() > deadline:
                break
            problem = _trial(by_bytes.deep_copy(), NUM_BYTES, _TRIAL_BYTES, chance, deadline)
            if problem is not None:
                return problem
        return None

    def problem_of(self, grammar: str, token_ids: Sequence[int]) -> str | None:
        """Say why a finished output, without its end token, does not match the grammar; None if it does.

        JSON documents are also checked against their schemas, by another library.
        """
        matcher = self.follow(_without_dead_ends(grammar), [])
        matcher.advance(token_ids)
        if matcher.problem is not None:
            return matcher.problem
        if grammar.startswith("{"):
            text = self._tokenizer.decode_bytes(list(token_ids)).decode(errors="replace")
            return next((why for schema in _schemas(grammar) if (why := problem_of(schema, text)) is not None), None)
        schemas = {found["name"]: found["schema"] for found in _CAPTURED_JSON.finditer(grammar)}
        for name, document in matcher.captures() if schemas else ():
            problem = problem_of(schemas[name], document.decode(errors="replace")) if name in schemas else None
            if problem is not None:
                return problem
        return None

    def follow(self, grammar: str, end_token_ids: Sequence[int]) -> Matcher:
        """Make a matcher at the beginning of an output; the grammar must have been checked."""
        matcher = self._matcher(self._unforced(grammar))
        return Matcher(matcher, self.vocab_size, end_token_ids, self._tokenizer.eos_tokens)

    def _matcher(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher

        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=parser_limits())

    def _unforced(self, grammar: str) -> str:
        """Return the grammar, with the option not to force tokens if it contains the text of an added token.

        Where only one text can follow, llguidance allows only the token that the tokenizer would write. If that is an
        added token, such as ``<think>``, llguidance then refuses it, because it takes added tokens for marks, not for
        text.
        """
        if not any(text in grammar for text in self._added_texts):
            return grammar
        if grammar.startswith("{"):  # a result of `json_schema`
            return f"{_NO_FORCING}\nstart: %json {json.dumps(json.loads(grammar)['grammars'][0]['json_schema'])}"
        head, _, rest = grammar.partition("\n")
        if not head.startswith("%llguidance"):
            return f"{_NO_FORCING}\n{grammar}"
        return f"{_NO_FORCING}\n{rest}" if head.removeprefix("%llguidance").strip() == "{}" else grammar


def _problem_at_start(matcher: LLMatcher) -> str | None:
    """Say why no output of a compiled grammar can begin; None if one can.

    llguidance compiles on demand, so a grammar that is too large fails at the first or second token.
    """
    for _ in range(2):
        words = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_stopped():
            break
        matcher.consume_token(int(np.unpackbits(words, bitorder="little").argmax()))
    if not matcher.is_error():
        return None
    reason = reason_of(matcher.get_error())
    return "it admits no text" if reason == DEAD_END else reason


def _trial(matcher: LLMatcher, num_tokens: int, length: int, chance: random.Random, deadline: float) -> str | None:
    """Begin an output of random tokens; say why it cannot go on, None if it can."""
    started = time.thread_time()
    for number in range(length):
        began = time.thread_time()
        if began > deadline and number >= 4 and (began - started) / number > _MAX_MEAN_CPU_S:
            return "it is too complex: its tokens take too long; make it smaller or less ambiguous"
        if began > deadline or matcher.is_stopped():
            break
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[:num_tokens]
        if time.thread_time() - began > _MAX_TRIAL_MASK_CPU_S:
            return "it is too complex: one token takes too long; make it smaller or less ambiguous"
        if matcher.is_error():
            break
        allowed = np.flatnonzero(bits)
        if not allowed.size:
            break
        structural = allowed[np.isin(allowed, _STRUCTURAL_BYTES)] if num_tokens == NUM_BYTES else allowed
        if structural.size and chance.random() < 0.5:  # else most trials would not leave their first string
            allowed = structural
        matcher.consume_token(int(allowed[chance.randrange(allowed.size)]))
    return reason_of(matcher.get_error()) if matcher.is_error() else None


def _without_dead_ends(grammar: str) -> str:
    """Return the grammar with `followable` schemas in place of its schemas."""
    if not grammar.startswith("{"):
        return _RULE_OF_JSON.sub(_followable_rule, grammar)
    try:  # a result of `json_schema`
        document = json.loads(grammar)
        parts = [part for part in document["grammars"] if "json_schema" in part]
    except (ValueError, KeyError, TypeError, RecursionError):
        return grammar  # llguidance says what is wrong
    for part in parts:
        part["json_schema"] = followable(part["json_schema"])
    return json.dumps(document)


def _followable_rule(found: re.Match[str]) -> str:
    try:
        schema = json.loads(found["schema"])
    except (ValueError, RecursionError):
        return found[0]
    return found["head"] + json.dumps(followable(schema))


def _schemas(grammar: str) -> list[Any]:
    try:
        return [part["json_schema"] for part in json.loads(grammar)["grammars"] if "json_schema" in part]
    except (ValueError, KeyError, TypeError):
        return []


def _library() -> None:
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise InvalidRequestError(
            "structured output needs the package llguidance, which is not installed here", "grammar"
        ) from None
