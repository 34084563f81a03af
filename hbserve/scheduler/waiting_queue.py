"""The order of the waiting requests, and the predicted wait of a new one."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Items

from hbserve.config import Config
from hbserve.policy.prefill_rate import PrefillRate
from hbserve.policy.queue_policy import make_policy
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.sequence import InflightStep, Sequence

_MAX_ENDS = 64


class WaitingQueue:
    """The waiting sequences, in the order of ``scheduler.policy``.

    Attributes:
        waiting: the sequences; a user's policy may reorder the list, and nothing else changes it.
    """

    def __init__(self, config: Config) -> None:
        self.waiting: list[Sequence] = []
        self._tokens_per_step = prefill_budget(config)
        self._rate = PrefillRate()
        self._ends: deque[float] = deque(maxlen=_MAX_ENDS)  # when the queue began, then when requests ended
        self.policy = make_policy(config.scheduler, self._rate.prompt_s, lambda: self._rate.step_s)

    def insert(self, sequence: Sequence) -> None:
        """Insert a sequence that begins to wait."""
        sequence.rank = self.policy.rank(sequence)
        if self.waiting and sequence.rank < self.waiting[-1].rank:
            bisect.insort(self.waiting, sequence, key=lambda other: other.rank)
        else:
            self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that waits no more."""
        self.waiting.remove(sequence)

    def in_order(self, instances: Iterable[InstanceHandle], now: float) -> Items[Sequence]:
        """Return the waiting sequences in the order of admission."""

        def admitted() -> tuple[list[tuple[Sequence, int]], int]:
            prefilling = [instance for instance in instances if instance.ready and instance.role.prefills]
            prompts = [
                (sequence, allocation.num_planned)
                for instance in prefilling
                for sequence, allocation in instance.allocations.items()
                if allocation.num_planned < allocation.num_tokens_at_entry
            ]
            return prompts, max(1, len(prefilling))

        return self.policy.order(self.waiting, now, admitted)

    # --- predictions -----------------------------------------------------------------------------

    def on_step_done(self, step: InflightStep, busy_s: float) -> None:
        """Learn the rate of prefill from a step."""
        if step.prefill_rows:
            self._rate.observe(step.prefill_tokens, busy_s, step.prefill_pairs)

    def on_request_ended(self, now: float) -> None:
        """A request has ended and freed its allocations."""
        self._ends.append(now)

    def on_first_waiting(self, now: float) -> None:
        """The queue is no longer empty: start to measure how fast allocations become free."""
        self._ends.clear()
        self._ends.append(now)

    def predicted_ttft_s(
        self,
        sequence: Sequence,
        instances: Iterable[InstanceHandle],
        slots_are_full: bool,
        now: float,
    ) -> float:
        """Predict how long a new request would wait for its first token.

        The longer of two waits: the time to compute the prompts before it and its own, at the learnt rate; and, where
        requests wait for allocations, the time until as many requests have ended as are before it.

        Returns 0 without data or for an empty queue: a single request is never overload, and the rate may be known
        for other lengths only.
        """
        rank = self.policy.rank(sequence)
        before = self.waiting[: bisect.bisect_left(self.waiting, rank, key=lambda other: other.rank)]
        prefilling = [instance for instance in instances if instance.ready and instance.role.prefills]
        num_tokens = sum(len(other.tokens) for other in before) + sum(
            instance.num_tokens_to_prefill for instance in prefilling
        )
        if not prefilling or not num_tokens:
            return 0.0
        # The instances share the prompts before it; its own is computed by one.
        prefill_s = self._rate.seconds(num_tokens // len(prefilling) + len(sequence.tokens), self._tokens_per_step)
        if not slots_are_full or not before or len(self._ends) < 2:
            return prefill_s
        return max(prefill_s, (len(before) + 1) * (now - self._ends[0]) / (len(self._ends) - 1))


def prefill_budget(config: Config) -> int:
    """Return the largest number of prompt tokens in a step."""
    budget = config.performance.max_num_batched_tokens
    if config.chunked_prefill.enabled:
        budget = min(budget, config.chunked_prefill.max_chunk_prefill_tokens)
    return budget
