"""JSON schemas as grammars: what a model can begin it can finish, and what it has finished fits its schema."""

from __future__ import annotations

import itertools
import json
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from hbserve.errors import InvalidRequestError
from hbserve.grammar import Vocabulary, json_schema
from hbserve.grammar.bytes import admits, schema_matcher
from hbserve.grammar.documents import problem_of
from hbserve.grammar.schemas import followable
from hbserve.server.answers.tool_formats import tool_format
from hbserve.tokenizer import Tokenizer
from hbserve.tokenizer_files import read_vocabulary
from tests.support import tiny_tokenizers
from tests.support.grammar_walk import random_output

pytest.importorskip("llguidance")

INTEGER = {"type": "integer"}
NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("schemas")))


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(read_vocabulary(tokenizer.path), tokenizer.vocab_size + 1)


def finished(vocabulary: Vocabulary, tokenizer: Tokenizer, grammar: str, seed: int) -> list[int]:
    return random_output(vocabulary, tokenizer, grammar, tokenizer.vocab_size, seed)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": INTEGER}, "patternProperties": {"^a$": INTEGER}, "additionalProperties": False},
        {"properties": {"a": {}, "ab": {}}, "patternProperties": {"^(a|ab)$": {}}, "additionalProperties": False},
        {"properties": {"n": False, "a": {}}, "patternProperties": {"^n$": {}}, "additionalProperties": False},
        {"properties": {"a": {}}, "patternProperties": {"^a$": {}, "^b": False}, "additionalProperties": False},
        {"properties": {"a": INTEGER}, "patternProperties": {"^a": INTEGER}, "additionalProperties": False},
        {"properties": {"a": INTEGER}, "patternProperties": {"^a$": INTEGER}},
        {"properties": {"node": {"$ref": "#/$defs/node"}, "a": INTEGER}, "additionalProperties": False},
        {"properties": {"nodes": {"type": "array", "items": {"$ref": "#/$defs/node"}}}, "required": ["nodes"]},
        {"properties": {"a": {"anyOf": [{"$ref": "#/$defs/node"}, INTEGER]}}, "required": ["a"]},
        {"properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["a"]},
    ],
    ids=json.dumps,
)
def test_every_document_that_is_begun_can_be_finished(
    schema: dict[str, Any], vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    """Patterns that match only declared names; references that never end beside others that do; also inside others."""
    schema = {"type": "object", "$defs": {"node": NODE}} | schema
    nested = {"type": "array", "items": {k: v for k, v in schema.items() if k != "$defs"}, "$defs": schema["$defs"]}
    for whole in (schema, nested):
        original = json_schema(whole)
        grammar = vocabulary.check(original)
        for seed in range(12):
            ids = finished(vocabulary, tokenizer, grammar, seed)
            assert vocabulary.problem_of(original, ids) is None


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
        {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1},
        {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "array", "items": {"$ref": "#"}, "minItems": 2}]}
        | {"$defs": {"node": NODE}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"enum": []},
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
        {"type": "object", "properties": {"a": {}}, "required": ["b"], "additionalProperties": False},
        {"type": "array", "items": False, "minItems": 1},
        {"type": "integer", "minimum": 5, "maximum": 4},
        {"type": "string", "pattern": "^abc$", "maxLength": 2},
        {"allOf": [{"type": "string"}, INTEGER]},
    ],
    ids=json.dumps,
)
def test_a_schema_without_a_finite_document_is_refused(schema: dict[str, Any], vocabulary: Vocabulary) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be followed") as caught:
        vocabulary.check(json_schema(schema))
    assert caught.value.param == "grammar"


@pytest.mark.parametrize("keyword", ["uniqueItems", "not", "contains", "dependentRequired", "propertyNames", "if"])
def test_a_keyword_that_cannot_be_held_is_refused_by_name(keyword: str, vocabulary: Vocabulary) -> None:
    with pytest.raises(InvalidRequestError, match=keyword):
        vocabulary.check(json_schema({keyword: True if keyword == "uniqueItems" else {}}))


@pytest.mark.parametrize(
    "grammar",
    ['start: "a" B | "c"\nB: /x/ & /y/', 'start: item+\nitem: "a" | "b" C "d"\nC: /[ab]/ & /[cd]/'],
)
def test_a_grammar_that_leads_into_a_dead_end_is_refused(grammar: str, vocabulary: Vocabulary) -> None:
    with pytest.raises(InvalidRequestError, match=r"dead end|cannot be followed"):
        vocabulary.check(grammar)


@pytest.mark.slow
def test_bounds_of_numbers_are_held(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    """No grammar that is accepted allows a number out of bounds, however it is written."""
    values = [None, -0.5, 0, 0.5, 1, 10]
    numbers = ["0", "1", "2", "10", "0.5", "0.25", "0.50", "0.05", "0.0", "1.0", "2.5", "100", "0.49", "0.51", "0.001"]
    letters = {bytes([byte]): 0 for byte in range(256)}
    for token_id in reversed(range(tokenizer.vocab_size)):
        letters[tokenizer.token_bytes(token_id)] = token_id
    num_accepted = 0
    for low, high, is_open_below, is_open_above in itertools.product(values, values, (False, True), (False, True)):
        schema: dict[str, Any] = {"type": "number"}
        if low is not None:
            schema["exclusiveMinimum" if is_open_below else "minimum"] = low
        if high is not None:
            schema["exclusiveMaximum" if is_open_above else "maximum"] = high
        if low is not None and high is not None and not low < high:
            continue
        grammar = vocabulary.check(json_schema(schema))
        for text in [*numbers, *(f"-{number}" for number in numbers)]:
            matcher = vocabulary.follow(grammar, [])
            matcher.advance([letters[bytes([byte])] for byte in text.encode()])
            if matcher.problem is None:
                num_accepted += 1
                assert problem_of(schema, text) is None, (schema, text)
    assert num_accepted > 500


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "0.5", "0"),
        ({"type": "number", "minimum": 0.1}, "0.1", "0.09"),
        ({"type": "number", "multipleOf": 0.1}, "699.2", "0.25"),
        ({"type": "array", "items": {"type": "string", "maxLength": 2}}, '["ab", "é€"]', '["abc"]'),
        ({"type": "array", "maxItems": 1}, "[1]", "[1, 2]"),
        ({"enum": [1, "a", None]}, "1.0", "2"),
        ({"const": {"a": [1]}}, '{"a": [1]}', '{"a": [2]}'),
        (
            {"type": "object", "required": ["a"], "additionalProperties": False, "properties": {"a": {}}},
            '{"a": 1}',
            "{}",
        ),
        ({"$ref": "#/$defs/x", "$defs": {"x": INTEGER}}, "3", "3.5"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "items": [INTEGER]}, "[1]", '["a"]'),
    ],
)
def test_a_finished_document_is_checked_against_its_schema(schema: dict[str, Any], right: str, wrong: str) -> None:
    assert problem_of(schema, right) is None
    problem = problem_of(schema, wrong)
    assert problem is not None
    assert "does not fit its schema" in problem


def test_the_check_of_a_document_neither_hangs_nor_fails() -> None:
    """Patterns of strangers may take for ever, references may lead elsewhere, and numbers may be huge."""
    text = json.dumps("a" * 60 + "b")
    for schema in ({"pattern": "^(a+)+$"}, {"$ref": "http://127.0.0.1:9/x"}, {"pattern": "("}, {"items": 5}):
        assert problem_of(schema, text) is None
    assert problem_of({"multipleOf": 3}, "1e400") is None
    assert problem_of({}, "[" * 5000 + "]" * 5000) is None


@pytest.mark.parametrize("kind", ["string", "integer", "number"])
@pytest.mark.parametrize("name", ["path", "binary", "password", "int32", "double", "x-own", "", None, 5])
def test_a_format_that_is_unknown_is_an_annotation(name: object, kind: str, vocabulary: Vocabulary) -> None:
    field = {"type": kind, "format": name}
    for schema in (field, {"type": "object", "properties": {"x": field}, "required": ["x"]}, {"items": field}):
        vocabulary.check(json_schema(schema))
    # In an enumeration it is data.
    grammar = vocabulary.check(json_schema({"enum": [{"format": name}]}))
    assert json.dumps(name) in grammar


def test_a_format_that_is_known_is_held(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    grammar = vocabulary.check(json_schema({"type": "string", "format": "date"}))
    text = tokenizer.decode(finished(vocabulary, tokenizer, grammar, 0))
    year, month, day = text.strip('"').split("-")
    assert len(year) == 4
    assert 1 <= int(month) <= 12
    assert 1 <= int(day) <= 31


def test_arguments_of_forced_calls_are_schemas_like_others(tokenizer: Tokenizer) -> None:
    """Unknown formats, dead ends and bounds within the parameters of a function; the finished call is checked."""
    form = tool_format("{{ tools }}<tool_call>{{ call | tojson }}</tool_call>")
    assert form is not None
    parameters = {
        "type": "object",
        "properties": {
            "path": {"type": "string", "format": "path"},
            "share": {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5},
        },
        "patternProperties": {"^path$": {}},
        "required": ["share"],
        "additionalProperties": False,
    }
    vocabulary = Vocabulary(read_vocabulary(tokenizer.path), tokenizer.vocab_size + 1)
    original = form.grammar({"f": parameters}, False, tokenizer.added_token_id)
    grammar = vocabulary.check(original)
    for seed in range(8):
        ids = finished(vocabulary, tokenizer, grammar, seed)
        assert vocabulary.problem_of(original, ids) is None
        arguments = json.loads(tokenizer.decode(ids).split('"arguments": ')[1].rsplit("}", 1)[0])
        assert 0 < arguments["share"] <= 0.5
    letters = {tokenizer.token_bytes(token_id): token_id for token_id in reversed(range(tokenizer.vocab_size))}
    call = '<tool_call>\n{"name": "f", "arguments": {"share": 0}}\n</tool_call>'
    assert vocabulary.problem_of(original, [letters[bytes([byte])] for byte in call.encode()]) is not None


# --- choices, and bounds in several places -------------------------------------------------------


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    friends: list[Annotated[Cat | Dog, Field(discriminator="kind")]]


class Owner(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]


SPREAD = {"$defs": {"positive": {"type": "number", "exclusiveMinimum": 0}, "small": {"maximum": 0.5}}}


def test_a_discriminated_union_of_pydantic_is_followed(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    """Also where it contains itself, and where its discriminator has a default."""
    schema = Owner.model_json_schema()
    assert "oneOf" in json.dumps(schema)
    original = json_schema(schema)
    grammar = vocabulary.check(original)
    kinds = set()
    for seed in range(12):
        ids = finished(vocabulary, tokenizer, grammar, seed)
        assert vocabulary.problem_of(original, ids) is None
        kinds.add(Owner.model_validate_json(tokenizer.decode(ids)).pet.kind)
    assert kinds == {"cat", "dog"}


@pytest.mark.parametrize(
    "choices",
    [
        [{"type": "string"}, INTEGER, {"type": "null"}],
        [{"const": "a"}, {"enum": ["b", 1]}],
        [{"type": "object", "properties": {"k": {"const": name}}, "required": ["k"]} for name in "ab"],
    ],
    ids=json.dumps,
)
def test_choices_that_are_told_apart_are_followed(
    choices: list[Any], vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    original = json_schema({"oneOf": choices})
    grammar = vocabulary.check(original)
    for seed in range(6):
        assert vocabulary.problem_of(original, finished(vocabulary, tokenizer, grammar, seed)) is None


@pytest.mark.parametrize(
    "choices",
    [
        [{"type": "number"}, INTEGER],
        [{"type": "object", "properties": {"k": {"const": 1}}}, {"type": "object", "properties": {"k": INTEGER}}],
        [{}, {"type": "string"}],
    ],
    ids=json.dumps,
)
def test_choices_that_are_not_told_apart_are_refused(choices: list[Any], vocabulary: Vocabulary) -> None:
    discriminators: list[dict[str, Any]] = [{}, {"discriminator": {"propertyName": "k"}}]
    for discriminator in discriminators:
        with pytest.raises(InvalidRequestError, match="oneOf are not told apart"):
            vocabulary.check(json_schema({"oneOf": choices} | discriminator))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "number", "allOf": [{"exclusiveMinimum": 0}, {"maximum": 0.5}]},
        {"allOf": [{"$ref": "#/$defs/positive"}, {"$ref": "#/$defs/small"}]},
        {"$ref": "#/$defs/positive", "maximum": 0.5},
        {"allOf": [{"type": "number", "minimum": -0.5}, {"exclusiveMaximum": 0}]},
        {"type": "number", "exclusiveMinimum": 0, "anyOf": [{"maximum": 0.5}, {"minimum": 7}]},
    ],
    ids=json.dumps,
)
def test_bounds_in_several_places_are_held_or_refused(schema: dict[str, Any], vocabulary: Vocabulary) -> None:
    schema = schema | SPREAD
    if "anyOf" in schema:
        with pytest.raises(InvalidRequestError, match="spread over choices"):
            vocabulary.check(json_schema(schema))
        return
    vocabulary.check(json_schema(schema))
    held = followable(schema)
    assert isinstance(held, dict)
    matcher = schema_matcher(held)
    texts = ["0", "-0", "0.0", "-0.5", "0.5", "0.25", "-0.25", "0.51", "-0.51", "7", "1"]
    taken = [text for text in texts if admits(matcher, text)]
    assert taken
    assert all(problem_of(schema, text) is None for text in taken)


def test_values_of_patterns_are_checked_in_finished_documents() -> None:
    schema = {"patternProperties": {"^a": INTEGER, "(x+x+)+y": {}}, "additionalProperties": False}
    assert problem_of(schema, '{"a1": 3}') is None
    assert "type at $" in (problem_of(schema, '{"a1": "no"}') or "")
    assert problem_of(schema, '{"b": 3}') is not None
    assert problem_of(schema, json.dumps({"x" * 60: 1})) is not None  # a pattern that takes Python for ever
