"""Which prompt is computed next: the order of the waiting queue and of the prompts that have a seat."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from collections.abc import Sequence as Items

from hbserve.config import SchedulerConfig
from hbserve.pd_disagg.sequence import Sequence

_RESUMED, _NEW = 0, 1
_PATIENCE_MS = 10_000.0
"""TTFT target, for the order only, of a request that has none."""


class QueuePolicy:
    """First come, first served.

    A request's rank is fixed when it begins to wait, so that a sorted queue stays sorted. Those whose
    client has tokens already, and which were put back, go before all others.
    """

    def rank(self, sequence: Sequence) -> tuple[int, float, int]:
        """Smaller goes first. Of a sequence that begins to wait now."""
        return _NEW, 0.0, sequence.arrival

    def order(self, waiting: list[Sequence], now: float) -> Items[Sequence]:
        """Whom to admit first, of a queue sorted by rank."""
        return waiting

    def key(self, sequence: Sequence, num_computed: int, now: float) -> tuple[bool, tuple[int, float, int]]:
        """Of those whose prompt could be gone on with now, the one with the smallest is.

        Args:
            num_computed: tokens that need not be computed any more.
        """
        return False, sequence.rank


class ShortestPromptFirst(QueuePolicy):
    """Fewest tokens first; every second of waiting makes a prompt seem so many tokens shorter.

    All age alike, so the time of arrival stands for the age, and ranks do not change.
    """

    def __init__(self, ageing_tokens_per_s: float) -> None:
        self._ageing = ageing_tokens_per_s

    def rank(self, sequence: Sequence) -> tuple[int, float, int]:
        """See `QueuePolicy.rank`."""
        length = len(sequence.tokens) + self._ageing * sequence.arrival_time
        return _group(sequence), length, sequence.arrival


class LeastLaxity(QueuePolicy):
    """Who must start soonest to keep its TTFT target goes first; who cannot keep it any more, last.

    Laxity is what is left until the last moment to start: arrival + target - time to compute the prompt.
    All laxities shrink alike, so their order stays, but for those that pass zero.

    Args:
        prefill_s: predicted seconds to compute so many prompt tokens.
        default_ttft_ms: target of requests that come without one.
    """

    def __init__(self, prefill_s: Callable[[int], float], default_ttft_ms: float | None) -> None:
        self._prefill_s = prefill_s
        self._default_ttft_ms = default_ttft_ms or _PATIENCE_MS

    def rank(self, sequence: Sequence) -> tuple[int, float, int]:
        """See `QueuePolicy.rank`."""
        target_ms = sequence.request.sampling.ttft_ms or self._default_ttft_ms
        latest_start = sequence.arrival_time + target_ms / 1000 - self._prefill_s(len(sequence.tokens))
        return _group(sequence), latest_start, sequence.arrival

    def order(self, waiting: list[Sequence], now: float) -> Items[Sequence]:
        """See `QueuePolicy.order`."""
        first_new = bisect.bisect_left(waiting, (_NEW, -math.inf, 0), key=lambda sequence: sequence.rank)
        first_in_time = bisect.bisect_left(waiting, (_NEW, now, 0), key=lambda sequence: sequence.rank)
        if first_new == first_in_time:
            return waiting
        return waiting[:first_new] + waiting[first_in_time:] + waiting[first_new:first_in_time]

    def key(self, sequence: Sequence, num_computed: int, now: float) -> tuple[bool, tuple[int, float, int]]:
        """See `QueuePolicy.key`. What has been computed already makes the last moment to go on later."""
        group, latest_start, _ = sequence.rank
        return group == _NEW and latest_start + self._prefill_s(num_computed) < now, sequence.rank


def make_policy(config: SchedulerConfig, prefill_s: Callable[[int], float]) -> QueuePolicy:
    """The configured policy; for ``prefill_s`` see `LeastLaxity`."""
    if config.policy == "shortest_prompt_first":
        return ShortestPromptFirst(config.ageing_tokens_per_s)
    if config.policy == "slo_aware":
        return LeastLaxity(prefill_s, config.ttft_ms)
    return QueuePolicy()


def _group(sequence: Sequence) -> int:
    return _NEW if sequence.first_token_time is None else _RESUMED
