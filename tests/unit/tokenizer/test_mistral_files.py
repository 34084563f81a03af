"""Folders with Mistral's own tokenizer files alone, against the libraries that made the files."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from hbserve.errors import InvalidRequestError, ModelError
from hbserve.grammar import Vocabulary, json_schema
from hbserve.tokenizer import IncrementalDetokenizer, Tokenizer
from hbserve.tokenizer_files import read_vocabulary
from tests.support import tiny_tokenizers
from tests.support.grammar_walk import random_output
from tests.support.real_tokenizers import mistral_file
from tests.support.texts import TEXTS

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place ☀",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "question": [{"role": "user", "content": "Hi there"}],
    "system": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi\n\nthere  "},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": " ok?"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]}],
}
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
    {"role": "user", "content": "Thanks"},
]


def folder_with(data: Path, tmp_path: Path, name: str) -> Path:
    shutil.copy(data, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", "eos_token_id": 2}))
    return tmp_path


def decoded(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return "".join(map(detokenizer.push, token_ids)) + detokenizer.finish()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("tekken_240718.json", "tekken.json"),
        ("tokenizer.model.v1", "tokenizer.model"),
        ("mistral_instruct_tokenizer_240216.model.v2", "tokenizer.model"),
        ("mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model.v3"),
        ("mistral_instruct_tokenizer_241114.model.v7", "tokenizer.model"),
    ],
)
def test_real_files_do_as_mistral_common_does(data: str, name: str, tmp_path: Path) -> None:
    """Texts, conversations with tools, and grammars."""
    pytest.importorskip("mistral_common")
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    source = mistral_file(data)
    mistral: Any = MistralTokenizer.from_file(str(source))
    reference = mistral.instruct_tokenizer.tokenizer
    tokenizer = Tokenizer(folder_with(source, tmp_path, name))
    assert tokenizer.vocab_size == reference.n_words
    assert tokenizer.end_token_ids == {reference.eos_id}
    for text in TEXTS:
        expected = reference.encode(text, bos=True, eos=False)
        assert tokenizer.encode(text) == expected
        assert tokenizer.encode(text, add_special_tokens=False) == expected[1:]
        assert tokenizer.decode(expected) == (text if name == "tekken.json" else text.replace("▁", " "))
        space = " " if name != "tekken.json" and text else ""  # an output continues its prompt
        assert decoded(tokenizer, expected) == space + tokenizer.decode(expected)
    inst = tokenizer.added_token_id("[INST]")
    has_tools = data != "tokenizer.model.v1"
    if has_tools:
        assert inst == 3
        assert decoded(tokenizer, [inst]) == ""
        after_mark = reference.encode(" a" if name == "tekken.json" else "a", False, False)
        assert tokenizer.encode("[INST] a") == [1, 3, *after_mark]  # SentencePiece's space is only added to a text
    for chat, tools in [*((chat, None) for chat in CHATS.values()), *([(CALLS, [TOOL])] if has_tools else [])]:
        request = ChatCompletionRequest.from_openai(messages=chat, tools=tools)
        assert tokenizer.encode_chat(chat, tools) == mistral.encode_chat_completion(request).tokens
    vocabulary = Vocabulary(read_vocabulary(tmp_path), tokenizer.vocab_size)  # as a worker reads it
    (end,) = tokenizer.end_token_ids
    ids = random_output(vocabulary, tokenizer, json_schema({"enum": ["dög 🙂"]}), end, seed=0)
    assert decoded(tokenizer, ids).strip() == '"dög 🙂"'


def small_tekken(folder: Path, **changes: Any) -> Path:
    """Write a tekken.json of all bytes and a few words."""
    words = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" c", b" ca", b" cat"]
    document: dict[str, Any] = {
        "config": {
            "pattern": r" ?[^\s]+|\s+",
            "num_vocab_tokens": len(words) + 10,
            "default_vocab_size": len(words) + 30,
            "default_num_special_tokens": 30,
            "version": "v3",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
            for rank, word in enumerate(words)
        ],
    }
    folder.mkdir(exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps(document | changes))
    return folder


def test_a_tekken_file_needs_no_other_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = [name for name in sys.modules if name.startswith("mistral_common.")]
    for name in ("mistral_common", "sentencepiece", "tiktoken", *loaded):
        monkeypatch.setitem(sys.modules, name, None)
    tokenizer = Tokenizer(small_tekken(tmp_path))
    assert tokenizer.encode("the cat") == [1, 30 + 257, 30 + 260]
    assert tokenizer.decode(tokenizer.encode("the ca☃")) == "the ca☃"
    assert tokenizer.added_token_id("[TOOL_CALLS]") == 9
    assert tokenizer.added_token_id("<SPECIAL_29>") == 29
    with pytest.raises(
        InvalidRequestError, match=r"tekken\.json needs the package mistral-common .*hbserve\[mistral\]"
    ):
        tokenizer.encode_chat([{"role": "user", "content": "the cat"}])
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    assert Tokenizer(tmp_path).encode_chat([{"role": "user", "content": "the cat"}]) == [1, 30 + 257, 30 + 260]


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {}},
        {"config": None},
        {"vocab": 3},
        {"vocab": [{"token_bytes": "!"}]},
        {"vocab": [{}]},
        {"special_tokens": [{"rank": 10**9, "token_str": "<s>"}]},
        {"special_tokens": [{"rank": 0, "token_str": 7}]},
        {"special_tokens": "x"},
        {"config": {"pattern": "[", "default_num_special_tokens": 30}},
        {"config": {"pattern": ".", "default_num_special_tokens": 10**12}},
        {"config": {"pattern": ".", "default_num_special_tokens": -1}},
    ],
)
def test_broken_tekken_files_are_named(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tekken\.json"):
        Tokenizer(small_tekken(tmp_path, **changes))


def test_another_models_sentencepiece_file_has_no_chat_template(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    pytest.importorskip("mistral_common")
    folder = folder_with(mistral_file("tokenizer.model.v1"), tmp_path, "tokenizer.model")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InvalidRequestError, match=r"a llama model needs a file chat_template\.jinja"):
        Tokenizer(folder).encode_chat([{"role": "user", "content": "hi"}])


def test_a_tokenizer_json_beside_mistrals_files_is_used(tmp_path: Path) -> None:
    folder = small_tekken(tiny_tokenizers.byte_level(tmp_path))
    (folder / "tokenizer.model").write_bytes(b"x")
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    assert Tokenizer(folder).end_token_ids == {2}


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.model.v7"])
def test_the_error_without_sentencepiece_names_the_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ModelError, match=rf"{name} needs the package sentencepiece: pip install 'hbserve\[mistral\]'"):
        Tokenizer(tmp_path)


def test_a_broken_sentencepiece_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    for content in (b"", b"x", b"\0" * 1000):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ModelError, match=r"tokenizer\.model"):
            Tokenizer(tmp_path)
