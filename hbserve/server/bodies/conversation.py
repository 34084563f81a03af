"""Parameters that make a prompt of a conversation: messages, tools, and how the chat template is applied."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from hbserve.errors import InvalidRequestError
from hbserve.messages.text import ChatOptions
from hbserve.server.bodies.border import AnyJson, Body, Lenient, all_of
from hbserve.tokenizer.conversation import not_too_deep

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class FunctionDefinition(Lenient):
    """A function that the model may call. ``strict`` changes nothing: forced calls always fit the schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: AnyJson | None = None

    @field_validator("parameters", mode="before")
    @classmethod
    def _empty_list_is_empty(cls, value: object) -> object:
        return {} if value == [] else value  # PHP writes an empty object so

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


class Tool(Lenient):
    """A tool that the model may call: always a function."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class ChosenFunction(Lenient):
    """The function of a `ToolChoice`."""

    name: str


class ToolChoice(Lenient):
    """One function that must be called."""

    type: Literal["function"] = "function"
    function: ChosenFunction


class Conversation(Body):
    """The parameters that make a prompt of a conversation, shared by the routes that take one.

    `hbserve.tokenizer.conversation` checks the messages, where they are encoded.
    """

    messages: Any = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    chat_template: str | None = None
    chat_template_kwargs: AnyJson | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: str | None = None

    @field_validator("messages")
    @classmethod
    def _check_messages(cls, value: Any) -> Any:
        if not isinstance(value, list) or not all_of(value, dict):
            raise ValueError("must be a list of objects with role and content")
        return not_too_deep(value)

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _check_tool_choice(cls, value: object) -> object:
        function = value.get("function") if isinstance(value, dict) else None
        if value in (None, "none", "auto", "required") or (isinstance(function, dict) and "name" in function):
            return value
        raise ValueError("must be none, auto, required, or {'type': 'function', 'function': {'name': ...}}")

    @field_validator("reasoning_effort")
    @classmethod
    def _check_effort(cls, value: str | None) -> str | None:
        if value is not None and value not in _EFFORTS:
            raise ValueError(f"must be one of {', '.join(_EFFORTS)}, got {value!r}")
        return value

    @property
    def offers_tools(self) -> bool:
        """Whether the model is told of tools."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools for the chat template; None if the model is told of none."""
        if not self.tools or not self.offers_tools:
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    def chat_options(self) -> ChatOptions:
        """Return how the chat template is applied.

        Raises:
            InvalidRequestError: the answer can begin, or continue the last message, and not both.
        """
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "add_generation_prompt and continue_final_message cannot both be true", "continue_final_message"
            )
        begins = not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt
        return ChatOptions(
            variables=self.chat_template_kwargs or {},
            reasoning_effort=self.reasoning_effort,
            template=self.chat_template,
            add_generation_prompt=begins,
            continue_final_message=bool(self.continue_final_message),
        )
