"""Sampling parameters of one request, and their limits."""

from __future__ import annotations

import re
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args

import msgspec

from hbserve.errors import InvalidRequestError
from hbserve.hints import shown

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_LOGIT_BIASES = 1024
MAX_BAD_WORDS = 128


_BEYOND_WORDS = re.compile(r"[^A-Za-z0-9]")  # characters that may mean something in an expression


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling parameters of one request, with OpenAI's names and meanings if OpenAI has the parameter.

    They act on the logits in this order: penalties, ``logit_bias``, suppression of stop tokens (``min_tokens``),
    ``grammar``, temperature, top-k, top-p, min-p.

    Attributes:
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches it, in (0, 1].
        min_p: drop tokens less likely than ``min_p`` times the most likely one, in [0, 1].
        repetition_penalty: divide positive (multiply negative) logits of tokens seen in prompt or output; 1 is off
            (Keskar et al. 2019, CTRL, section 4.1).
        presence_penalty: subtracted once from every token that is in the output.
        frequency_penalty: subtracted once per occurrence in the output.
        seed: makes the request reproducible: in float32 on the CPU always, in shorter dtypes or on a GPU if it runs in
            the same batches; with None each request gets a random one.
        n: number of independent samples.
        stop: end the text before the first of these strings.
        stop_token_ids: end on any of these tokens, in addition to the model's own end tokens.
        ignore_eos: do not end on the model's end tokens (``stop_token_ids`` still end it).
        min_tokens: sample no end or stop token before this many output tokens.
        max_tokens: limit of the output tokens; None: as many as the context holds; 0, with ``prompt_logprobs`` only:
            no output.
        logprobs: report the log-probabilities of the chosen token and of this many most likely tokens per position (0
            to 20), taken before temperature and truncation; None: none.
        prompt_logprobs: report the log-probabilities of each prompt token after the first, likewise. The prompt is then
            computed anew: cached KV has no logits.
        skip_special_tokens: leave special tokens out of the text.
        ttft_ms, tpot_ms: targets for the time to the first token and the mean time per later token, at most; they
            decide when the request is computed, never its tokens (``scheduler.policy``).
        priority: ``batch`` marks best-effort work: it has no targets, takes only the time and the memory that other
            requests leave, and gives its place to them; None: the request is one of these others.
        logit_bias: added to the logits of these token ids, in [-100, 100]; the two limits ban and force a token.
        grammar: grammar that the output follows, and ends with: llguidance's Lark dialect, or what
            `hbserve.grammar.json_schema` makes of a JSON schema. Not with ``ignore_eos`` or ``min_tokens``.
        bad_words: strings that the text never contains, whatever the tokens; kept by a grammar, so with its limits.
        allowed_token_ids: sample no other tokens. The model's end tokens must be among them if they may end the output.
        include_stop_str_in_output: the text ends with the stop string, or with the text of the end token, if it is
            shown.
        truncate_prompt_tokens: keep so many tokens from the end of the prompt; -1: as many as fit beside
            ``max_tokens``; 0 or None: refuse a prompt that is too long.
        cache_salt: the request shares cached KV only with requests of the same salt.
        prediction: the output that is expected, as text or token ids, for example a text that is to be edited. It
            changes no token; where it is right, the output comes faster.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    priority: Literal["batch"] | None = None
    logit_bias: dict[int, float] | None = None
    grammar: str | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    cache_salt: str | None = None
    prediction: str | list[int] | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot be honoured.

        Raises:
            InvalidRequestError: naming the field.
        """
        # msgspec checks types when decoding but not in a direct call, so they are checked here too.
        for name, kind, plain in _field_types():
            value = getattr(self, name)
            if type(value) not in plain:
                try:
                    msgspec.convert(value, kind)
                except msgspec.ValidationError as error:
                    raise InvalidRequestError(f"{name}: {error}", name) from None
        self._require(0 <= self.temperature <= 100, "temperature", "must be in [0, 100]")
        self._require(-1 <= self.top_k < 2**31, "top_k", "must be at least 1, or 0 or -1 to keep all tokens")
        self._require(0 < self.top_p <= 1, "top_p", "must be in (0, 1]")
        self._require(0 <= self.min_p <= 1, "min_p", "must be in [0, 1]")
        self._require(0 < self.repetition_penalty <= 10, "repetition_penalty", "must be in (0, 10]")
        self._require(-2 <= self.presence_penalty <= 2, "presence_penalty", "must be in [-2, 2]")
        self._require(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "must be in [-2, 2]")
        if self.seed is not None:
            self._require(-(2**63) <= self.seed < 2**63, "seed", "must fit in 64 bits")
        self._require(1 <= self.n <= MAX_N, "n", f"must be in 1..{MAX_N}")
        self._require(self.min_tokens >= 0, "min_tokens", "must not be negative")
        if self.max_tokens is not None:
            least = 1 if self.prompt_logprobs is None else 0
            rule = "must be at least 1, or 0 with prompt_logprobs" if least else "must not be negative"
            self._require(self.max_tokens >= least, "max_tokens", rule)
            self._require(self.min_tokens <= self.max_tokens, "min_tokens", "must not exceed max_tokens")
        for name in ("ttft_ms", "tpot_ms"):
            target = getattr(self, name)
            rule = "must be positive, and at most 10^15"
            self._require(target is None or 0 < target <= 1e15, name, rule)
            self._require(target is None or self.priority is None, name, "cannot be combined with priority, batch")
        for name in ("logprobs", "prompt_logprobs"):
            number = getattr(self, name)
            rule = f"must be in 0..{MAX_LOGPROBS}; -1, for all tokens of the vocabulary, is not supported"
            self._require(number != -1, name, rule)
            self._require(number is None or 0 <= number <= MAX_LOGPROBS, name, f"must be in 0..{MAX_LOGPROBS}")
        self._require(len(self.stop_strings) <= MAX_STOP_STRINGS, "stop", f"takes at most {MAX_STOP_STRINGS}")
        self._require(all(self.stop_strings), "stop", "must not hold an empty string")
        texts = [(self.grammar or "", "grammar"), (self.cache_salt or "", "cache_salt")]
        texts += [(stop, "stop") for stop in self.stop_strings] + [(word, "bad_words") for word in self.bad_words or ()]
        if isinstance(self.prediction, str):
            texts.append((self.prediction, "prediction"))
        for text, param in texts:
            self._require(is_unicode(text), param, "must not hold a lone surrogate, which is no character")
        self._require(all(t >= 0 for t in self.stop_token_ids or ()), "stop_token_ids", "must not be negative")
        biases = self.logit_bias or {}
        self._require(len(biases) <= MAX_LOGIT_BIASES, "logit_bias", f"takes at most {MAX_LOGIT_BIASES} tokens")
        self._require(all(t >= 0 for t in biases), "logit_bias", "must name token ids")
        self._require(all(-100 <= bias <= 100 for bias in biases.values()), "logit_bias", "must be in [-100, 100]")
        if self.truncate_prompt_tokens is not None:
            rule = "must be at least -1, and below 2^63"
            self._require(-1 <= self.truncate_prompt_tokens < 2**63, "truncate_prompt_tokens", rule)
        if self.allowed_token_ids is not None:
            self._require(bool(self.allowed_token_ids), "allowed_token_ids", "must not be empty")
            self._require(all(t >= 0 for t in self.allowed_token_ids), "allowed_token_ids", "must not be negative")
            self._require(self.grammar is None, "allowed_token_ids", "cannot be combined with a grammar")
        if self.bad_words:
            self._require(len(self.bad_words) <= MAX_BAD_WORDS, "bad_words", f"takes at most {MAX_BAD_WORDS}")
            self._require(all(self.bad_words), "bad_words", "must not hold an empty string")
            self._require(self.grammar is None, "bad_words", "cannot be combined with a grammar")
            self._require(self.allowed_token_ids is None, "bad_words", "cannot be combined with allowed_token_ids")
            self._require(not self.ignore_eos, "bad_words", "cannot be combined with ignore_eos")
            self._require(self.min_tokens == 0, "bad_words", "cannot be combined with min_tokens")
        if self.grammar is not None:
            self._require(bool(self.grammar.strip()), "grammar", "must not be empty")
            self._require(not self.ignore_eos, "ignore_eos", "must be false with a grammar, which has an end")
            self._require(self.min_tokens == 0, "min_tokens", "must be 0 with a grammar, which has its own end")

    def _require(self, holds: bool, param: str, rule: str) -> None:
        if not holds:  # NaN fails every comparison above, so it is refused as well
            raise InvalidRequestError(f"{param} {rule}, got {shown(getattr(self, param))}", param)

    @property
    def stop_strings(self) -> list[str]:
        """``stop`` as a list, empty if there is none."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    @property
    def steering_grammar(self) -> str | None:
        """The grammar that the output follows: ``grammar``, or that of all texts without ``bad_words``."""
        if not self.bad_words:
            return self.grammar
        words = "|".join(_BEYOND_WORDS.sub(lambda found: rf"\x{{{ord(found[0]):x}}}", word) for word in self.bad_words)
        return f"start: TEXT\nTEXT: /(?s:.*)/ & ~/(?s:.*)({words})(?s:.*)/"

    @property
    def greedy(self) -> bool:
        """Whether the sampler always takes the most likely token."""
        return self.temperature == 0


@cache
def _field_types() -> list[tuple[str, Any, frozenset[type]]]:
    """List each field's name, its type, and the types of values that need no conversion; cached, because it is slow."""
    fields = [(field.name, field.type) for field in msgspec.structs.fields(SamplingParams)]
    return [
        (name, kind, frozenset(part for part in (*get_args(kind), kind) if part in (bool, int, float, str, NoneType)))
        for name, kind in fields
    ]


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded; JSON can hold half a surrogate pair."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)
