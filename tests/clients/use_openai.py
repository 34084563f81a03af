"""OpenAI's client: chats, streams whose sum is sent back, tools, parsed answers, and the same of responses."""

from __future__ import annotations

import os
from typing import Any, Literal

from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel

MODEL = os.environ["MODEL"]
SUM: Any = {"role": "user", "content": "What is 47 + 38?"}
client = OpenAI()  # OPENAI_BASE_URL and OPENAI_API_KEY are set


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Oslo", "Rome"]
    is_warm: bool


class GetQuestion(BaseModel):
    """Get a question of a kind."""

    kind: Literal["sum", "count"]


def chats() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=[SUM])
    print("chat:", answer.choices[0].message.content, answer.usage)
    assert answer.choices[0].message.content == "47 + 38 = 85."
    history = [SUM, answer.choices[0].message, {"role": "user", "content": "Count from 3 to 9."}]

    text = ""
    with client.chat.completions.stream(model=MODEL, messages=history) as stream:
        for event in stream:
            if event.type == "content.delta":
                text += event.delta
        final = stream.get_final_completion()
    print("stream:", text)
    assert text == final.choices[0].message.content == "3, 4, 5, 6, 7, 8, 9."
    history += [final.choices[0].message, {"role": "user", "content": "What is TTFT?"}]
    answer = client.chat.completions.create(model=MODEL, messages=history, store=True, reasoning_effort="low")
    print("after the stream:", answer.choices[0].message.content)
    assert "first token" in (answer.choices[0].message.content or "")

    parsed = client.chat.completions.parse(model=MODEL, messages=[SUM], response_format=Weather, max_tokens=300)
    print("parsed:", parsed.choices[0].message.parsed)
    assert isinstance(parsed.choices[0].message.parsed, Weather)


def tools() -> None:
    messages: list[Any] = [{"role": "user", "content": "Ask me something."}]
    offered: Any = {"model": MODEL, "tools": [pydantic_function_tool(GetQuestion)], "max_tokens": 300}
    with client.chat.completions.stream(
        **offered, messages=messages, tool_choice="required", parallel_tool_calls=False
    ) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls
    print("tool:", message.tool_calls[0].function)
    assert isinstance(message.tool_calls[0].function.parsed_arguments, GetQuestion)
    messages += [
        message,  # with `parsed_arguments` and an index, as the client accumulated it
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "What is 12 + 35?"},
    ]
    answer = client.chat.completions.create(**offered, messages=messages)
    print("after the tool:", answer.choices[0].message.content)
    assert answer.choices[0].message.content == "12 + 35 = 47."


def responses() -> None:
    first = client.responses.create(model=MODEL, input="Remember: dog parrot, eagle maple.", instructions="Be brief.")
    second = client.responses.create(model=MODEL, input="What is eagle?", previous_response_id=first.id)
    print("response:", second.output_text, second.usage)
    assert second.output_text == "You said eagle maple."

    with client.responses.stream(model=MODEL, input=[SUM]) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    print("streamed response:", text)
    assert text == final.output_text == "47 + 38 = 85."
    more = client.responses.create(
        model=MODEL, input=[SUM, *final.output, {"role": "user", "content": "Count from 3 to 9."}], store=False
    )
    assert more.output_text == "3, 4, 5, 6, 7, 8, 9."

    parsed = client.responses.parse(model=MODEL, input=[SUM], text_format=Weather, max_output_tokens=300)
    print("parsed response:", parsed.output_parsed)
    assert isinstance(parsed.output_parsed, Weather)

    tool: Any = {
        "type": "function",
        "name": "get_question",
        "description": "Get a question.",
        "parameters": GetQuestion.model_json_schema() | {"additionalProperties": False},
        "strict": True,
    }
    called = client.responses.create(model=MODEL, input="Ask me.", tools=[tool], tool_choice="required")
    [call] = [item for item in called.output if item.type == "function_call"]
    print("call of a response:", call.name, call.arguments)
    GetQuestion.model_validate_json(call.arguments)
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "What is 62 + 19?"}
    after = client.responses.create(model=MODEL, input=[output], previous_response_id=called.id, tools=[tool])
    print("after the call:", after.output_text)
    assert after.output_text == "62 + 19 = 81."


print([model.id for model in client.models.list()])
chats()
tools()
responses()
