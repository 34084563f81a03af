"""LangChain's ChatOpenAI: chains, streams, tools, structured output, and the Responses API."""

from __future__ import annotations

import os
from typing import Any, Literal

from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

MODEL = os.environ["MODEL"]


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Oslo", "Rome"]
    is_warm: bool


@tool
def get_question(kind: Literal["sum", "count"]) -> str:
    """Get a question of a kind."""
    return {"sum": "What is 12 + 35?", "count": "Count from 3 to 9."}[kind]


for responses in (False, True):
    model = ChatOpenAI(model=MODEL, max_tokens=300, use_responses_api=responses)
    chain = ChatPromptTemplate.from_messages([("system", "You add."), ("human", "What is {a} + {b}?")]) | model
    answer = chain.invoke({"a": 47, "b": 38})
    print("chain:", answer.text, answer.usage_metadata)
    assert answer.text == "47 + 38 = 85."

    history: list[Any] = [SystemMessage("You add."), HumanMessage("What is 47 + 38?")]
    whole = AIMessageChunk("")
    for chunk in model.stream(history):
        whole += chunk
    print("stream:", whole.text)
    assert whole.text == "47 + 38 = 85."

    history += [whole, HumanMessage("Ask me something.")]
    with_tools = model.bind_tools([get_question], tool_choice="any", strict=True)
    called = AIMessageChunk("")
    for chunk in with_tools.stream(history):
        called += chunk
    [call] = called.tool_calls
    print("tool:", call)
    result = get_question.invoke(call)
    assert isinstance(result, ToolMessage)
    answer = model.bind_tools([get_question]).invoke([*history, called, result])
    print("after the tool:", answer.text)
    assert answer.text == {"sum": "12 + 35 = 47.", "count": "3, 4, 5, 6, 7, 8, 9."}[call["args"]["kind"]]

    weather = model.with_structured_output(Weather).invoke("How is the weather?")
    print("structured:", weather)
    assert isinstance(weather, Weather)

weather = ChatOpenAI(model=MODEL, max_tokens=300).with_structured_output(
    Weather, method="function_calling", strict=True
)
print("structured by a function:", answer := weather.invoke("How is the weather?"))
assert isinstance(answer, Weather)
