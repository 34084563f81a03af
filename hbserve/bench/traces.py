"""Traces of production traffic: lengths, times and shared prefixes, no text.

The suffix of the file name selects one of three formats:

- ``.csv``: Azure's LLM inference traces (Patel et al., Splitwise, ISCA 2024): ``TIMESTAMP``,
  ``ContextTokens``, ``GeneratedTokens``.
- ``.jsonl``: Mooncake's (Qin et al., FAST 2025): ``timestamp`` in ms, ``input_length``,
  ``output_length``, and ``hash_ids``, which name the prompt's 512-token blocks: equal ids at the
  beginning of two prompts are equal tokens. Its times are rounded down to steps of 3 s. The requests
  of a step are spread evenly over it; otherwise each step would be a burst that the traffic did not have.
- ``.json``: ShareGPT's: a list of conversations, each with ``conversations``, a list of ``from`` and
  ``value``. They have no times.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec

from hbserve.errors import ConfigError

BLOCK_TOKENS = 512
"""Tokens of the block that one of Mooncake's hash ids names; the last block may be partly full."""


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """One request of a trace.

    Attributes:
        arrival_s: seconds from the first request of the trace; None where the trace has no times.
        block_ids: names of the prompt's blocks; empty where the trace has none.
        token_ids: the prompt itself, where the trace has it.
    """

    arrival_s: float | None
    input_len: int
    output_len: int
    block_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()


def load_trace(path: Path, encode: Callable[[str], list[int]] | None = None) -> list[TraceEntry]:
    """Read all requests of a trace, by time.

    Args:
        encode: turns a text into tokens; only ShareGPT's format needs it.

    Raises:
        ConfigError: naming the file, and the line that is not of its format.
    """
    readers = {".csv": _read_azure, ".jsonl": _read_mooncake}
    try:
        if path.suffix == ".json":
            if encode is None:
                raise ConfigError(f"{path}: ShareGPT's format needs a tokenizer (bench serve --tokenizer)")
            entries = _read_sharegpt(path, encode)
        elif path.suffix in readers:
            entries = readers[path.suffix](path)
        else:
            raise ConfigError(f"{path}: a trace's name ends in .csv (Azure), .jsonl (Mooncake) or .json (ShareGPT)")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not entries:
        raise ConfigError(f"{path}: it has no usable request")
    if entries[0].arrival_s is not None:
        entries.sort(key=lambda entry: entry.arrival_s or 0.0)
    return entries


def _read_azure(path: Path) -> list[TraceEntry]:
    entries: list[TraceEntry] = []
    start: datetime | None = None
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        for row in rows:
            number = rows.line_num  # the reader skips empty lines but counts them
            try:
                # the traces of 2024 name the zone, UTC; those of 2023 do not
                time = datetime.fromisoformat(row["TIMESTAMP"]).replace(tzinfo=None)
                input_len, output_len = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except KeyError as error:
                raise ConfigError(f"{path}: not an Azure trace: there is no column {error}") from None
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{path}:{number}: not a line of an Azure trace: {error}") from None
            start = start or time
            if input_len < 0 or output_len < 0:
                raise ConfigError(f"{path}:{number}: not a line of an Azure trace: a negative number of tokens")
            if input_len > 0 and output_len > 0:
                entries.append(TraceEntry((time - start).total_seconds(), input_len, output_len))
    return entries


_BOM = b"\xef\xbb\xbf"  # some editors write it; it is no part of JSON

_Natural = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: _Natural
    output_length: _Natural
    hash_ids: list[_Natural]


def _read_mooncake(path: Path) -> list[TraceEntry]:
    decoder = msgspec.json.Decoder(_MooncakeLine)
    entries: list[TraceEntry] = []
    for number, line in enumerate(path.read_bytes().removeprefix(_BOM).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            one = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}:{number}: not a line of a Mooncake trace: {error}") from None
        if len(one.hash_ids) * BLOCK_TOKENS < one.input_length:
            raise ConfigError(f"{path}:{number}: {len(one.hash_ids)} blocks do not hold {one.input_length} tokens")
        if one.input_length > 0 and one.output_length > 0:
            entries.append(TraceEntry(one.timestamp / 1000, one.input_length, one.output_length, tuple(one.hash_ids)))
    return _spread(entries)


def _spread(entries: list[TraceEntry]) -> list[TraceEntry]:
    """Sort requests by time; spread those of equal times until the next time."""
    entries.sort(key=lambda entry: entry.arrival_s or 0.0)
    steps = [list(step) for _, step in itertools.groupby(entries, key=lambda entry: entry.arrival_s or 0.0)]
    starts = [step[0].arrival_s or 0.0 for step in steps]
    gaps = [later - sooner for sooner, later in itertools.pairwise(starts)]
    gaps = [*gaps, gaps[-1] if gaps else 0.0][: len(starts)]
    return [
        dataclasses.replace(entry, arrival_s=start + gap * place / len(step))
        for start, gap, step in zip(starts, gaps, steps, strict=True)
        for place, entry in enumerate(step)
    ]


class _Turn(msgspec.Struct, rename={"speaker": "from"}):
    value: str
    speaker: str = ""


class _Conversation(msgspec.Struct):
    conversations: list[_Turn]


_ASKING = ("human", "user")


def _read_sharegpt(path: Path, encode: Callable[[str], list[int]]) -> list[TraceEntry]:
    try:
        conversations = msgspec.json.decode(path.read_bytes().removeprefix(_BOM), type=list[_Conversation])
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: not ShareGPT's format: {error}") from None
    entries = []
    for conversation in conversations:
        turns = conversation.conversations
        # The first question that is answered. Some files begin with a system turn or in the middle, or ask twice.
        speakers = [turn.speaker.lower() for turn in turns]
        pairs = enumerate(itertools.pairwise(speakers))
        first = next((at for at, (asks, answers) in pairs if asks in ("", *_ASKING) and answers not in _ASKING), None)
        if first is not None and turns[first].value and turns[first + 1].value:
            prompt = tuple(encode(turns[first].value))
            entries.append(TraceEntry(None, len(prompt), max(1, len(encode(turns[first + 1].value))), token_ids=prompt))
    return entries
