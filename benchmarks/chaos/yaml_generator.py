"""Random configurations in YAML: mostly of valid keys and plausible values, with some of anything."""

from __future__ import annotations

import random
from typing import Any, get_args

import msgspec

from hbserve.config import Config, InstanceConfig
from hbserve.config.fields import Section

_SCALARS = [
    *("0", "1", "-1", "2", "8", "16", "100", "101", "256", "65535", "65536", "1e3", "1.5", "0.9", ".inf", "-.inf"),
    *(
        ".nan",
        "true",
        "false",
        "yes",
        "off",
        "null",
        "~",
        "''",
        "abc",
        "'é'",
        "auto",
        "cpu",
        "nccl",
        "shm",
        "2001-01-01",
    ),
    *("2001-99-99", "12:30", "0x1F", "0b11", "017", "1_000", "9" * 30, "9" * 5000, "!!int abc", "!!float x", "!!str 1"),
    *("!!timestamp x", "!!binary YWJj", "!!bool x", "!!null x", "!x y", "[]", "{}", "[1, 2]", "{a: 1}", "*a", "&b x"),
    *(
        "127.0.0.1",
        "0.0.0.0",
        "localhost",
        "model",
        "nowhere",
        "'a\\0b'",
        '"\\0"',
        '"\\ud800"',
        "=",
        "<<",
        "a:b",
        "a.b:C",
    ),
]
_GOOD = {bool: ["true", "false"], int: ["1", "2", "4", "100"], float: ["0.5", "1", "0.9"], str: ["auto", "'127.0.0.1'"]}


def sections_of(kind: type[msgspec.Struct] = Config) -> dict[str, Any]:
    """The sections of a section, by key."""
    found = {}
    for field in msgspec.structs.fields(kind):
        for part in (field.type, *get_args(field.type)):
            if isinstance(part, type) and issubclass(part, Section):
                found[field.name] = InstanceConfig if field.name == "gpu_instances" else part
    return found


def random_configuration(generator: random.Random) -> str:
    """Make the text of one file."""
    lines = ["mode: " + generator.choice(["unified", "disaggregated", "semi_pd", "fast"])] * generator.randrange(2)
    names = [name for name in sections_of() if name not in ("model", "gpu_instances")]
    lines += ["model: {path: model, seed: &a 1}" if generator.random() < 0.8 else f"model: {_value(generator)}"]
    for name in generator.sample(names, generator.randrange(3)):
        key = name if generator.random() < 0.97 else _mangled(generator, name)
        lines.append(f"{key}: {_section(generator, sections_of()[name])}")
    if generator.random() < 0.3:
        instances = [_section(generator, InstanceConfig) for _ in range(generator.randrange(4))]
        lines.append(f"gpu_instances: [{', '.join(instances)}]")
    if generator.random() < 0.05:
        lines.append(generator.choice(lines))
    text = "\n".join(lines) + "\n"
    if generator.random() < 0.1:  # a typing error
        at = generator.randrange(len(text))
        text = (
            text[:at] + generator.choice(":{}[]&*!|>'\"%@`#-\t\n\x00\x85\ud800é") + text[at + generator.randrange(2) :]
        )
    return text


def _section(generator: random.Random, kind: type[msgspec.Struct]) -> str:
    if generator.random() < 0.05:
        return _value(generator)
    fields = msgspec.structs.fields(kind)
    fields = tuple(generator.sample(fields, min(len(fields), generator.randrange(3))))
    pairs = {field.name: _value(generator, field) for field in fields}
    if kind is InstanceConfig:
        name = generator.choice(["a", "b", "c", "d"])
        role = generator.choice(["prefill", "decode", "unified", "semi_pd", "both"])
        pairs = {"instance_id": name, "instance_type": role} | pairs
    return "{" + ", ".join(f"{_mangled(generator, key)}: {value}" for key, value in pairs.items()) + "}"


def _mangled(generator: random.Random, name: str) -> str:
    return name if generator.random() < 0.98 else generator.choice([name[1:], name + "s", "x", "''", "1", "[a]", "~"])


def _value(generator: random.Random, field: Any = None) -> str:
    if field is None or generator.random() < 0.4:
        return generator.choice(_SCALARS)
    kinds = [part for part in (field.type, *get_args(field.type)) if part in _GOOD]
    return generator.choice(_GOOD[kinds[0]]) if kinds else generator.choice(_SCALARS)
