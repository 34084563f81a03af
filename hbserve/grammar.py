"""Grammars that an output must follow, by llguidance: which tokens may come next.

A grammar is text: llguidance's Lark dialect, or what `json_schema` makes of a schema. The side that
takes requests checks it; every worker that samples for such a request follows it with a `Matcher`,
whose state is nothing but the grammar and the output so far.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hbserve.errors import InvalidRequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_GRAMMAR_CHARACTERS = 200_000

_MAX_PROBLEM_CHARACTERS = 300
_NO_FORCING = '%llguidance {"no_forcing": true}'
_WHITE_SPACE = r"( |\n {0,64})?"

ANY_JSON_OBJECT = '{"type": "object"}'


def json_schema(schema: dict[str, Any] | str) -> str:
    """The grammar of the JSON documents that a schema admits.

    Between their parts is nothing, a space, or a new line with its indentation: a model that may write
    any white space may never stop doing so.

    Raises:
        InvalidRequestError: if it is no JSON object; `Vocabulary.check` finds what else is wrong.
    """
    _library()
    from llguidance import LLMatcher

    try:
        grammar: str = LLMatcher.grammar_from_json_schema(
            schema if isinstance(schema, str) else json.dumps(schema), overrides={"whitespace_pattern": _WHITE_SPACE}
        )
    except ValueError as error:
        raise InvalidRequestError(f"no JSON schema: {error}", "response_format") from None
    return grammar


def json_rule(schema: dict[str, Any]) -> str:
    """The documents of `json_schema`, as the right side of a rule in a larger grammar."""
    return "%json " + json.dumps(schema | {"x-guidance": {"whitespace_pattern": _WHITE_SPACE}})


class Vocabulary:
    """A tokenizer as grammars see it: the bytes of every token.

    Takes about a second to make for a vocabulary of 150,000 tokens.

    Args:
        folder: with a ``tokenizer.json``.
        vocab_size: of the model, whose logits may have more columns than there are tokens.

    Raises:
        InvalidRequestError: if grammars cannot be followed with this model or on this machine.
    """

    def __init__(self, folder: str | Path, vocab_size: int) -> None:
        _library()
        from llguidance import LLTokenizer

        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise InvalidRequestError(f"structured output needs a tokenizer.json, and {folder} has none", "grammar")
        self.vocab_size = vocab_size
        text = path.read_text(encoding="utf-8")
        document = json.loads(text)
        self._added_texts = [token["content"] for token in document.get("added_tokens", ())]
        decoder = document.get("decoder") or {}
        if decoder.get("type") == "Metaspace":  # in the words that llguidance knows
            space = {"type": "Replace", "pattern": {"String": decoder["replacement"]}, "content": " "}
            document["decoder"] = {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}]}
            text = json.dumps(document)
        try:
            self._tokenizer: LLTokenizer = LLTokenizer(text, n_vocab=vocab_size)
        except ValueError as error:
            raise InvalidRequestError(
                f"structured output cannot be had with this tokenizer: {error}", "grammar"
            ) from None

    def check(self, grammar: str) -> None:
        """Compile a grammar.

        Raises:
            InvalidRequestError: saying what is wrong with it, or that it is too complex.
        """
        from llguidance import LLMatcher

        if len(grammar) > MAX_GRAMMAR_CHARACTERS:
            raise InvalidRequestError(f"the grammar has more than {MAX_GRAMMAR_CHARACTERS} characters", "grammar")
        matcher = LLMatcher(self._tokenizer, self._unforced(grammar), log_level=0)
        problem = matcher.get_error() or _problem_at_start(matcher)
        if problem:
            what = " ".join(problem.split())[:_MAX_PROBLEM_CHARACTERS]
            raise InvalidRequestError(f"the grammar cannot be followed: {what}", "grammar")

    def problem_of(self, grammar: str, token_ids: Sequence[int]) -> str | None:
        """Why a finished output, without its end token, is not one of the grammar's; None if it is."""
        matcher = self.follow(grammar, [])
        matcher.advance(token_ids)
        return matcher.problem

    def follow(self, grammar: str, end_token_ids: Sequence[int]) -> Matcher:
        """A matcher at the beginning of an output; the grammar has been checked."""
        from llguidance import LLMatcher

        own_ends = self._tokenizer.eos_tokens
        matcher = LLMatcher(self._tokenizer, self._unforced(grammar), log_level=0)
        return Matcher(matcher, self.vocab_size, end_token_ids, own_ends)

    def _unforced(self, grammar: str) -> str:
        """The grammar, told not to force tokens if it names the text of an added one.

        Where only one text can follow, llguidance allows just the token that the tokenizer would write. If that is an
        added token, such as ``<think>``, it refuses it afterwards: it takes those for marks, not for text.
        """
        if not any(text in grammar for text in self._added_texts):
            return grammar
        if grammar.startswith("{"):  # what `json_schema` makes
            return f"{_NO_FORCING}\nstart: %json {json.dumps(json.loads(grammar)['grammars'][0]['json_schema'])}"
        head, _, rest = grammar.partition("\n")
        if not head.startswith("%llguidance"):
            return f"{_NO_FORCING}\n{grammar}"
        return f"{_NO_FORCING}\n{rest}" if head.removeprefix("%llguidance").strip() == "{}" else grammar


class Matcher:
    """Where an output is in its grammar.

    A grammar that becomes too complex on the way stays in an error: then only the end is allowed,
    and `problem` says why.
    """

    def __init__(self, matcher: Any, vocab_size: int, end_token_ids: Sequence[int], own_ends: Iterable[int]) -> None:
        self._matcher = matcher
        self._num_words = -(-vocab_size // 32)
        self._end_token_ids = np.asarray(end_token_ids, np.int64)
        self._own_ends = np.asarray([token for token in own_ends if token < vocab_size], np.int64)

    def advance(self, token_ids: Sequence[int]) -> None:
        """These tokens have been chosen."""
        self._matcher.consume_tokens(list(token_ids))

    def mask(self) -> npt.NDArray[np.int32]:
        """The tokens that may come next, ``[ceil(vocab / 32)]``; bit i of word w is token ``32 * w + i``."""
        words = np.zeros(self._num_words, np.int32)
        if not self._matcher.is_stopped():  # stopped: complete, or in error
            raw = self._matcher.compute_bitmask()
            words[:] = np.frombuffer(raw, np.int32, count=self._num_words)
        # The end of an output is what the request says, not what the tokenizer calls its end token.
        _set(words, self._own_ends, False)
        if self._matcher.is_accepting() or not words.any():
            _set(words, self._end_token_ids, True)
        return words

    @property
    def problem(self) -> str | None:
        """Why the output, if it ended here, is not one of the grammar; None if it is."""
        if self._matcher.is_error():
            return f"the grammar could not be followed to the end: {self._matcher.get_error().strip().splitlines()[0]}"
        return None if self._matcher.is_accepting() else "the output ends before the grammar does"


def _problem_at_start(matcher: LLMatcher) -> str | None:
    """Why a grammar that has been compiled cannot be begun; None if it can.

    It is compiled as it is needed, so what is too large shows at the first token, or at the one after it.
    """
    for _ in range(2):
        words = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_stopped():
            break
        matcher.consume_token(int(np.unpackbits(words, bitorder="little").argmax()))
    problem: str = matcher.get_error().partition("\n")[0]
    return "there is no text that it admits" if problem == "NoExtensionBias" else problem or None


def _set(words: npt.NDArray[np.int32], tokens: npt.NDArray[np.int64], allowed: bool) -> None:
    for token in tokens.tolist():
        bit = np.uint32(1 << (token % 32)).view(np.int32)
        words[token // 32] = words[token // 32] | bit if allowed else words[token // 32] & ~bit


def _library() -> None:
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise InvalidRequestError(
            "structured output needs the package llguidance, which is not installed here", "grammar"
        ) from None
