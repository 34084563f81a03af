"""Grammars that an output must follow, by llguidance: they say which tokens may come next.

A grammar is text: llguidance's Lark dialect, or what `json_schema` makes of a schema. The API server or the embedding
program checks it (`Vocabulary.check`). Every worker that samples for the request follows it with a `Matcher`, whose
whole state is the grammar and the output so far.
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
        folder: folder with a ``tokenizer.json``.
        vocab_size: columns of the model's logits, which may be more than there are tokens.

    Raises:
        InvalidRequestError: if grammars do not work with this model or on this machine.
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
        if decoder.get("type") == "Metaspace":  # in the form that llguidance understands
            space = {"type": "Replace", "pattern": {"String": decoder["replacement"]}, "content": " "}
            document["decoder"] = {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}]}
            text = json.dumps(document)
        try:
            self._tokenizer: LLTokenizer = LLTokenizer(text, n_vocab=vocab_size)
        except ValueError as error:
            raise InvalidRequestError(
                f"structured output does not work with this tokenizer: {error}", "grammar"
            ) from None

    def check(self, grammar: str) -> None:
        """Compile a grammar.

        Raises:
            InvalidRequestError: if the grammar is wrong or too complex; the message says why.
        """
        from llguidance import LLMatcher

        if len(grammar) > MAX_GRAMMAR_CHARACTERS:
            raise InvalidRequestError(f"the grammar has more than {MAX_GRAMMAR_CHARACTERS} characters", "grammar")
        matcher = LLMatcher(self._tokenizer, self._unforced(grammar), log_level=0)
        problem = matcher.get_error() or _problem_at_start(matcher)
        if problem:
            reason = " ".join(problem.split())[:_MAX_PROBLEM_CHARACTERS]
            raise InvalidRequestError(f"the grammar cannot be followed: {reason}", "grammar")

    def problem_of(self, grammar: str, token_ids: Sequence[int]) -> str | None:
        """Say why a finished output, without its end token, does not match the grammar; None if it does."""
        matcher = self.follow(grammar, [])
        matcher.advance(token_ids)
        return matcher.problem

    def follow(self, grammar: str, end_token_ids: Sequence[int]) -> Matcher:
        """Make a matcher at the beginning of an output; the grammar must have been checked."""
        from llguidance import LLMatcher

        tokenizer_ends = self._tokenizer.eos_tokens
        matcher = LLMatcher(self._tokenizer, self._unforced(grammar), log_level=0)
        return Matcher(matcher, self.vocab_size, end_token_ids, tokenizer_ends)

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


class Matcher:
    """Position of an output in its grammar.

    A grammar that becomes too complex during the output stays in an error: then only the end is allowed, and `problem`
    says why.
    """

    def __init__(
        self, matcher: Any, vocab_size: int, end_token_ids: Sequence[int], tokenizer_ends: Iterable[int]
    ) -> None:
        self._matcher = matcher
        self._num_words = -(-vocab_size // 32)
        self._end_token_ids = np.asarray(end_token_ids, np.int64)
        self._tokenizer_ends = np.asarray([token for token in tokenizer_ends if token < vocab_size], np.int64)

    def advance(self, token_ids: Sequence[int]) -> None:
        """Move on past these sampled tokens."""
        self._matcher.consume_tokens(list(token_ids))

    def mask(self) -> npt.NDArray[np.int32]:
        """Return the tokens that may come next, ``[ceil(vocab / 32)]``: bit i of word w is token ``32 * w + i``."""
        words = np.zeros(self._num_words, np.int32)
        if not self._matcher.is_stopped():  # stopped: complete, or in error
            raw = self._matcher.compute_bitmask()
            words[:] = np.frombuffer(raw, np.int32, count=self._num_words)
        # The request names the end tokens of an output, not the tokenizer.
        _set(words, self._tokenizer_ends, False)
        if self._matcher.is_accepting() or not words.any():
            _set(words, self._end_token_ids, True)
        return words

    @property
    def problem(self) -> str | None:
        """Why the output would not match the grammar if it ended here; None if it would."""
        if self._matcher.is_error():
            return f"the grammar could not be followed to the end: {self._matcher.get_error().strip().splitlines()[0]}"
        return None if self._matcher.is_accepting() else "the output ends before the grammar does"


def _problem_at_start(matcher: LLMatcher) -> str | None:
    """Say why no output of a compiled grammar can begin; None if one can.

    llguidance compiles on demand, so a grammar that is too large fails at the first or second token.
    """
    for _ in range(2):
        words = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_stopped():
            break
        matcher.consume_token(int(np.unpackbits(words, bitorder="little").argmax()))
    problem: str = matcher.get_error().partition("\n")[0]
    return "it admits no text" if problem == "NoExtensionBias" else problem or None


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
