"""The record of each request of a serving benchmark, its latency targets, and the summary of a run."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hbserve.errors import ConfigError

_PERCENTILES = (50, 90, 95, 99)


@dataclass(slots=True)
class RequestRecord:
    """One request; times are seconds from the start of the run.

    Latencies count from ``arrival_s``, when the request was due: a late client makes them worse, not better.

    Attributes:
        sent_s: when the client sent it.
        token_times: when tokens came, and how many at once.
        error: why it has no complete answer; None once it has.
    """

    index: int
    arrival_s: float
    input_len: int
    output_len: int
    sent_s: float = 0.0
    end_s: float | None = None
    token_times: list[tuple[float, int]] = field(default_factory=list)
    error: str | None = "unfinished"

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.token_times)

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token; None if none came."""
        return self.token_times[0][0] - self.arrival_s if self.token_times else None

    @property
    def tpot_s(self) -> float | None:
        """Time per token after the first arrival; None if there was one arrival only, or the request failed."""
        if self.error is not None or len(self.token_times) < 2:
            return None
        (first, at_once), (last, _) = self.token_times[0], self.token_times[-1]
        return (last - first) / (self.num_tokens - at_once)

    @property
    def second_token_s(self) -> float | None:
        """Time from the first arrival to the second; None if there is none."""
        return self.token_times[1][0] - self.token_times[0][0] if len(self.token_times) > 1 else None

    @property
    def itls_s(self) -> list[float]:
        """Gaps between arrivals of tokens."""
        return [later - sooner for (sooner, _), (later, _) in itertools.pairwise(self.token_times)]

    @property
    def e2e_s(self) -> float | None:
        """Time to the end; None if the request failed."""
        return None if self.error is not None or self.end_s is None else self.end_s - self.arrival_s

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, milliseconds where the name says so."""
        return {
            "index": self.index,
            "arrival_s": round(self.arrival_s, 6),
            "late_ms": _ms(self.sent_s - self.arrival_s),
            "input_len": self.input_len,
            "output_len": self.output_len,
            "num_tokens": self.num_tokens,
            "ttft_ms": _ms(self.ttft_s),
            "tpot_ms": _ms(self.tpot_s),
            "second_token_ms": _ms(self.second_token_s),
            "max_itl_ms": _ms(max(self.itls_s, default=None)),
            "e2e_ms": _ms(self.e2e_s),
            "error": self.error,
        }


@dataclass(frozen=True)
class RequestTargets:
    """Latency limits that a request must keep to count, milliseconds; None: no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    @staticmethod
    def parse(text: str) -> RequestTargets:
        """Read ``ttft:500,tpot:50``.

        Raises:
            ConfigError: if the text has another form.
        """
        given: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition(":")
            try:
                limit = float(value)
            except ValueError:
                limit = math.nan
            if name not in ("ttft", "tpot", "e2e") or not 0 < limit < math.inf or f"{name}_ms" in given:
                raise ConfigError(f"--goodput: {text!r} is not like ttft:500,tpot:50 (milliseconds; also e2e)")
            given[f"{name}_ms"] = limit
        return RequestTargets(**given)

    def met_by(self, record: RequestRecord) -> bool:
        """Return whether the request succeeded within all limits."""
        if record.error is not None:
            return False
        pairs = ((record.ttft_s, self.ttft_ms), (record.tpot_s, self.tpot_ms), (record.e2e_s, self.e2e_ms))
        return all(seen is None or limit is None or seen * 1000 <= limit for seen, limit in pairs)

    def missed_by(self, record: RequestRecord, now: float) -> bool:
        """Return whether a request has missed a limit already, though it may still run."""
        if record.end_s is not None:
            return not self.met_by(record)
        waited_ms = (now - record.arrival_s) * 1000
        limit = self.e2e_ms if record.token_times else min(self.ttft_ms or math.inf, self.e2e_ms or math.inf)
        return limit is not None and waited_ms > limit

    def __str__(self) -> str:
        named = (("TTFT", self.ttft_ms), ("TPOT", self.tpot_ms), ("E2E", self.e2e_ms))
        return ", ".join(f"{name} ≤ {limit:.1f} ms" for name, limit in named if limit is not None) or "none"


def summarize(records: Sequence[RequestRecord], targets: RequestTargets | None) -> dict[str, Any]:
    """Compute percentiles, rates and goodput of a run, plain numbers.

    Rates are over the time from the first arrival to the last token. Percentiles are nearest ranks.
    A request without an answer counts as one that missed its targets.
    """
    answered = [record for record in records if record.error is None]
    start = min(record.arrival_s for record in records)
    end = max((record.token_times[-1][0] for record in records if record.token_times), default=start)
    seconds = max(end - start, 1e-9)
    errors = Counter(record.error for record in records if record.error is not None)
    input_tokens = sum(record.input_len for record in answered)
    output_tokens = sum(record.num_tokens for record in answered)
    summary: dict[str, Any] = {
        "seconds": seconds,
        "num_requests": len(records),
        "num_answered": len(answered),
        "errors": dict(errors.most_common(10)),
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "requests_per_s": len(answered) / seconds,
        "input_tokens_per_s": input_tokens / seconds,
        "output_tokens_per_s": output_tokens / seconds,
        "ttft_ms": _spread([record.ttft_s for record in answered]),
        "tpot_ms": _spread([record.tpot_s for record in answered]),
        "itl_ms": _spread([gap for record in answered for gap in record.itls_s]),
        "e2e_ms": _spread([record.e2e_s for record in answered]),
    }
    if targets is not None:
        met = sum(targets.met_by(record) for record in records)
        summary |= {"num_met": met, "attainment": met / len(records), "goodput_per_s": met / seconds}
    return summary


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the nearest rank of ascending samples."""
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def _spread(seconds: Sequence[float | None]) -> dict[str, float] | None:
    """Return mean, maximum and percentiles in milliseconds; None without samples."""
    ordered = sorted(sample for sample in seconds if sample is not None)
    if not ordered:
        return None
    spread = {"mean": sum(ordered) / len(ordered) * 1000, "max": ordered[-1] * 1000}
    return spread | {f"p{percent}": percentile(ordered, percent) * 1000 for percent in _PERCENTILES}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
