"""The bodies that the HTTP API takes. Every parameter is honoured, or refused by name.

Accepted although they change nothing here: ``user``, ``metadata``, ``safety_identifier``,
``prompt_cache_key`` (labels for the provider's bookkeeping), ``parallel_tool_calls`` (there are no
tools), and the values that mean "nothing special" of the parameters in `NEUTRAL`. Any other value of
those is refused.
"""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, field_validator

from hbserve.errors import InvalidRequestError
from hbserve.sampling_params import MAX_LOGPROBS, SamplingParams

# OpenAI's parameters that are not supported, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
WHY = {
    "echo": ": the prompt is not part of the output",
    "suffix": ": insertion needs a model trained for it",
    "tools": ": put them into the prompt",
    "store": ": nothing is kept",
}


class Body(BaseModel):
    """Base of the bodies: unknown names are refused, and types are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    """Attributes: include_usage: end the stream with a chunk that has the token counts."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None

    @field_validator("include_obfuscation", mode="before")
    @classmethod
    def _no_obfuscation(cls, value: object) -> object:
        if value:
            raise ValueError("padding of chunks is not supported; leave it out")
        return value


class GenerationRequest(Body):
    """What completions and chat completions share. Names and meanings are OpenAI's; those from
    ``top_k`` to ``skip_special_tokens`` are `SamplingParams`' own."""

    model: str
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
    skip_special_tokens: bool | None = None

    user: str | None = None
    metadata: dict[str, Any] | None = None
    logit_bias: Any = None

    @field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, value: object) -> object:
        if value is None or isinstance(value, str) or (isinstance(value, list) and _all(value, str)):
            return value
        raise ValueError("must be a string or a list of strings")

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _sampling(self, **more: Any) -> SamplingParams:
        """Sampling parameters from the fields of those names and from ``more``; absent ones have their defaults."""
        names = [name for name in SamplingParams.__struct_fields__ if name in type(self).model_fields]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return SamplingParams(**given | more)

    def _refuse_unsupported(self) -> None:
        for name, neutral in NEUTRAL.items():
            value = getattr(self, name, None)
            if value is not None and value not in neutral:
                raise InvalidRequestError(f"{name} is not supported{WHY.get(name, '')}", name)


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_prompt(cls, value: object) -> object:
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value:
            if _all(value, str) or _all(value, int):
                return value
            if _all(value, list) and all(_all(token_ids, int) for token_ids in value):
                return value
        raise ValueError("must be a string, a list of token ids, or a list of one of these, and not empty")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or many."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast(list[str | list[int]], [self.prompt] if one else self.prompt)

    def sampling(self) -> SamplingParams:
        """The request's sampling parameters.

        Raises:
            InvalidRequestError: naming the parameter that cannot be honoured.
        """
        self._refuse_unsupported()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequestError("best_of is not supported, unless it equals n", "best_of")
        return self._sampling()


class ChatMessage(Body):
    """One turn of a conversation. Content is text, or a list of text parts, which are joined."""

    role: str
    content: str
    name: Any = None
    refusal: Any = None
    audio: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None

    @field_validator("role")
    @classmethod
    def _check_role(cls, value: str) -> str:
        if value not in ("system", "developer", "user", "assistant"):
            raise ValueError(f"must be system, developer, user or assistant, got {value!r}")
        return "system" if value == "developer" else value  # OpenAI's newer name; templates know the older

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: object) -> object:
        if not isinstance(value, list):
            return value
        texts = []
        for part in value:
            if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
                raise ValueError("parts must be {'type': 'text', 'text': ...}; other kinds are not supported")
            texts.append(part["text"])
        if not _all(texts, str):
            raise ValueError("the text of a part must be a string")
        return "".join(texts)

    @field_validator("name", "refusal", "audio", "tool_calls", "tool_call_id", "function_call")
    @classmethod
    def _refuse(cls, value: object) -> object:
        if value is not None:
            raise ValueError("is not supported in messages")
        return value


class ChatCompletionRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    prediction: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    service_tier: Any = None
    store: bool | None = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages as chat templates take them."""
        return [{"role": message.role, "content": message.content} for message in self.messages]

    def sampling(self) -> SamplingParams:
        """The request's sampling parameters; without a limit the output may fill the context.

        Raises:
            InvalidRequestError: naming the parameter that cannot be honoured.
        """
        self._refuse_unsupported()
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequestError("max_tokens and max_completion_tokens differ; send one", "max_tokens")
        logprobs = None
        if self.logprobs:
            logprobs = self.top_logprobs or 0
            if not 0 <= logprobs <= MAX_LOGPROBS:
                raise InvalidRequestError(f"top_logprobs must be in 0..{MAX_LOGPROBS}", "top_logprobs")
        elif self.top_logprobs is not None:
            raise InvalidRequestError("top_logprobs needs logprobs: true", "top_logprobs")
        return self._sampling(max_tokens=limits.pop() if limits else None, logprobs=logprobs)


def _all(values: list[Any], kind: type) -> bool:
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
