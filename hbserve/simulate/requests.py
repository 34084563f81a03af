"""What is served in a simulation, and where it comes from."""

from __future__ import annotations

import csv
import itertools
import random
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import msgspec

from hbserve.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512


@dataclass(slots=True, eq=False)
class SimulatedRequest:
    """One request; times in seconds of the simulated clock.

    Attributes:
        prefix_blocks: names of the leading blocks of its prompt, equal where contents are.
        block_tokens: tokens per name.
        cached_tokens: found in the prefix cache when it was admitted.
        computed_tokens: of the prompt, cached ones included.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    prefix_blocks: tuple[int, ...] = ()
    block_tokens: int = MOONCAKE_BLOCK_TOKENS
    request_id: str = ""
    cached_tokens: int = 0
    computed_tokens: int = 0
    first_token_time: float | None = None
    completion_time: float | None = None
    finish_step: int = field(default=0, repr=False)

    @property
    def ttft_ms(self) -> float:
        """Infinite while there is no token."""
        return float("inf") if self.first_token_time is None else 1000 * (self.first_token_time - self.arrival)

    @property
    def tpot_ms(self) -> float:
        """Of the whole output; 0 where there is one token only, infinite while it is not complete."""
        if self.completion_time is None or self.first_token_time is None:
            return float("inf")
        if self.output_tokens < 2:
            return 0.0
        return 1000 * (self.completion_time - self.first_token_time) / (self.output_tokens - 1)


def poisson(
    rate: float,
    duration_s: float,
    prompt_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
    seed: int,
    start_s: float = 0.0,
) -> list[SimulatedRequest]:
    """Poisson arrivals with uniform lengths, both ends included."""
    generator = random.Random(seed)
    requests = []
    time = start_s + generator.expovariate(rate)
    while time < start_s + duration_s:
        lengths = generator.randint(*prompt_tokens), generator.randint(*output_tokens)
        requests.append(SimulatedRequest(time, *lengths))
        time += generator.expovariate(rate)
    return requests


def load_trace(
    path: str | Path, rate: float | None = None, duration_s: float | None = None, max_prompt_tokens: int | None = None
) -> list[SimulatedRequest]:
    """Read the Azure LLM inference trace (CSV) or Mooncake's (JSON lines).

    Args:
        rate: requests per second to scale the arrival times to; None leaves them.
        duration_s: what arrives later, after scaling, is left out.
        max_prompt_tokens: longer requests are left out.

    Raises:
        ConfigError: if it is neither, or nothing is left.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            requests = _read_azure(file) if path.suffix == ".csv" else _read_mooncake(file)
    except OSError as error:
        raise ConfigError(f"trace {path}: {error.strerror}") from None
    except (KeyError, ValueError, msgspec.DecodeError) as error:
        raise ConfigError(f"trace {path}: neither an Azure CSV nor a Mooncake JSONL file ({error})") from None
    requests = [r for r in requests if max_prompt_tokens is None or r.prompt_tokens <= max_prompt_tokens]
    if not requests:
        raise ConfigError(f"trace {path}: no request left")
    first = min(request.arrival for request in requests)
    span_s = max(request.arrival for request in requests) - first
    factor = 1.0 if rate is None else len(requests) / max(span_s, 1e-9) / rate
    for request in requests:
        request.arrival = (request.arrival - first) * factor
    requests.sort(key=lambda request: request.arrival)
    return [request for request in requests if duration_s is None or request.arrival < duration_s]


def _read_azure(file: object) -> list[SimulatedRequest]:
    rows = csv.DictReader(file)  # type: ignore[call-overload]
    return [
        SimulatedRequest(
            datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp(),
            max(1, int(row["ContextTokens"])),
            max(1, int(row["GeneratedTokens"])),
        )
        for row in rows
    ]


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def _read_mooncake(file: object) -> list[SimulatedRequest]:
    lines = (msgspec.json.decode(line, type=_MooncakeLine) for line in file if line.strip())  # type: ignore[attr-defined]
    return [
        SimulatedRequest(
            line.timestamp / 1000, max(1, line.input_length), max(1, line.output_length), prefix_blocks=line.hash_ids
        )
        for line in lines
    ]


def concatenated(*parts: list[SimulatedRequest]) -> list[SimulatedRequest]:
    """All requests, by arrival."""
    return sorted(itertools.chain(*parts), key=lambda request: request.arrival)
