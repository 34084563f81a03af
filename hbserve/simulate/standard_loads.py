"""Three loads that stand for common traffic, at any rate: conversations, code completion, and agents.

| load | prompts | outputs | arrivals |
|---|---|---|---|
| chat | 1,150 tokens in the mean, log-normal | 210 in the mean | Poisson |
| code | 2,200 in the mean, log-normal | 25 in the mean | bursts of 4 in the mean, 0.3 s apart |
| agents | 12,000 in the mean, 64 % from the prompt before | 190 in the mean | sessions of 4, 8 s between prompts |

In a load of less than a minute the prompts of a session come in shorter gaps, so that most of them have one before.
"""

from __future__ import annotations

import itertools

import numpy as np

from hbserve.bench.traces import TraceEntry
from hbserve.simulate.requests import SimulatedRequest

LOADS = ("chat", "code", "agents")
_TRACES = {"chat": (8.0, 600), "code": (6.0, 600), "agents": (1.8, 240)}
"""Requests per second of a load that stands for a trace, and how many requests it has."""
MEAN_LENGTHS = {"chat": (1150, 210), "code": (2200, 25), "agents": (12_000, 190)}
"""Mean tokens of prompts and of outputs."""
CACHED_SHARE = {"chat": 0.0, "code": 0.0, "agents": 0.64}
"""Share of the prompt tokens that a prefix cache can have."""
_MAX_PROMPT_TOKENS = 31_000
_MAX_OUTPUT_TOKENS = 2_000
_BURST = 4.0
_BURST_GAP_S = 0.3
_TURNS = 4
_TURN_GAP_S = 8.0
_MAX_TURN_GAP = 1 / 8
"""Gap between the prompts of a session over the length of the load, at most."""
_FIRST_PROMPT, _TURN_TOKENS, _SYSTEM_TOKENS = 6_000, 4_000, 1_024
_BLOCK_TOKENS = 512
_FIRST_LAST_BLOCK = 10_000_000
"""Names of last blocks begin here. Such a block is partly full, so no two prompts share it."""
_WARM_UP_GAPS = 4.0
"""Gaps between the prompts of a session that pass before the requests begin, so that sessions are of all ages."""


def standard_load(name: str, rate: float, num_requests: int, seed: int) -> list[SimulatedRequest]:
    """Make a load of one of the `LOADS`, by arrival; the first request comes at 0.

    Args:
        rate: requests per second, in the mean.
    """
    rng = np.random.default_rng([seed, LOADS.index(name)])
    make = {"chat": _chat, "code": _code, "agents": _agents}[name]
    requests = sorted(make(rng, rate, num_requests), key=lambda request: request.arrival)[:num_requests]
    first = requests[0].arrival
    for request in requests:
        request.arrival -= first
    return requests


def standard_trace(name: str) -> list[TraceEntry]:
    """Make one of the `LOADS` as if it were a trace; a benchmark stretches it to its rate."""
    rate, num_requests = _TRACES[name]
    entries, last_blocks = [], itertools.count(_FIRST_LAST_BLOCK)
    for request in standard_load(name, rate, num_requests, seed=1):
        blocks = request.prefix_blocks
        if blocks and len(blocks) * _BLOCK_TOKENS < request.prompt_tokens:
            blocks = (*blocks, next(last_blocks))
        entries.append(TraceEntry(request.arrival, request.prompt_tokens, request.output_tokens, blocks))
    return entries


def _chat(rng: np.random.Generator, rate: float, count: int) -> list[SimulatedRequest]:
    times = np.cumsum(rng.exponential(1 / rate, count))
    return _requests(rng, times, "chat", 0.8)


def _code(rng: np.random.Generator, rate: float, count: int) -> list[SimulatedRequest]:
    sizes = rng.geometric(1 / _BURST, count)
    starts = np.cumsum(rng.exponential(_BURST / rate, count))
    times = np.concatenate(
        [start + np.cumsum(rng.exponential(_BURST_GAP_S, size)) for start, size in zip(starts, sizes, strict=True)]
    )
    return _requests(rng, times, "code", 0.8)


def _requests(rng: np.random.Generator, times: np.ndarray, name: str, spread: float) -> list[SimulatedRequest]:
    prompt_mean, output_mean = MEAN_LENGTHS[name]
    prompts = _lognormal(rng, prompt_mean, spread, len(times)).clip(16, _MAX_PROMPT_TOKENS)
    outputs = _lognormal(rng, output_mean, spread, len(times)).clip(1, _MAX_OUTPUT_TOKENS)
    return [
        SimulatedRequest(time, int(prompt), int(output))
        for time, prompt, output in zip(times.tolist(), prompts, outputs, strict=True)
    ]


def _agents(rng: np.random.Generator, rate: float, count: int) -> list[SimulatedRequest]:
    """Sessions whose prompts each hold the prompt before; all begin with the same instructions."""
    sessions_per_s = rate / _TURNS
    turn_gap_s = min(_TURN_GAP_S, _MAX_TURN_GAP * count / rate)
    begin = -_WARM_UP_GAPS * turn_gap_s
    num_sessions = count + int(-begin * sessions_per_s) + _TURNS
    starts = begin + np.cumsum(rng.exponential(1 / sessions_per_s, num_sessions))
    requests = []
    for session, start in enumerate(starts.tolist()):
        time, tokens = start, _SYSTEM_TOKENS + _lognormal(rng, _FIRST_PROMPT - _SYSTEM_TOKENS, 0.4, 1)[0]
        for output in _lognormal(rng, MEAN_LENGTHS["agents"][1], 0.8, _TURNS).clip(1, _MAX_OUTPUT_TOKENS):
            length = int(min(tokens, _MAX_PROMPT_TOKENS))
            requests.append(SimulatedRequest(time, length, int(output), _blocks(session, length)))
            time += rng.exponential(turn_gap_s)
            tokens += _lognormal(rng, _TURN_TOKENS, 0.4, 1)[0]
    return [request for request in requests if request.arrival >= 0]


def _blocks(session: int, length: int) -> tuple[int, ...]:
    """Return the names of a prompt's whole blocks: those of the instructions are all sessions'."""
    shared = _SYSTEM_TOKENS // _BLOCK_TOKENS
    blocks = range(length // _BLOCK_TOKENS)
    return tuple(block if block < shared else 1_000 * (session + 1) + block for block in blocks)


def _lognormal(rng: np.random.Generator, mean: float, sigma: float, count: int) -> np.ndarray:
    return rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
