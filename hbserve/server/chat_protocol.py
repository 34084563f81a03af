"""Body of a chat completion: limits, tools, and the required form of the answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from hbserve.errors import InvalidRequestError
from hbserve.grammar import ANY_JSON_OBJECT, json_schema
from hbserve.sampling_params import MAX_LOGPROBS, SamplingParams
from hbserve.server.answers.tool_formats import TokenId, ToolFormat
from hbserve.server.bodies.border import AnyJson, Body
from hbserve.server.bodies.conversation import Conversation, ToolChoice
from hbserve.server.protocol import GenerationRequest


class JsonSchema(Body):
    """The schema of an answer. ``name``, ``description`` and ``strict`` change nothing: the answer always fits."""

    model_config = Body.model_config | {"populate_by_name": True}
    KEEPS_EMPTY = frozenset({"schema"})

    name: str | None = None
    description: str | None = None
    schema_: AnyJson | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """Form of the answer: any text, any JSON object, or a document that fits a JSON schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given with type 'json_schema', and with no other type")
        return self

    @property
    def grammar(self) -> str | None:
        """The grammar of such answers; None: any text."""
        if self.type == "text":
            return None
        return json_schema(ANY_JSON_OBJECT if self.json_schema is None else self.json_schema.schema_ or {})


class ChatCompletionRequest(Conversation, GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None

    @property
    def grammar_param(self) -> str:
        """The parameter that errors of a grammar are about."""
        if self.grammar is not None or self.structured_outputs is not None:
            return super().grammar_param
        return "tool_choice" if self.response_format is None else "response_format"

    @property
    def forces_calls(self) -> bool:
        """Whether the answer must consist of calls."""
        return self.tool_choice not in (None, "none", "auto")

    def sampling(
        self, defaults: Mapping[str, Any], tool_format: ToolFormat | None, token_id: TokenId
    ) -> SamplingParams:
        """Make the request's sampling parameters; without a limit the output may fill the context.

        Args:
            defaults: the model's, for parameters that the body does not give.
            tool_format: how the model writes calls; None: it cannot.
            token_id: see `ToolFormat.grammar`.

        Raises:
            InvalidRequestError: a parameter cannot be honoured; ``param`` names it.
        """
        self._check_stream_options()
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequestError("max_tokens and max_completion_tokens differ; send one", "max_tokens")
        logprobs = None
        if self.logprobs:
            logprobs = self.top_logprobs or 0
            if not 0 <= logprobs <= MAX_LOGPROBS:
                raise InvalidRequestError(f"top_logprobs must be in 0..{MAX_LOGPROBS}", "top_logprobs")
        elif self.top_logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true", "top_logprobs")
        more: dict[str, Any] = {"max_tokens": limits.pop() if limits else None, "logprobs": logprobs}
        forced = self._forced_functions()
        form = None if self.response_format is None else self.response_format.grammar
        grammars = {"grammar": self.grammar, "response_format": form}
        grammar = self._only_grammar(grammars, *(["tool_choice"] if forced else []))
        if self.bad_words and self.offers_tools:
            raise InvalidRequestError("bad_words cannot be combined with tools", "bad_words")
        if self.offers_tools and tool_format is None:
            raise InvalidRequestError(
                "the model's chat template has no tool calls, or has them in a form that this server does not know; "
                "it knows those of Hermes and Qwen, Llama 3, and Mistral, "
                "not those of DeepSeek, gpt-oss, Qwen3-Coder and GLM",
                "tools",
            )
        if forced and tool_format is not None:
            several = self.tool_choice == "required" and self.parallel_tool_calls is not False
            more["grammar"] = tool_format.grammar(forced, several, token_id)
        elif grammar is not None:
            more["grammar"] = grammar
        return self._sampling(defaults, **more)

    def _forced_functions(self) -> dict[str, dict[str, Any] | None]:
        """Return the functions of which one must be called: parameters by name; empty if none must be."""
        if not self.forces_calls:
            return {}
        tools = self.tools or []
        if not tools:
            raise InvalidRequestError("tool_choice needs tools", "tool_choice")
        if isinstance(self.tool_choice, ToolChoice):
            name = self.tool_choice.function.name
            tools = [tool for tool in tools if tool.function.name == name]
            if not tools:
                raise InvalidRequestError(f"tool_choice: there is no tool {name!r}", "tool_choice")
        return {tool.function.name: tool.function.schema_of_arguments() for tool in tools}
