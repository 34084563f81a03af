"""OpenAI's Agents SDK with its default model, which speaks the Responses API: tools, handoffs, streams, sessions."""

from __future__ import annotations

import asyncio
import os
from typing import Literal

from agents import Agent, ModelSettings, Runner, SQLiteSession, function_tool, handoff, set_tracing_disabled
from pydantic import BaseModel

MODEL = os.environ["MODEL"]
set_tracing_disabled(True)


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Oslo", "Rome"]
    is_warm: bool


@function_tool
def get_question(kind: Literal["sum", "count"]) -> str:
    """Get a question of a kind."""
    return {"sum": "What is 12 + 35?", "count": "Count from 3 to 9."}[kind]


async def main() -> None:
    adder = Agent(name="adder", instructions="You add.", model=MODEL)
    session = SQLiteSession("one")
    result = await Runner.run(adder, "What is 47 + 38?", session=session)
    print("run:", result.final_output)
    assert result.final_output == "47 + 38 = 85."
    streamed = Runner.run_streamed(adder, "Count from 3 to 9.", session=session)
    text = ""
    async for event in streamed.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            text += event.data.delta
    print("streamed:", text)
    assert text == streamed.final_output == "3, 4, 5, 6, 7, 8, 9."
    second = await Runner.run(adder, "What is 12 + 35?", previous_response_id=result.last_response_id)
    assert second.final_output == "12 + 35 = 47."

    settings = ModelSettings(tool_choice="required", parallel_tool_calls=False, max_tokens=300)
    asker = Agent(name="asker", model=MODEL, tools=[get_question], model_settings=settings)
    result = await Runner.run(asker, "Ask me something.")
    print("tool:", [item.type for item in result.new_items], result.final_output)
    assert result.final_output in ("12 + 35 = 47.", "3, 4, 5, 6, 7, 8, 9.")

    triage = Agent(name="triage", model=MODEL, handoffs=[handoff(adder)], model_settings=settings)
    result = await Runner.run(triage, "What is 47 + 38?")
    print("handoff:", result.last_agent.name, result.final_output)
    assert result.last_agent is adder

    forecaster = Agent(
        name="forecaster", model=MODEL, output_type=Weather, model_settings=ModelSettings(max_tokens=300)
    )
    result = await Runner.run(forecaster, "How is the weather?")
    print("structured:", result.final_output)
    assert isinstance(result.final_output, Weather)


asyncio.run(main())
