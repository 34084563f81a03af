"""Body of a chat completion: messages, tools, and the required form of the answer."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from hbserve.errors import InvalidRequestError
from hbserve.grammar import ANY_JSON_OBJECT, json_schema
from hbserve.sampling_params import MAX_LOGPROBS, SamplingParams
from hbserve.server.protocol import AnyJson, Body, GenerationRequest, all_of, not_too_deep
from hbserve.server.tool_formats import TokenId, ToolFormat


class CalledFunction(Body):
    """Attributes: arguments: a JSON object, as text; parsed_arguments: the client's copy of it, ignored."""

    name: str
    arguments: str
    parsed_arguments: Any = None


class ToolCall(Body):
    """A call that the model made in an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def as_in_templates(self) -> dict[str, Any]:
        """Return the call for the chat template, with its arguments as an object."""
        function = {"name": self.function.name, "arguments": _arguments(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}


class ChatMessage(Body):
    """One turn of a conversation. Its content is text, or a list of text parts, which are joined."""

    role: str
    content: str | None = None
    name: Any = None
    refusal: Any = None
    audio: Any = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    parsed: Any = None  # the client's copy of the content, ignored

    @field_validator("role")
    @classmethod
    def _check_role(cls, value: str) -> str:
        if value not in ("system", "developer", "user", "assistant", "tool"):
            raise ValueError(f"must be system, developer, user, assistant or tool, got {value!r}")
        return "system" if value == "developer" else value  # OpenAI's newer name; chat templates know the older

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
        if not all_of(texts, str):
            raise ValueError("the text of a part must be a string")
        return "".join(texts)

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: object, info: ValidationInfo) -> object:
        if value is None or (info.data.get("role") == "tool" and isinstance(value, str)):
            return value
        raise ValueError("must be text, and is supported in messages of role tool only")

    @field_validator("refusal", "audio", "function_call")
    @classmethod
    def _refuse(cls, value: object) -> object:
        if value is not None:
            raise ValueError("is not supported in messages")
        return value

    @model_validator(mode="after")
    def _check_whole(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are supported in messages of role assistant only")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError("tool_call_id is supported in messages of role tool only")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        return self

    def as_in_templates(self) -> dict[str, Any]:
        """Return the message for the chat template, with the arguments of calls as objects instead of text.

        Raises:
            InvalidRequestError: arguments are not a JSON object.
        """
        message: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.tool_calls:
            message["tool_calls"] = [call.as_in_templates() for call in self.tool_calls]
        others = {"tool_call_id": self.tool_call_id, "name": self.name}
        return message | {name: value for name, value in others.items() if value is not None}


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = not_too_deep(json.loads(text or "{}"))
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequestError("messages: the arguments of a tool call must be a JSON object, as text", "messages")
    return arguments


class FunctionDefinition(Body):
    """A function that the model may call. ``strict`` changes nothing: forced calls always fit the schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: AnyJson | None = None
    strict: bool | None = None

    def schema_of_arguments(self) -> dict[str, Any]:
        """Return ``parameters`` with the type that arguments always have, which many clients leave out.

        Raises:
            InvalidRequestError: the parameters are of another type.
        """
        parameters = self.parameters or {}
        kind = parameters.get("type", "object")
        if "object" not in (kind if isinstance(kind, list) else [kind]):
            what = f"the parameters of {self.name!r} are of type {json.dumps(kind)}"
            raise InvalidRequestError(f"tools: {what}; the arguments of a call are an object", "tools")
        return parameters | {"type": "object"}


class Tool(Body):
    """A tool that the model may call: always a function."""

    type: Literal["function"]
    function: FunctionDefinition


class ChosenFunction(Body):
    """The function of a `ToolChoice`."""

    name: str


class ToolChoice(Body):
    """One function that must be called."""

    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(Body):
    """The schema of an answer. ``name``, ``description`` and ``strict`` change nothing: the answer always fits."""

    model_config = Body.model_config | {"populate_by_name": True}

    name: str
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


class ChatCompletionRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _check_tool_choice(cls, value: object) -> object:
        function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
        if value in (None, "none", "auto", "required") or (isinstance(function, dict) and "name" in function):
            return value
        raise ValueError("must be none, auto, required, or {'type': 'function', 'function': {'name': ...}}")

    chat_template_kwargs: AnyJson | None = None

    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    prediction: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    service_tier: Any = None
    store: bool | None = None
    verbosity: Any = None
    web_search_options: Any = None

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools for the chat template; None if the model is told of none."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in self.tools]

    @property
    def forces_calls(self) -> bool:
        """Whether the answer must consist of calls."""
        return self.tool_choice not in (None, "none", "auto")

    def sampling(self, tool_format: ToolFormat | None, token_id: TokenId) -> SamplingParams:
        """Make the request's sampling parameters; without a limit the output may fill the context.

        Args:
            tool_format: how the model writes calls; None: it cannot.
            token_id: see `ToolFormat.grammar`.

        Raises:
            InvalidRequestError: a parameter cannot be honoured; ``param`` names it.
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
        more: dict[str, Any] = {"max_tokens": limits.pop() if limits else None, "logprobs": logprobs}
        forced = self._forced_functions()
        grammars = {"grammar": self.grammar, "response_format": self.response_format and self.response_format.grammar}
        requested = [name for name, grammar in grammars.items() if grammar is not None]
        requested += ["tool_choice"] if forced else []
        if len(requested) > 1:
            raise InvalidRequestError(f"{requested[1]} and {requested[0]} cannot be combined; send one", requested[1])
        if self.offered_tools and tool_format is None:
            raise InvalidRequestError(
                "the model's chat template has no tool calls, or has them in a form that this server does not know; "
                "it knows those of Hermes and Qwen, Llama 3, and Mistral",
                "tools",
            )
        if forced and tool_format is not None:
            several = self.tool_choice == "required" and self.parallel_tool_calls is not False
            more["grammar"] = tool_format.grammar(forced, several, token_id)
        elif requested:
            more["grammar"] = grammars[requested[0]]
        return self._sampling(**more)

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
