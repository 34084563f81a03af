"""Pydantic AI with both of OpenAI's APIs: answers, streams, tools, typed output, histories."""

from __future__ import annotations

import asyncio
import os
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel

MODEL = os.environ["MODEL"]


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Oslo", "Rome"]
    is_warm: bool


async def main() -> None:
    for model in (OpenAIChatModel(MODEL), OpenAIResponsesModel(MODEL)):
        agent = Agent(model, instructions="You add.", model_settings={"max_tokens": 300})
        first = await agent.run("What is 47 + 38?")
        print("run:", first.output, first.usage)
        assert first.output == "47 + 38 = 85."
        async with agent.run_stream("Count from 3 to 9.", message_history=first.all_messages()) as streamed:
            text = await streamed.get_output()
        print("streamed:", text)
        assert text == "3, 4, 5, 6, 7, 8, 9."

        @agent.tool_plain
        def get_question(kind: Literal["sum", "count"]) -> str:
            """Get a question of a kind."""
            return {"sum": "What is 12 + 35?", "count": "Count from 3 to 9."}[kind]

        # Typed output is a tool that the model must call; native output is a schema.
        for kind in (Weather, NativeOutput(Weather)):
            typed = await agent.run("How is the weather?", output_type=kind)
            print("typed:", typed.output)
            assert isinstance(typed.output, Weather)


asyncio.run(main())
