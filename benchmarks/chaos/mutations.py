"""Mutations of documents: good ones with one or a few things broken."""

from __future__ import annotations

import copy
import random
from typing import Any

WRONG: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 7, 2.5, -0.5, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")),
    *(10**7, 10**12, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**400, "", " ", "64", "auto", "null", "\0", "é"),
    *("\ud800", "x" * 100_000, "\u202e\u0000\uffff", "🙂" * 1000, "{{ 7 * 7 }}", "%s%n", "../../etc/passwd"),
    *([], [1], [None], ["a", "b"], [[]], [[[[[[1]]]]]], {}, {"a": 1}, {"type": "x"}, {"": None}, {"\ud800": 1}),
    *(list(range(10_000)), ["a"] * 5000, {str(number): number for number in range(3000)}),
]
"""Values that take the place of good ones."""
NAMES = ["", "x", "type", "id", "name", "model", "__proto__", "__class__", "\0", "é", "\ud800", "a.b", "n" * 10_000]
"""Keys that nothing knows."""


def deep(depth: int, with_lists: bool) -> Any:
    """Return a document of so many levels."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if with_lists else {"a": value}
    return value


def mutate(document: Any, chance: random.Random) -> tuple[Any, str]:
    """Change one thing somewhere in a document of dictionaries and lists.

    Returns:
        The changed copy, and what was changed, in words.
    """
    holder = [copy.copy(document)]
    parent: Any = holder
    key: Any = 0
    steps: list[Any] = []
    while isinstance(parent[key], dict | list) and parent[key] and chance.random() < 0.85:
        parent[key] = copy.copy(parent[key])  # the rest is shared with the document
        parent = parent[key]
        key = chance.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        steps.append(key)
    where = ".".join(map(str, steps)) or "all"
    value = parent[key]
    match chance.choice(
        ["wrong"] * 6 + ["removed", "unknown", "renamed", "doubled", "wrapped", "deep", "other", "near"]
    ):
        case "removed" if steps:
            del parent[key]
            return holder[0], f"{where} removed"
        case "unknown" if isinstance(value, dict):
            name = chance.choice(NAMES)
            parent[key] = {**value, name: chance.choice(WRONG)}
            return holder[0], f"{where} has {name!r:.20}={parent[key][name]!r:.40}"
        case "renamed" if isinstance(parent, dict) and steps:
            name = chance.choice([*NAMES, str(key)[1:], f"{key}s", str(key).upper()])
            parent[name] = parent.pop(key)
            return holder[0], f"{where} renamed to {name!r:.20}"
        case "doubled" if isinstance(value, list | str):
            times = chance.choice([2, 30, 1000])
            parent[key] = value * times
            return holder[0], f"{where} {times} times"
        case "wrapped":
            parent[key] = [value] if chance.random() < 0.5 else {"type": value}
        case "deep":
            depth = chance.choice([50, 150, 300])
            parent[key] = deep(depth, chance.random() < 0.5)
            return holder[0], f"{where} {depth} levels deep"
        case "other":
            other = chance.choice(_nodes(document))
            parent[key] = other
        case "near" if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
            parent[key] = chance.choice([-value, value + 1, value - 1, value * 1000, float(value), str(value), 1 / 3])
        case "near" if isinstance(value, str):
            place = chance.randrange(len(value) + 1)
            parent[key] = (
                value[:place] + chance.choice(["\0", "\ud83d", "é", "{", '"', "\\", "\n"]) + value[place + 1 :]
            )
        case _:
            parent[key] = chance.choice(WRONG)
    return holder[0], f"{where}={parent[key]!r:.40}"


def _nodes(document: Any) -> list[Any]:
    found = [document]
    for node in found:
        if isinstance(node, dict | list):
            found += node.values() if isinstance(node, dict) else node
    return found


def mutate_bytes(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Change something in the written form of a document.

    Returns:
        The changed bytes, and what was changed, in words.
    """
    place = chance.randrange(len(data) + 1)
    match chance.choice(
        ["cut", "byte", "bit", "twice", "inserted", "removed", "encoding", "digits", "brackets", "whole"]
    ):
        case "cut":
            return data[:place], f"cut at {place}"
        case "byte":
            new = bytes([chance.randrange(256)])
            return data[:place] + new + data[place + 1 :], f"byte {place} is {new!r}"
        case "bit":
            changed = bytearray(data or b"\0")
            changed[place % len(changed)] ^= 1 << chance.randrange(8)
            return bytes(changed), f"a bit of byte {place % len(changed)}"
        case "twice":
            return data[:place] + data[place // 2 :], f"a part before {place} twice"
        case "inserted":
            new = chance.choice([b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\\u0000", b"\\ud800", b"\x1b[2J", b"//", b","])
            return data[:place] + new + data[place:], f"{new!r} at {place}"
        case "removed":
            end = min(len(data), place + chance.randint(1, 30))
            return data[:place] + data[end:], f"{place} to {end} removed"
        case "encoding":
            name = chance.choice(["utf-16", "utf-8-sig", "utf-32", "utf-7"])
            return data.decode("utf-8", "replace").encode(name, "replace"), f"in {name}"
        case "digits":
            return data[:place] + b"9" * chance.choice([30, 400, 5000]) + data[place:], f"digits at {place}"
        case "brackets":
            return data[:place] + chance.choice([b"[", b'{"a":']) * 50_000 + data[place:], f"brackets at {place}"
        case _:
            whole = [b"", b" ", b"\0", b"null", b"[]", b"{}", b"3", b'"x"', b"NaN", b"[" * 100_000, bytes(range(256))]
            new = chance.choice(whole)
            return new, f"{new!r:.20} in place of all"
