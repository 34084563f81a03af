"""What unmodified clients of OpenAI's API send, as the HTTP exchange alone; `tests/clients` runs the clients."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from hbserve.server.responses import items
from hbserve.tokenizer import Tokenizer
from tests.support import tiny_tokenizers
from tests.support.http_server import MODEL, letters
from tests.support.scripted_scheduler import ScriptedScheduler, tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("exchanges"), tiny_tokenizers.TOOL_TEMPLATE))


@pytest.fixture
def max_model_len() -> int:
    return 1024


def say(scheduler: ScriptedScheduler, tokenizer: Tokenizer, text: str) -> None:
    """Have the model answer so."""
    scheduler.script = tokens(*letters(tokenizer, text), 2)


async def respond(http: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await http.post("/v1/responses", json={"model": MODEL} | body)


async def test_items_of_stored_responses_can_be_referred_to(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(scheduler, tokenizer, "eagle maple")
    first = (await respond(http, input="what is eagle?")).json()
    asked = (await http.get(f"/v1/responses/{first['id']}/input_items")).json()["data"]
    references = [{"type": "item_reference", "id": first["output"][0]["id"]}, {"id": asked[0]["id"]}]
    new = {"role": "user", "content": "and oak?"}
    second = (await respond(http, input=[references[1], references[0], new])).json()
    prompt = tokenizer.decode(scheduler.requests[-1].prompt_token_ids, skip_special_tokens=False)
    places = [prompt.index(text) for text in ("what is eagle?", "eagle maple", "and oak?")]
    assert places == sorted(places)

    # The second response has the items themselves, so they stay when the first goes.
    stored = (await http.get(f"/v1/responses/{second['id']}/input_items")).json()["data"]
    assert [item["id"] for item in stored[1:]] == [first["output"][0]["id"], asked[0]["id"]]
    await http.delete(f"/v1/responses/{first['id']}")
    assert (await respond(http, input=[*references, new], store=False)).status_code == 200

    twice = await respond(http, input=[new, references[0], references[0]])
    assert (twice.status_code, twice.json()["error"]["param"]) == (400, "input.2")
    monkeypatch.setattr(items, "MAX_REFERENCED_BYTES", 100)
    large = await respond(http, input=references)
    assert (large.status_code, large.json()["error"]["param"]) == (400, "input.0")
    await http.delete(f"/v1/responses/{second['id']}")
    gone = await respond(http, input=[new, *references])
    error = gone.json()["error"]
    assert (gone.status_code, error["param"], error["code"]) == (404, "input.1", "item_not_found")


def function(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]}
    return {"type": "function", "name": name, "description": "", "strict": False, "parameters": parameters}


async def test_a_turn_of_codex_with_its_functions(
    http: httpx.AsyncClient, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    request: dict[str, Any] = {
        "instructions": "",
        "input": [
            {
                "type": "message",
                "id": "msg_1",
                "role": "developer",
                "content": [{"type": "input_text", "text": "Code."}],
            },
            {
                "type": "message",
                "id": "msg_2",
                "role": "user",
                "content": [{"type": "input_text", "text": "list them"}],
            },
        ],
        "tools": [function("exec_command"), function("write_stdin")],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a2",
        "client_metadata": {"session_id": "01a2", "turn_id": "01a3"},
    }
    say(scheduler, tokenizer, 'I look.<tool_call>{"name": "exec_command", "arguments": {"cmd": "ls"}}</tool_call>')
    answer = await respond(http, **request)
    assert answer.status_code == 200, answer.text
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    message, call = events[-1]["response"]["output"]
    assert (message["type"], call["type"], call["name"], call["arguments"]) == (
        "message",
        "function_call",
        "exec_command",
        '{"cmd": "ls"}',
    )
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "a.txt"}
    say(scheduler, tokenizer, "one file")
    answer = await respond(http, **request | {"input": [*request["input"], message, call, result]})
    prompt = tokenizer.decode(scheduler.requests[-1].prompt_token_ids, skip_special_tokens=False)
    places = [prompt.index(text) for text in ("Code.", "list them", "I look.", '{"cmd": "ls"}', "a.txt")]
    assert places == sorted(places)


@pytest.mark.parametrize("kind", ["custom", "local_shell", "namespace", "web_search", "computer_use_preview"])
async def test_tools_that_are_no_functions_are_refused_by_name(http: httpx.AsyncClient, kind: str) -> None:
    tools = [function("exec_command"), {"type": kind, "name": "apply_patch"}]
    error = (await respond(http, input="x", tools=tools)).json()["error"]
    assert error["param"] == "tools"
    assert f"number 1 is of type {kind!r}" in error["message"]
