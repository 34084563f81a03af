"""The requests of the serving benchmark: when each arrives, its prompt, and the length of its output.

`WorkloadSource` (a trace, or ranges of lengths) makes a `ServeWorkload` for any rate.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hbserve.bench.request_batch import LengthRange
from hbserve.bench.traces import BLOCK_TOKENS, TraceEntry
from hbserve.errors import ConfigError

DEFAULT_INPUT_LEN = LengthRange(512, 1536)
DEFAULT_OUTPUT_LEN = LengthRange(64, 256)
_FIRST_TOKEN = 10  # the lowest ids are often special tokens
_MAX_REQUESTS = 10_000_000
_MAX_DAYS = 30


@dataclass(frozen=True, slots=True)
class ServeRequest:
    """One request.

    Attributes:
        arrival_s: from the start of the run.
        output_len: tokens to generate.
        prompt_seed: seed of the prompt's tokens, where they are drawn and not from blocks.
        block_ids: names of its leading blocks of `BLOCK_TOKENS` tokens, which other requests may share.
        token_ids: the prompt itself, at least ``input_len`` tokens of it, where it is not drawn.
    """

    arrival_s: float
    input_len: int
    output_len: int
    prompt_seed: int
    block_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class ServeWorkload:
    """Requests of a run, by arrival.

    Attributes:
        seed: seed of all token ids. Another seed gives other prompts with the same shared prefixes.
        vocab_size: token ids are below it.
    """

    requests: tuple[ServeRequest, ...]
    seed: int
    vocab_size: int

    @property
    def mean_input_len(self) -> int:
        return round(sum(request.input_len for request in self.requests) / len(self.requests))

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(request.input_len + request.output_len for request in self.requests)

    @property
    def rate(self) -> float:
        """Requests per second from the first arrival to the last; infinite if all arrive at once."""
        span = self.requests[-1].arrival_s - self.requests[0].arrival_s
        return (len(self.requests) - 1) / span if span > 0 else math.inf

    def prompt(self, request: ServeRequest) -> list[int]:
        """Return the prompt of one of the requests, token ids."""
        if request.token_ids:
            return list(request.token_ids[: request.input_len])
        if not request.block_ids:
            return self.draw_tokens(request.prompt_seed, request.input_len)
        blocks = [_draw(self.seed, 2, block_id, BLOCK_TOKENS, self.vocab_size) for block_id in request.block_ids]
        tokens: list[int] = np.concatenate(blocks)[: request.input_len].tolist()
        return tokens

    def draw_tokens(self, prompt_seed: int, count: int) -> list[int]:
        """Draw token ids that no prompt with another seed begins with."""
        tokens: list[int] = _draw_once(self.seed, 3, prompt_seed, count, self.vocab_size).tolist()
        return tokens


def _draw_once(seed: int, kind: int, number: int, count: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng([seed, kind, number]).integers(_FIRST_TOKEN, vocab_size, size=count)


_draw = lru_cache(maxsize=1 << 14)(_draw_once)


@dataclass(frozen=True, kw_only=True)
class WorkloadSource:
    """Source of the workload of any rate.

    Attributes:
        trace: its requests; None: lengths are drawn from the ranges.
        arrivals: ``trace`` keeps the trace's times, stretched to the rate; ``poisson`` and ``gamma`` draw times.
        burstiness: of drawn arrivals, see `draw_arrivals`.
        duration_s: at a given rate: as many requests as arrive in this time. At the trace's own rate: the
            requests that arrive before this time.
        num_requests: at most so many; None: all of the trace, or those of ``duration_s``.
        max_input_len, max_output_len: longer lengths are cut to this.
    """

    vocab_size: int
    trace: Sequence[TraceEntry] | None = None
    input_len: LengthRange = DEFAULT_INPUT_LEN
    output_len: LengthRange = DEFAULT_OUTPUT_LEN
    arrivals: str = "poisson"
    burstiness: float = 1.0
    duration_s: float | None = None
    num_requests: int | None = None
    max_input_len: int | None = None
    max_output_len: int | None = None

    def workload(self, rate: float | None, seed: int) -> ServeWorkload:
        """Make requests of a mean rate.

        Args:
            rate: requests per second; None: the trace's own.

        Raises:
            ConfigError: if there is no rate, or too few requests to have one, or none.
        """
        has_times = self.arrivals == "trace"
        if rate is None and not has_times:
            raise ConfigError("--rate is needed: the workload has no times of its own")
        count = self.num_requests
        if rate is not None and self.duration_s is not None:
            count = min(count or sys.maxsize, max(2, round(rate * self.duration_s)))
        if count is None and self.trace is None:
            raise ConfigError("--num-requests or --duration is needed")
        if self.trace is None and count is not None and count > _MAX_REQUESTS:
            raise ConfigError(f"{count} requests are too many to draw; take a lower rate or a shorter --duration")
        entries = self._entries(count, seed)
        if not entries:
            raise ConfigError("the trace has no requests, or the part that was asked for begins after its last one")
        if has_times:
            times = _stretch([entry.arrival_s or 0.0 for entry in entries], rate)
        else:
            assert rate is not None
            times = draw_arrivals(len(entries), rate, self.burstiness, seed)
        if (days := (times[-1] - times[0]) / 86400) > _MAX_DAYS:
            raise ConfigError(
                f"the requests come over {days:.3g} days, and at most {_MAX_DAYS} are allowed; take a higher --rate, "
                "or fewer requests"
            )
        requests = [
            ServeRequest(
                time,
                min(entry.input_len, self.max_input_len or entry.input_len),
                min(entry.output_len, self.max_output_len or entry.output_len),
                number,
                entry.block_ids,
                entry.token_ids,
            )
            for number, (time, entry) in enumerate(zip(times, entries, strict=True))
            if rate is not None or self.duration_s is None or time <= self.duration_s
        ]
        return ServeWorkload(tuple(requests), seed, self.vocab_size)

    def _entries(self, count: int | None, seed: int) -> Sequence[TraceEntry]:
        if self.trace is not None:
            return self.trace[:count]
        assert count is not None
        rng = np.random.default_rng([seed, 4])
        inputs = rng.integers(self.input_len.low, self.input_len.high + 1, size=count).tolist()
        outputs = rng.integers(self.output_len.low, self.output_len.high + 1, size=count).tolist()
        return [TraceEntry(None, *lengths) for lengths in zip(inputs, outputs, strict=True)]


def draw_arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Draw the times of a renewal process, seconds from its start, ascending.

    The gaps are gamma distributed with mean ``1 / rate`` and a coefficient of variation of
    ``sqrt(burstiness)``: 1 is a Poisson process, 0 is even spacing, more is burstier.

    Args:
        rate: requests per second.
        burstiness: variance of the gaps over their squared mean.
    """
    if burstiness == 0:
        return [index / rate for index in range(count)]
    gaps = np.random.default_rng([seed, 1]).gamma(1 / burstiness, burstiness / rate, size=count)
    times: list[float] = np.cumsum(gaps).tolist()
    return times


def _stretch(times: Sequence[float], rate: float | None) -> list[float]:
    """Shift times to begin at 0, and stretch them to a mean rate; None: keep their rate."""
    span = times[-1] - times[0]
    if rate is None:
        return [time - times[0] for time in times]
    if span == 0 and len(times) > 1:
        raise ConfigError(f"the trace's first {len(times)} requests come at once; take more, or --arrivals poisson")
    stretch = (len(times) - 1) / rate / span if span else 0.0
    return [(time - times[0]) * stretch for time in times]
