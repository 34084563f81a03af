"""Tokenizers and incremental detokenization."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbserve.errors import InvalidRequestError, ModelError
from hbserve.tokenizer import IncrementalDetokenizer, Tokenizer
from tests.support import tiny_tokenizers
from tests.support.scheduler_parts import DEMO

WORDS = "the cat sat on the mat"
EMOJI = "🙂👩‍👩‍👧 é 你好"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.byte_fallback(tmp_path_factory.mktemp("byte_fallback")))


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.metaspace(tmp_path_factory.mktemp("metaspace")))


@pytest.fixture(scope="module")
def word_pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.word_pieces(tmp_path_factory.mktemp("word_pieces")))


def deltas(tokenizer: Tokenizer, token_ids: list[int], **options: object) -> list[str]:
    """Return all deltas up to a stop string, with the rest at the end."""
    detokenizer = IncrementalDetokenizer(tokenizer, **options)  # type: ignore[arg-type]
    parts = []
    for token_id in token_ids:
        parts.append(detokenizer.push(token_id))
        if detokenizer.stop_string is not None:
            return parts
    return [*parts, detokenizer.finish()]


def single_bytes(tokenizer: Tokenizer, text: str) -> list[int]:
    """Write the text as tokens of one byte each."""
    by_bytes = {tokenizer.token_bytes(token_id): token_id for token_id in reversed(range(tokenizer.vocab_size))}
    return [by_bytes[bytes([byte])] for byte in text.encode()]


# --- whole texts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [WORDS, EMOJI, " leading and trailing ", "line\nline\n\n", "\t"])
def test_decoding_undoes_encoding(byte_level: Tokenizer, byte_fallback: Tokenizer, text: str) -> None:
    assert byte_level.decode(byte_level.encode(text)) == text
    assert byte_fallback.decode(byte_fallback.encode(text)) == text


def test_chat_template_frames_the_conversation(byte_level: Tokenizer) -> None:
    ids = byte_level.encode_chat([{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}])
    expected = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert byte_level.decode(ids, skip_special_tokens=False) == expected
    assert ids[0] == 1  # the marker is one token, not its letters


def test_messages_that_the_template_rejects(byte_level: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="begins with a user") as caught:
        byte_level.encode_chat([{"role": "assistant", "content": "hi"}])
    assert caught.value.param == "messages"
    with pytest.raises(InvalidRequestError, match="empty"):
        byte_level.encode_chat([])


def test_calls_are_written_in_the_form_that_the_template_takes(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "ö"}'}}
    chat: list[Any] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    for arguments in ("call.function.arguments | tojson", "'' + call.function.arguments"):
        template = "{% for m in messages %}{{ m.role }}{{ m.content }}{% for call in m.tool_calls or [] %}"
        template += f"{{{{ call.function.name }}}}{{{{ {arguments} }}}}{{% endfor %}}{{% endfor %}}"
        tokenizer = Tokenizer(tiny_tokenizers.byte_level(tmp_path / str(len(arguments)), template))
        assert tokenizer.decode(tokenizer.encode_chat(chat)) == 'userxassistantf{"a": "ö"}'


def test_model_without_chat_template(byte_fallback: Tokenizer) -> None:
    assert not byte_fallback.has_chat_template
    with pytest.raises(InvalidRequestError, match="no chat template") as caught:
        byte_fallback.encode_chat([{"role": "user", "content": "hi"}])
    assert caught.value.param == "messages"


def test_end_tokens_are_all_that_any_file_names(tmp_path: Path) -> None:
    folder = tiny_tokenizers.byte_level(tmp_path)  # its own end token is 2
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 7}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert Tokenizer(folder).end_token_ids == {2, 7, 9}


def test_end_tokens_come_from_the_models_folder_if_the_tokenizer_has_another(tmp_path: Path) -> None:
    folder = tiny_tokenizers.byte_level(tmp_path / "tokenizer")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 11}}))
    assert Tokenizer(folder, model).end_token_ids == {2, 11}


@pytest.mark.parametrize("value", ["2", {"id": 2}, [[2]], 2.5, True, [True]])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_end_tokens_that_are_no_ids_are_refused_by_file_and_key(file: str, value: object, tmp_path: Path) -> None:
    folder = tiny_tokenizers.byte_level(tmp_path)
    (folder / file).write_text(json.dumps({"model_type": "llama", "eos_token_id": value}))
    with pytest.raises(ModelError, match=f"{file}: eos_token_id must be a token id"):
        Tokenizer(folder)


def test_end_tokens_may_be_written_as_any_json_number(tmp_path: Path) -> None:
    folder = tiny_tokenizers.byte_level(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7.0, 9, None]}))
    assert Tokenizer(folder).end_token_ids == {2, 7, 9}


def test_training_time_truncation_and_padding_are_off(tmp_path: Path) -> None:
    folder = tiny_tokenizers.byte_level(tmp_path)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(WORDS)) == WORDS


def test_folder_without_tokenizer_takes_token_ids_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.end_token_ids == {5}
    assert "".join(deltas(tokenizer, [1, 2, 3])) == tokenizer.decode([1, 2, 3]) == ""
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        tokenizer.encode("hi")
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])


def test_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=str(tmp_path)):
        Tokenizer(tmp_path)


def test_added_tokens_are_text_whatever_the_alphabet_of_the_vocabulary(tmp_path: Path) -> None:
    """Byte-level vocabularies write byte F6 as ö, and SentencePiece writes a space as ▁; added tokens do neither."""
    for kind, words in (
        (tiny_tokenizers.byte_level, ["schön", "naïve", "ö", "Ġx", "plain"]),
        (tiny_tokenizers.byte_fallback, ["a▁b", "<0x41>x", "schön"]),
        (tiny_tokenizers.metaspace, ["a▁b", "schön"]),
    ):
        folder = kind(tmp_path / kind.__name__)
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.add_tokens(words)
        backend.add_special_tokens(["<|größe▁|>"])
        backend.save(str(folder / "tokenizer.json"))
        tokenizer = Tokenizer(folder)
        for word in [*words, "<|größe▁|>"]:
            token_id = tokenizer.added_token_id(word)
            assert token_id is not None
            assert tokenizer.token_bytes(token_id) == word.encode()
            assert tokenizer.decode([token_id], skip_special_tokens=False) == word
            assert "".join(deltas(tokenizer, [token_id], skip_special_tokens=False)) == word
        text = "the cat"
        ids = [*tokenizer.encode(text), tokenizer.added_token_id(words[0]), *tokenizer.encode(" sat")]
        assert tokenizer.decode(ids).startswith(f"{text}{words[0]}")  # type: ignore[arg-type]


def test_texts_that_the_tokenizer_cannot_encode_are_refused(tmp_path: Path) -> None:
    folder = tiny_tokenizers.word_pieces(tmp_path)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["unk_token"] = "[none]"
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(InvalidRequestError, match="cannot encode the prompt"):
        Tokenizer(str(folder)).encode("☃")


def test_lone_surrogate_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="surrogate"):
        byte_level.encode("\ud83d")


# --- deltas --------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_deltas_add_up_to_the_text_of_any_tokens(byte_level: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size + 3), max_size=40))
    skip = data.draw(st.booleans())
    assert "".join(deltas(byte_level, ids, skip_special_tokens=skip)) == byte_level.decode(
        ids, skip_special_tokens=skip
    )


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace"])
@given(text=st.text(max_size=30))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_output_continues_its_prompt(kind: str, request: pytest.FixtureRequest, text: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    prompt, ids = tokenizer.encode("one"), tokenizer.encode(text)
    output = "".join(deltas(tokenizer, ids))
    assert tokenizer.decode(prompt) + output == tokenizer.decode([*prompt, *ids])
    pieces = b"".join(map(tokenizer.token_bytes, ids)).decode()  # with spaces before words
    assert pieces.replace("<unk>", "") == output


@given(text=st.text("catonms. ", max_size=30))
@settings(max_examples=100, deadline=None)
def test_deltas_add_up_where_tokens_depend_on_their_neighbours(word_pieces: Tokenizer, text: str) -> None:
    ids = word_pieces.encode(text)
    assert "".join(deltas(word_pieces, ids)) == word_pieces.decode(ids)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_nothing_is_lost_or_raised_for_malformed_bytes(byte_fallback: Tokenizer, data: st.DataObject) -> None:
    byte_tokens = st.sampled_from([3 + byte for byte in (0x41, 0x80, 0xC3, 0xE4, 0xF0, 0xFF)])
    noise = data.draw(st.lists(byte_tokens, max_size=80))
    before, after = byte_fallback.encode("the cat"), byte_fallback.encode("sat on")
    text = "".join(deltas(byte_fallback, [*before, *noise, *after]))
    assert text == bytes([*b" the cat", *(token_id - 3 for token_id in noise), *b" sat on"]).decode("utf-8", "replace")


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_characters_are_never_shown_in_part(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    parts = deltas(tokenizer, single_bytes(tokenizer, EMOJI))
    assert "".join(parts) == EMOJI
    assert not any("\ufffd" in part for part in parts)
    assert parts[:4] == ["", "", "", "🙂"]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_half_a_character_at_the_end_is_flushed(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    *parts, flushed = deltas(tokenizer, single_bytes(tokenizer, "a🙂")[:-1])
    assert "".join(parts) == "a"
    assert flushed.strip("\ufffd") == ""
    assert flushed


def test_special_tokens_are_shown_on_request(byte_level: Tokenizer) -> None:
    ids = [*byte_level.encode("a"), 1, *byte_level.encode("<tool call>b")]
    assert "".join(deltas(byte_level, ids)) == "a<tool call>b"
    assert "".join(deltas(byte_level, ids, skip_special_tokens=False)) == "a<|im_start|><tool call>b"


# --- stop strings --------------------------------------------------------------------------------


def test_stop_string_over_token_boundaries(byte_level: Tokenizer) -> None:
    ids = single_bytes(byte_level, "say END. more")
    detokenizer = IncrementalDetokenizer(byte_level, stop=["END."])
    parts = [detokenizer.push(token_id) for token_id in ids[:8]]
    assert parts == ["s", "a", "y", " ", "", "", "", ""]
    assert detokenizer.stop_string == "END."


def test_text_that_only_began_like_a_stop_string_is_released(byte_level: Tokenizer) -> None:
    parts = deltas(byte_level, single_bytes(byte_level, "EEND! E"), stop=["END."])
    assert parts == ["", "E", "", "", "END!", " ", "", "E"]


def test_first_complete_stop_string_wins_within_one_token(byte_level: Tokenizer) -> None:
    [the] = byte_level.encode("the")
    detokenizer = IncrementalDetokenizer(byte_level, stop=["thex", "the", "h"])
    assert detokenizer.push(the) == "t"
    assert detokenizer.stop_string == "h"


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_stop_does_not_depend_on_token_boundaries(byte_level: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(st.text("abé🙂", max_size=20))
    stops = data.draw(st.lists(st.text("abé🙂", min_size=1, max_size=4), min_size=1, max_size=3))
    # The earliest prefix that ends with a stop string, without it; character by character.
    ends = [(end, end - len(stop)) for end in range(len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    expected = text[: min(ends)[1]] if ends else text
    for ids in (byte_level.encode(text), single_bytes(byte_level, text)):
        assert "".join(deltas(byte_level, ids, stop=stops)) == expected


def test_stop_strings_do_not_count_before_min_tokens(byte_level: Tokenizer) -> None:
    ids = single_bytes(byte_level, "ababab")
    assert "".join(deltas(byte_level, ids, stop=["ab"], min_tokens=3)) == "ab"
    assert "".join(deltas(byte_level, ids, stop=["ab"], min_tokens=4)) == "abab"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace", "word_pieces"])
def test_a_stop_string_may_be_the_text_of_a_special_token(kind: str, request: pytest.FixtureRequest) -> None:
    """Special tokens are not part of the text, so the token itself ends it."""
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    special = {"byte_level": "<|im_start|>", "word_pieces": "[SEP]"}.get(kind, "<s>")
    special_id = tokenizer.added_token_id(special)
    assert special_id is not None
    cat, dog = tokenizer.encode("the cat"), tokenizer.encode(" dog")
    ids = [*cat, special_id, *dog]
    text = "".join(deltas(tokenizer, cat))
    assert "".join(deltas(tokenizer, ids, stop=["the x", special])) == text
    assert "".join(deltas(tokenizer, ids, stop=[special], include_stop=True)) == text + special
    assert "".join(deltas(tokenizer, ids, stop=[special], min_tokens=len(cat) + 1)) == text
    assert "".join(deltas(tokenizer, ids, stop=[special], min_tokens=len(cat) + 2)) == "".join(deltas(tokenizer, ids))
    assert "".join(deltas(tokenizer, ids, stop=[special], skip_special_tokens=False)).rstrip() == text
    detokenizer = IncrementalDetokenizer(tokenizer, stop=[special])
    assert [detokenizer.push(token_id) and "" for token_id in [*cat, special_id]][-1] == ""
    assert detokenizer.stop_string == special


def test_text_held_back_is_shown_when_a_special_token_ends_the_text(byte_level: Tokenizer) -> None:
    special_id = byte_level.added_token_id("<|im_start|>")
    assert special_id is not None
    ids = [*single_bytes(byte_level, "ab"), special_id]
    assert deltas(byte_level, ids, stop=["abc", "<|im_start|>"]) == ["", "", "ab"]


def test_long_output_costs_no_more_per_token(word_pieces: Tokenizer) -> None:
    sizes: list[int] = []
    decode = word_pieces.decode

    class Counting(Tokenizer):
        def __init__(self) -> None:
            self.__dict__.update(word_pieces.__dict__)

        def decode(self, token_ids: list[int], **options: bool) -> str:  # type: ignore[override]
            sizes.append(len(token_ids))
            return decode(token_ids, **options)

    ids = word_pieces.encode(" ".join([WORDS] * 100))
    deltas(Counting(), ids)
    assert max(sizes) <= 2 * 32  # tokens decoded at once, for any length of the output


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral"])
def test_tokenizer_json_is_used_unchanged_for_every_model(tmp_path: Path, model_type: str) -> None:
    folder = tiny_tokenizers.metaspace(tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = Tokenizer(folder)
    token_ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("the cat").ids
    assert tokenizer.encode("the cat") == token_ids
    assert tokenizer.decode(token_ids) == "the cat"


@pytest.mark.slow
def test_several_threads_may_load_the_first_tokenizers_of_a_process(tmp_path: Path) -> None:
    program = (
        "import sys; from concurrent.futures import ThreadPoolExecutor; from hbserve.tokenizer import Tokenizer\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    print(*(one.encode('the cat') for one in pool.map(Tokenizer, sys.argv[1:] * 4)), sep='\\n')"
    )
    folder = tiny_tokenizers.metaspace(tmp_path)
    command = [sys.executable, "-c", program, str(folder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    assert lines == [str(Tokenizer(str(folder)).encode("the cat"))] * 4


def test_without_a_configuration_the_tokenizers_file_is_used_as_it_is(tmp_path: Path) -> None:
    """For Qwen's model types transformers would take a class that splits words by other rules."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer(str(folder)).encode("What is 47 + 38?") == Tokenizer(str(DEMO)).encode("What is 47 + 38?")
