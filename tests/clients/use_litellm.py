"""LiteLLM: chats, streams put together again, tools, text completions, and responses."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it fetches prices
import litellm

litellm.suppress_debug_info = True

MODEL = f"hosted_vllm/{os.environ['MODEL']}"
AS_OPENAI = f"openai/{os.environ['MODEL']}"
SERVER: Any = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"]}
SUM = {"role": "user", "content": "What is 47 + 38?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_question",
        "description": "Get a question.",
        "parameters": {
            "type": "object",
            "properties": {"kind": {"type": "string", "enum": ["sum", "count"]}},
            "required": ["kind"],
            "additionalProperties": False,
        },
    },
}


async def main() -> None:
    for model in (MODEL, AS_OPENAI):
        answer: Any = litellm.completion(model=model, messages=[SUM], **SERVER)
        print(model, answer.choices[0].message.content)
        assert answer.choices[0].message.content == "47 + 38 = 85."

    chunks = [chunk async for chunk in await litellm.acompletion(model=MODEL, messages=[SUM], stream=True, **SERVER)]
    whole: Any = litellm.stream_chunk_builder(chunks, messages=[SUM])
    print("stream:", len(chunks), whole.choices[0].message.content)
    assert whole.choices[0].message.content == "47 + 38 = 85."

    messages: list[Any] = [SUM, whole.choices[0].message, {"role": "user", "content": "Ask me."}]
    offered: Any = {"model": AS_OPENAI, "tools": [TOOL], "max_tokens": 300, **SERVER}
    chunks = list(litellm.completion(messages=messages, tool_choice="required", stream=True, **offered))
    called: Any = litellm.stream_chunk_builder(chunks, messages=messages)
    [call] = called.choices[0].message.tool_calls
    print("tool:", call.function.name, call.function.arguments)
    assert json.loads(call.function.arguments)["kind"] in ("sum", "count")
    result = {"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": "What is 12 + 35?"}
    answer = litellm.completion(messages=[*messages, called.choices[0].message, result], **offered)
    print("after the tool:", answer.choices[0].message.content)
    assert answer.choices[0].message.content == "12 + 35 = 47."

    text: Any = litellm.text_completion(
        model=f"text-completion-openai/{os.environ['MODEL']}",
        prompt="<|im_start|>user\nWhat is 47 + 38?<|im_end|>\n<|im_start|>assistant\n",
        max_tokens=20,
        logprobs=2,
        **SERVER,
    )
    print("text:", text.choices[0].text)
    assert text.choices[0].text == "47 + 38 = 85."

    response: Any = litellm.responses(model=AS_OPENAI, input="What is 47 + 38?", **SERVER)
    print("response:", response.output[0].content[0].text)
    assert response.output[0].content[0].text == "47 + 38 = 85."


asyncio.run(main())
