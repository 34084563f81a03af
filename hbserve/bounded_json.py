"""Bounds of JSON documents that strangers send: how much work a document is, without and with reading it.

Reading JSON takes a time that its values decide, not its bytes: 30 MB in one string take 30 ms, in a million values a
second. An event loop reads light documents itself. A thread beside it reads moderate ones, which holds Python's lock
for some milliseconds. Another process reads the others.
"""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec

from hbserve.errors import ContextLengthError, InvalidRequestError

LIGHT_VALUES = 512
"""Values that an event loop may read and check in one go: about a millisecond, also if every one of them is wrong."""
LIGHT_BYTES = 2**16
MODERATE_VALUES = 16_384
MODERATE_BYTES = 2**20
MAX_VALUES = 16_384
"""Values of a body, without those of `_FREE` and `_NUMBERS`."""
MAX_FREE_VALUES = 65_536
"""Values of schemas, template variables and other JSON that no part of the server checks one by one."""
MAX_WRITTEN_VALUES = 262_144
"""Values of JSON within texts: the arguments of calls."""
_FREE = frozenset({"parameters", "schema", "chat_template_kwargs", "metadata", "arguments"})
_NUMBERS = frozenset({"prompt", "tokens"})


def max_values(document: bytes | bytearray) -> int:
    """Return a bound for the number of values, and of characters that are written in a longer form.

    Counts separators, also those inside of strings: takes about 1 ms per 10 MB.
    """
    return sum(map(document.count, (b",", b":", b"[", b"{", b"\\"))) + 1


def is_light(document: bytes | bytearray) -> bool:
    """Return whether an event loop may read the document."""
    return len(document) <= LIGHT_BYTES and max_values(document) <= LIGHT_VALUES


def is_moderate(document: bytes | bytearray) -> bool:
    """Return whether a thread beside an event loop may read the document."""
    return len(document) <= MODERATE_BYTES and max_values(document) <= MODERATE_VALUES


def read_light(document: bytes | bytearray) -> Any:
    """Read a light document, in an event loop.

    Raises:
        InvalidRequestError: it is no JSON, or has a value that no process can send on.
    """
    value = _parse(document)
    _check_values(value)
    return value


def read(document: bytes | bytearray, max_token_ids: int | None = None, max_chars: int | None = None) -> Any:
    """Read a document of any size.

    Args:
        max_token_ids: limit of all token ids together.
        max_chars: limit of each prompt, and of all other texts together.

    Raises:
        InvalidRequestError: it is no JSON, has too many values, or one that no process can send on.
        ContextLengthError: its text cannot fit into the context.
    """
    value = _parse(document)
    _check(value, math.inf if max_token_ids is None else max_token_ids, math.inf if max_chars is None else max_chars)
    _check_values(value)
    return value


def _parse(document: bytes | bytearray) -> Any:
    try:
        return json.loads(document)
    except RecursionError:
        raise InvalidRequestError("the body is nested too deeply") from None
    except ValueError as error:  # no JSON, no UTF-8, or a number of too many digits
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None


def _check_values(value: Any) -> None:
    """Refuse what JSON can write and msgpack cannot, and name the parameter: any part of a body may be sent on."""
    problem = _problem(value)
    if problem is not None:
        items = value.items() if isinstance(value, dict) else ()
        param = next((name for name, item in items if _problem(item) is not None), None)
        raise InvalidRequestError(f"{param or 'the body'} holds {problem}", param)


def _problem(value: Any) -> str | None:
    try:
        msgspec.msgpack.encode(value)
    except UnicodeEncodeError:  # half a surrogate pair
        return "a lone surrogate, which is no character"
    except OverflowError:
        return "an integer of more than 64 bits"
    except RecursionError:
        return "too many levels"
    return None


def _check(value: Any, max_token_ids: float, max_chars: float) -> None:
    num_values = num_free = num_written = num_ids = num_chars = longest_prompt = 0
    open_: list[tuple[Any, bool, bool]] = [(value, False, False)]  # a container; whether it is free, or of token ids
    while open_:
        container, is_free, has_ids = open_.pop()
        items = container.items() if isinstance(container, dict) else ((None, item) for item in container or ())
        if not isinstance(container, dict | list):
            continue
        if is_free:
            num_free += len(container)
        elif has_ids and isinstance(container, list) and all(type(item) is int for item in container):
            num_ids += len(container)
            continue
        else:
            num_values += len(container)
        if num_values > MAX_VALUES or num_free > MAX_FREE_VALUES or num_ids > max_token_ids:
            break
        for key, item in items:
            if isinstance(item, dict | list):
                open_.append((item, is_free or key in _FREE, has_ids or key in _NUMBERS))
            elif isinstance(item, str):
                if has_ids or key in _NUMBERS:
                    longest_prompt = max(longest_prompt, len(item))
                else:
                    num_chars += len(item)
                if key in _FREE and num_chars <= max_chars:  # arguments of a call: JSON as text
                    num_written += max_values(item.encode("utf-8", "replace"))
    if (longest := max(num_chars, longest_prompt)) > max_chars:
        raise ContextLengthError(f"the body has {longest} characters; the model's context holds at most {max_chars}")
    if num_ids > max_token_ids:
        raise InvalidRequestError(f"the body has more than {max_token_ids} token ids", "prompt")
    if num_free > MAX_FREE_VALUES:
        raise InvalidRequestError(f"schemas and template variables have more than {MAX_FREE_VALUES} values")
    if num_written > MAX_WRITTEN_VALUES:
        raise InvalidRequestError(f"the arguments of calls have more than {MAX_WRITTEN_VALUES} values")
    if num_values > MAX_VALUES:
        raise InvalidRequestError(f"the body has more than {MAX_VALUES} values")
