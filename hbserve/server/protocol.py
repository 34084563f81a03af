"""Bodies of completions and other routes: OpenAI's parameters, vLLM's, and HBServe's own.

Every parameter is honoured, or refused by name; `hbserve.server.bodies.border` has the rule of the border.
`GenerationRequest` also lists what is accepted without effect: labels for bookkeeping, and hints that change no answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, cast

from pydantic import Field, field_validator

from hbserve.errors import InvalidRequestError
from hbserve.messages.base import MAX_SECONDS
from hbserve.sampling_params import SamplingParams
from hbserve.server.bodies.border import Body, all_of, whole
from hbserve.server.bodies.conversation import Conversation
from hbserve.server.bodies.structured import StructuredOutputs

_TOKEN_ID = re.compile("[0-9]{1,18}")


class StreamOptions(Body):
    """Options of a stream.

    Attributes:
        include_usage: the stream ends with a chunk that has the token counts.
        continuous_usage_stats: every chunk has the counts so far.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None

    @field_validator("include_obfuscation", mode="before")
    @classmethod
    def _no_obfuscation(cls, value: object) -> object:
        if value:
            raise ValueError("padding of chunks is not supported; leave it out")
        return value


class PredictedPart(Body):
    """A part of a `Prediction`."""

    type: Literal["text"]
    text: str


class Prediction(Body):
    """The output that the client expects, such as a file that is to be edited."""

    type: Literal["content"]
    content: str | list[PredictedPart]

    @property
    def text(self) -> str:
        """The whole text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class GenerationRequest(Body):
    """The parameters that completions and chat completions share.

    Names and meanings are OpenAI's; those from ``top_k`` to ``priority`` are HBServe's, those from
    ``structured_outputs`` to ``cache_salt`` vLLM's, as in `SamplingParams`.

    Attributes:
        return_token_ids: the answer has the ids of the prompt's tokens and of its own.
    """

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    grammar: str | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    priority: Literal["batch"] | None = None

    structured_outputs: StructuredOutputs | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: int | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None

    logit_bias: dict[str, float] | None = None
    prediction: Prediction | None = None

    user: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    service_tier: Any = None
    store: Any = None
    verbosity: Any = None

    @field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, value: object) -> object:
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, list) and all_of(value, str):
            return [stop for stop in value if stop] or None
        raise ValueError("must be a string or a list of strings")

    def _sampling(self, defaults: Mapping[str, Any], **more: Any) -> SamplingParams:
        """Make sampling parameters from the fields of the same names and from ``more``.

        Args:
            defaults: the model's, for fields that are not given; the others have those of `SamplingParams`.
        """
        names = [name for name in SamplingParams.__struct_fields__ if name in type(self).model_fields]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.logit_bias is not None:
            given["logit_bias"] = _biases(self.logit_bias)
        if self.prediction is not None:
            given["prediction"] = self.prediction.text
        return SamplingParams(**{**defaults, **given, **more})

    def _only_grammar(self, grammars: dict[str, str | None], *others: str) -> str | None:
        """Return the one grammar that the request asks for; None: it asks for none.

        Args:
            grammars: by the parameter that asks for it, beside ``structured_outputs``.
            others: parameters that will become a grammar, and so exclude the first ones.

        Raises:
            InvalidRequestError: several parameters ask for one.
        """
        if self.structured_outputs is not None:
            grammars["structured_outputs"] = self.structured_outputs.as_grammar()
        requested = [*(name for name, grammar in grammars.items() if grammar is not None), *others]
        if len(requested) > 1:
            raise InvalidRequestError(f"{requested[1]} and {requested[0]} cannot be combined; send one", requested[1])
        return grammars.get(requested[0]) if requested else None

    @property
    def grammar_param(self) -> str:
        """The parameter that errors of a grammar are about."""
        return "grammar" if self.structured_outputs is None else "structured_outputs"

    def _check_stream_options(self) -> None:
        options = self.stream_options
        if options is not None and not self.stream and (options.include_usage or options.continuous_usage_stats):
            raise InvalidRequestError("stream_options needs stream: true", "stream_options")


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    best_of: int | None = None
    echo: bool | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_prompt(cls, value: object) -> object:
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value:
            if all_of(value, list):
                value = [_with_integers(token_ids) for token_ids in value]
                if all(all_of(token_ids, int) for token_ids in value):
                    return value
            elif all_of(value, str) or all_of(value := _with_integers(value), int):
                return value
        raise ValueError("must be a string, a list of token ids, or a list of one of these, and not empty")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, also if the body has only one."""
        is_single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast(list[str | list[int]], [self.prompt] if is_single else self.prompt)

    def sampling(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Make the request's sampling parameters.

        Args:
            defaults: the model's, for parameters that the body does not give.

        Raises:
            InvalidRequestError: a parameter cannot be honoured; ``param`` names it.
        """
        self._check_stream_options()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequestError("best_of is not supported, unless it equals n", "best_of")
        grammar = self._only_grammar({"grammar": self.grammar})
        if self.echo and (self.logprobs is not None or self.max_tokens == 0):
            scores = max(self.logprobs or 0, self.prompt_logprobs or 0)
            return self._sampling(defaults, grammar=grammar, prompt_logprobs=scores)
        return self._sampling(defaults, grammar=grammar)


class TokenizeRequest(Conversation):
    """Body of POST /tokenize: a text, or a conversation, which gets the beginning of its answer.

    Attributes:
        add_special_tokens: for texts only: add the special tokens with which the model expects a prompt to begin.
    """

    KEEPS_EMPTY = frozenset({"prompt", "messages"})

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]


class RoleRequest(Body):
    """Body of POST /v1/instances/{id}/role."""

    role: Literal["prefill", "decode", "unified"]
    timeout_s: float = Field(default=120.0, gt=0, le=MAX_SECONDS)


class PlanRequest(Body):
    """Body of POST /v1/plan. ``system``: ``unified*N`` or ``XpYd``, of as many instances as there are."""

    system: str
    timeout_s: float = Field(default=120.0, gt=0, le=MAX_SECONDS)


class AllocationRequest(Body):
    """Body of POST /v1/semi_pd/allocation: another split of the device.

    Attributes:
        mixed: one worker does both phases in the same steps; the percentages apply when this ends.
        instance: name of the instance; None: all of type ``semi_pd``.
    """

    prefill_percentage: int = Field(ge=1, le=100)
    decode_percentage: int = Field(ge=1, le=100)
    mixed: bool = False
    instance: str | None = None


def _biases(values: dict[str, float]) -> dict[int, float]:
    if not all(_TOKEN_ID.fullmatch(key) for key in values):
        raise InvalidRequestError("logit_bias: keys must be token ids", "logit_bias")
    return {int(key): bias for key, bias in values.items()}


def _with_integers(values: list[Any]) -> list[Any]:
    return [whole(value) if isinstance(value, float) else value for value in values]
