"""AutoGen: two agents in a team, whose messages have names; an agent with tools, and structured output."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any, Literal

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.messages import StructuredMessage
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import CancellationToken
from autogen_core.models import (
    AssistantMessage,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    ModelInfo,
    UserMessage,
)
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from pydantic import BaseModel

MODEL_INFO = ModelInfo(vision=False, function_calling=True, json_output=True, family="unknown", structured_output=True)


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Oslo", "Rome"]
    is_warm: bool


async def get_question(kind: Literal["sum", "count"]) -> str:
    """Get a question of a kind."""
    return {"sum": "What is 12 + 35?", "count": "Count from 3 to 9."}[kind]


async def main() -> None:
    model = OpenAIChatCompletionClient(model=os.environ["MODEL"], model_info=MODEL_INFO, max_tokens=300)
    writer = AssistantAgent("writer", model, system_message="You add.")
    reader = AssistantAgent("reader", model, model_client_stream=True, tools=[get_question])
    team = RoundRobinGroupChat([writer, reader], termination_condition=MaxMessageTermination(3))
    result = await team.run(task="What is 47 + 38?")
    print("team:", [(message.source, message.to_text()) for message in result.messages])
    assert [message.source for message in result.messages] == ["user", "writer", "reader"]
    assert result.messages[1].to_text() == "47 + 38 = 85."

    forecaster = AssistantAgent("forecaster", model, output_content_type=Weather)
    result = await forecaster.run(task="How is the weather?")
    print("structured:", result.messages[-1].to_text())
    assert isinstance(result.messages[-1], StructuredMessage)

    tool = FunctionTool(get_question, description="Get a question of a kind.", strict=True)
    messages: list[Any] = [UserMessage(content="Ask me something.", source="user")]
    called = await model.create(messages, tools=[tool], tool_choice="required")
    assert isinstance(called.content, list)
    [call] = called.content
    print("tool:", call.name, call.arguments)
    text = tool.return_value_as_string(await tool.run_json(json.loads(call.arguments), CancellationToken()))
    messages += [
        AssistantMessage(content=called.content, source="writer"),
        FunctionExecutionResultMessage(
            content=[FunctionExecutionResult(call_id=call.id, content=text, name=call.name, is_error=False)]
        ),
    ]
    answer = await model.create(messages, tools=[tool])
    print("after the tool:", answer.content)
    assert answer.content in ("12 + 35 = 47.", "3, 4, 5, 6, 7, 8, 9.")
    await model.close()


asyncio.run(main())
