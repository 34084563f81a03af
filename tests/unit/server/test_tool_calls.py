"""Calls of tools in the forms of the model families: the parser finds them, and grammars force them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from hbserve.grammar import Vocabulary, json_schema
from hbserve.server.answers.tool_calls import ToolCallParser
from hbserve.server.answers.tool_formats import tool_format
from hbserve.tokenizer import Tokenizer
from hbserve.tokenizer_files import read_vocabulary
from tests.support import tiny_tokenizers

# The parts of these families' templates that concern calls.
TEMPLATES = {
    "hermes": "{{ tools }}<tool_call>{{ call | tojson }}</tool_call>",
    "llama": '{{ tools }}<|start_header_id|>assistant<|end_header_id|>{"name": n, "parameters": p}<|python_tag|>',
    "mistral": "[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS] [{{ call | tojson }}]",
    "mistral_named": "[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]{{ name }}[ARGS]{{ arguments | tojson }}",
}
ARGUMENTS = '{"place": "O\\"s}{lo", "days": [1, {"a": 2}]}'
TWO_CALLS = {
    "hermes": f'<tool_call>\n{{"name": "f", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
    '<tool_call>{"arguments": {"b": 1}, "name": "g"}</tool_call>',
    "llama": f'{{"name": "f", "parameters": {ARGUMENTS}}}; {{"name": "g", "parameters": {{"b": 1}}}}',
    "mistral": f'[TOOL_CALLS] [{{"name": "f", "arguments": {ARGUMENTS}, "id": "1"}}, '
    '{"name": "g", "arguments": {"b": 1}}]',
    "mistral_named": f'[TOOL_CALLS]f[ARGS]{ARGUMENTS}[TOOL_CALLS]g[CALL_ID]123456789[ARGS]{{"b": 1}}',
}
NO_CALLS = {
    "hermes": 'a <tool b>\n\n<tool_call>{"no": 1}</tool_call> z <tool_call> x </tool_call>{"name": "f"}',
    "llama": '{"name": "Bob", "parameters": {"age": 3}} <|python_tag|>f(x) {"name": "f", "parameters": {}}',
    "mistral": '[TOOL_CALLS] is a mark [TOOL_CALLS] [1] [{"name": "f", "arguments": {}}] [TOOL_CALLS] [{"no": [}]}]',
    "mistral_named": 'f[ARGS]{} [TOOL_CALLS] is no call, {"a": 1} neither',
}


def parse(parser: ToolCallParser, text: str, size: int) -> tuple[str, list[tuple[str, str]]]:
    """Parse a text in pieces of ``size`` characters; return the visible text and the calls."""
    shown = ""
    calls: dict[int, Any] = {}
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    for number, piece in enumerate(pieces, start=1):
        more, changes = parser.feed(piece, last=number == len(pieces))
        shown += more
        for change in changes:
            known = calls.setdefault(change["index"], change | {"function": change["function"] | {"arguments": ""}})
            known["function"]["arguments"] += change["function"]["arguments"]
    assert list(calls) == list(range(parser.num_calls))
    assert len({call["id"] for call in calls.values()}) == len(calls)
    return shown, [(call["function"]["name"], call["function"]["arguments"]) for call in calls.values()]


@pytest.mark.parametrize("family", TEMPLATES)
def test_calls_are_found_for_any_size_of_pieces(family: str) -> None:
    form, names, text = tool_format(TEMPLATES[family]), {"f", "g"}, TWO_CALLS[family]
    assert form is not None
    both = [("f", ARGUMENTS), ("g", '{"b": 1}')]
    before = "" if form.mark_is_optional else "Let me see.\n"
    for size in (1, 2, 3, 7, 20, 1000):
        shown, calls = parse(ToolCallParser(form, names), f"{before}{text}\n", size)
        assert (shown, calls) == (before.rstrip(), both), size
        assert parse(ToolCallParser(form, names, only_one=True), before + text, size)[1] == both[:1]
        shown, calls = parse(ToolCallParser(form, names), NO_CALLS[family], size)
        assert (shown, calls) == (NO_CALLS[family], []), size
    if form.mark_is_optional:
        assert parse(ToolCallParser(form, names), form.mark + text, 4)[1] == both
    for end in range(len(text)):  # cut off anywhere: the calls so far, and no marks
        shown, calls = parse(ToolCallParser(form, names, forced=True), text[:end], 5)
        assert shown == ""
        assert [name for name, _ in calls] == [name for name, _ in both[: len(calls)]]
        if calls and calls[0][1] != ARGUMENTS:
            assert ARGUMENTS.startswith(calls[0][1])


def test_the_result_does_not_depend_on_the_pieces() -> None:
    rng = random.Random(3)
    parts = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", '{"name": "f", "arguments": ']
    parts += ['{"name": "g", "parameters":', '{"arguments": {}, "name": "f"}', *'{}[]"\\,; \nf', "<tool", "[TOOL", "é"]
    for _ in range(1500):
        family = rng.choice(list(TEMPLATES))
        form = tool_format(TEMPLATES[family])
        assert form is not None
        text = TWO_CALLS[family] * rng.randrange(2)
        cut = rng.randrange(len(text) + 1)
        text = text[:cut] + "".join(rng.choices(parts, k=rng.randrange(1, 20))) + text[cut:]
        whole, *others = [parse(ToolCallParser(form, {"f", "g"}), text, size) for size in (len(text), 1, 5)]
        assert others == [whole, whole], (family, text)


@pytest.mark.parametrize("marks", ["text", "added", "special"])
@pytest.mark.parametrize("family", TEMPLATES)
def test_the_parser_finds_every_call_that_a_grammar_allows(family: str, marks: str, tmp_path: Path) -> None:
    folder = tiny_tokenizers.byte_level(tmp_path, TEMPLATES[family])
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    if marks != "text":
        tags = ("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]")
        backend.add_tokens([AddedToken(tag, special=marks == "special") for tag in tags])
        backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer(folder)
    form = tool_format(tokenizer.tools_template)
    assert form is not None
    schema: dict[str, Any] = {"type": "object", "properties": {"x": {"enum": ["ab", 7]}}, "required": ["x"]}
    functions = {"f": schema | {"additionalProperties": False}, "f_2": schema | {"additionalProperties": False}}
    end = tokenizer.vocab_size
    vocabulary = Vocabulary(read_vocabulary(folder), end + 1)
    grammar = form.grammar(functions, True, tokenizer.added_token_id)
    vocabulary.check(grammar)
    for seed in range(3):
        rng, matcher = random.Random(seed), vocabulary.follow(grammar, [end])
        ids: list[int] = []
        while not ids or ids[-1] != end:
            words = matcher.mask()
            allowed = [i for i in range(end + 1) if words[i // 32] >> (i % 32) & 1]
            ids.append(end if end in allowed and rng.random() < 0.5 else rng.choice(allowed))
            if ids[-1] != end:
                matcher.advance(ids[-1:])
        assert matcher.problem is None
        number = tokenizer.added_token_id(form.mark)
        assert form.mark_is_optional or (number in ids) == (marks != "text")
        decoder = tokenizer.text_decoder(skip_special_tokens=True)
        text = "".join(decoder.feed(token_id) for token_id in ids)
        shown, calls = parse(ToolCallParser(form, functions), text, 3)
        assert shown == ""
        assert calls
        assert all(name in functions and json.loads(arguments)["x"] in ("ab", 7) for name, arguments in calls)


def test_grammars_may_name_the_text_of_an_added_token(tmp_path: Path) -> None:
    folder = tiny_tokenizers.byte_level(tmp_path)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([AddedToken("<think>", special=False)])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer(folder)
    end = tokenizer.vocab_size
    vocabulary = Vocabulary(read_vocabulary(folder), end + 1)
    grammars = ['start: "<think>x"', '%llguidance {}\nstart: "<think>x"', json_schema({"const": "<think>x"})]
    for grammar in grammars:
        vocabulary.check(grammar)
        matcher, text = vocabulary.follow(grammar, [end]), b""
        while (words := matcher.mask())[end // 32] >> (end % 32) & 1 == 0:
            token_id = next(i for i in range(end) if words[i // 32] >> (i % 32) & 1)
            matcher.advance([token_id])
            text += tokenizer.token_bytes(token_id)
        assert matcher.problem is None
        assert text.strip(b'"') == b"<think>x"


def test_templates_without_calls_or_with_unknown_forms() -> None:
    xml = "{{ tools }}<tool_call><function={{ name }}><parameter=x>1</parameter></function></tool_call>"
    for template in ("", "{{ messages }}", "{{ tools }} nothing", xml, "{{ tools }}<tool_call>f<arg_key>x</arg_key>"):
        assert tool_format(template) is None


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ('{"name": "f", "parameters": {"city": "Cadiz"}}', '{"city": "Cadiz"}'),
        ('{"parameters": {"city": "Cadiz"}, "name": "f"}', '{"city": "Cadiz"}'),
        ('{"name": "f", "arguments": null}', "{}"),
        ('{"name": "f", "parameters": null}', "{}"),
        ('{"name": "f"}', "{}"),
        ('{"type": "function", "name": "f", "id": "1"}', "{}"),
        ('{"name": "f", "arguments": ""}', "{}"),
        ('{"name": "f", "arguments": "{\\"city\\": 1}"}', '{"city": 1}'),
        ('{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}', '{"a": 1}'),
        ('{"name": "f", "arguments": {"a": 1}, "parameters": {"b": 1}}', '{"a": 1}'),
        ('{"name": "f", "arguments": [1]}', None),
        ('{"name": "f", "arguments": 4}', None),
        ('{"name": "f", "arguments": false}', None),
        ('{"name": "f", "arguments": "Cadiz"}', None),
        ('{"name": "f", "arguments": "[1]"}', None),
        ('{"name": "f", "args": {"city": "Cadiz"}}', None),
        ('{"name": "f", "city": "Cadiz"}', None),
        ('{"function": {"arguments": {}}}', None),
    ],
)
def test_arguments_are_an_object_under_either_key_or_the_text_is_no_call(
    call: str, arguments: str | None, size: int
) -> None:
    form = tool_format(TEMPLATES["hermes"])
    assert form is not None
    text = f"<tool_call>{call}</tool_call>"
    expected = (text, []) if arguments is None else ("", [("f", arguments)])
    assert parse(ToolCallParser(form, {"f"}), text, size) == expected
    llama = tool_format(TEMPLATES["llama"])
    assert llama is not None
    named_arguments = arguments is not None and ("arg" in call or "param" in call)
    shown, calls = parse(ToolCallParser(llama, {"f"}), call, size)
    assert (shown, calls) == (("", [("f", arguments)]) if named_arguments else (call, []))
