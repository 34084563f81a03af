"""Body of POST /v1/responses, and how it becomes the body of a chat completion."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from hbserve.errors import InvalidRequestError
from hbserve.server.bodies.border import AnyJson, Body, Lenient, all_of
from hbserve.server.chat_protocol import ChatCompletionRequest
from hbserve.server.protocol import GenerationRequest
from hbserve.server.responses.items import as_messages
from hbserve.tokenizer.conversation import not_too_deep

PARAM_NAMES = {
    "messages": "input",
    "prompt": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""Names here of parameters that chat completions call by other names."""

_LOGPROBS = "message.output_text.logprobs"
_OF_NO_EFFECT = {  # what a response of text and function calls never has
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "message.input_image.image_url",
}


class TextFormat(Body):
    """Form of the answer: any text, any JSON object, or a document that fits a JSON schema."""

    model_config = Body.model_config | {"populate_by_name": True}
    KEEPS_EMPTY = frozenset({"schema"})

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: AnyJson | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """How the text is written. Attributes: verbosity: a hint, without effect."""

    format: TextFormat | None = None
    verbosity: Any = None


class ReasoningOptions(Lenient):
    """How much the model thinks. A summary is never made, and asking for one has no effect."""

    effort: str | None = None


class ResponsesRequest(GenerationRequest):
    """Body of POST /v1/responses. It also takes HBServe's own parameters, as the other routes do."""

    KEEPS_EMPTY = frozenset({"input", "instructions"})

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    truncation: str | None = None
    chat_template_kwargs: AnyJson | None = None

    client_metadata: Any = None  # Codex says in it which of its turns sends the request

    background: Any = None
    context_management: Any = None
    conversation: Any = None
    max_tool_calls: Any = None
    prompt: Any = None

    @field_validator(
        *("background", "context_management", "conversation", "max_tool_calls", "prompt"),
        *("prompt_logprobs", "return_token_ids"),
    )
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not supported in responses")
        return None

    @field_validator("max_tokens")
    @classmethod
    def _refuse_max_tokens(cls, value: int | None) -> None:
        if value is not None:
            raise ValueError("is not a parameter of responses; send max_output_tokens")

    @field_validator("n")
    @classmethod
    def _check_n(cls, value: int | None) -> int | None:
        if value not in (None, 1):
            raise ValueError("must be 1: a response is one answer")
        return value

    @field_validator("truncation")
    @classmethod
    def _check_truncation(cls, value: str | None) -> str | None:
        if value not in (None, "disabled"):
            raise ValueError(f"must be 'disabled', because the server never cuts a prompt; got {value!r}")
        return value

    @field_validator("input", mode="before")
    @classmethod
    def _check_input(cls, value: Any) -> Any:
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not all_of(value, dict):
            raise ValueError("must be text, or a list of items")
        return not_too_deep(value)

    @field_validator("include")
    @classmethod
    def _check_include(cls, value: list[str] | None) -> list[str] | None:
        for name in value or ():
            if name not in _OF_NO_EFFECT | {_LOGPROBS}:
                raise ValueError(f"{name!r} is not supported")
        return value

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, value: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for number, tool in enumerate(value or ()):
            if tool.get("type", "function") != "function":
                raise ValueError(f"number {number} is of type {tool['type']!r}, which is not supported; send functions")
            not_too_deep(tool)
        return value

    @field_validator("tool_choice")
    @classmethod
    def _check_tool_choice(cls, value: Any) -> Any:
        if value is None or value in ("none", "auto", "required"):
            return value
        if isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("name"), str):
            return value
        if (
            isinstance(value, dict)
            and value.get("type") == "allowed_tools"
            and value.get("mode") in ("auto", "required")
        ):
            tools = value.get("tools")
            if isinstance(tools, list) and all_of(tools, dict):
                return value
        raise ValueError(
            "must be none, auto, required, {'type': 'function', 'name': ...}, or "
            "{'type': 'allowed_tools', 'mode': 'auto' or 'required', 'tools': [...]}"
        )

    @property
    def wants_logprobs(self) -> bool:
        """Whether the text comes with log-probabilities."""
        return _LOGPROBS in (self.include or ())

    def new_items(self) -> list[dict[str, Any]]:
        """Return the input as a list of items."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return self.input

    def as_chat(self, history: list[dict[str, Any]]) -> ChatCompletionRequest:
        """Return the body of the chat completion that gives the same answer.

        Args:
            history: items of earlier responses, which come before the input.

        Raises:
            InvalidRequestError: a parameter, or an item, cannot be honoured.
        """
        messages = [] if not self.instructions else [{"role": "system", "content": self.instructions}]
        messages += as_messages([*history, *self.new_items()], -len(history))
        while len(messages) > 1 and all(message["role"] in ("system", "developer") for message in messages[:2]):
            texts = [
                message["content"] for message in messages[:2]
            ]  # chat templates take one system message, the first
            messages[:2] = [{"role": "system", "content": "\n\n".join(texts)}]
        if not messages:
            raise InvalidRequestError("input must not be empty", "input")
        if self.top_logprobs and not self.wants_logprobs:
            raise InvalidRequestError(f"top_logprobs needs include: [{_LOGPROBS!r}]", "top_logprobs")
        same = [name for name in GenerationRequest.model_fields if name not in ("stream_options", "metadata", "store")]
        given: dict[str, Any] = {name: getattr(self, name) for name in same} | {
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "parallel_tool_calls": self.parallel_tool_calls,
            "chat_template_kwargs": self.chat_template_kwargs,
            "reasoning_effort": self.reasoning and self.reasoning.effort,
            "response_format": self._response_format(),
        }
        if self.wants_logprobs:
            given |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        given["tools"], given["tool_choice"] = self._chat_tools()
        try:
            return ChatCompletionRequest.model_validate(
                {name: value for name, value in given.items() if value is not None}
            )
        except ValidationError as error:
            first = error.errors()[0]
            name, *rest = [str(part) for part in first["loc"] if part != "function"]
            param = ".".join([PARAM_NAMES.get(name, name), *rest])
            raise InvalidRequestError(f"{param}: {first['msg'].removeprefix('Value error, ')}", param) from None

    def _response_format(self) -> dict[str, Any] | None:
        form = None if self.text is None else self.text.format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return {"type": "json_object"}
        return {"type": "json_schema", "json_schema": {"name": form.name or "answer", "schema": form.schema_ or {}}}

    def _chat_tools(self) -> tuple[list[dict[str, Any]] | None, str | dict[str, Any] | None]:
        """Return tools and choice in the form of chat completions, where a function is an object within its tool."""
        tools, choice = self.tools, self.tool_choice
        if isinstance(choice, dict) and choice["type"] == "allowed_tools":
            allowed = [tool.get("name") for tool in choice["tools"]]
            known = {tool.get("name") for tool in tools or ()}
            for name in allowed:
                if name not in known:
                    raise InvalidRequestError(f"tool_choice: there is no tool {name!r}", "tool_choice")
            tools = [tool for tool in tools or () if tool.get("name") in allowed]
            choice = choice["mode"]
        elif isinstance(choice, dict):
            choice = {"type": "function", "function": {"name": choice["name"]}}
        return [{"type": "function", "function": tool} for tool in tools or ()] or None, choice
