"""The waiting requests in their order, and how long a new one would wait for its first token."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Sequence as Items

from hbserve.config import Config
from hbserve.policy.profile_curves import ProfileCurves
from hbserve.policy.queue_policy import make_policy
from hbserve.policy.step_time_predictor import StepTimePredictor, num_pairs
from hbserve.scheduler.instance import Instances
from hbserve.scheduler.sequence import InflightStep, Sequence

_MAX_ENDS = 64


class WaitingQueue:
    """The waiting sequences, in the order of ``scheduler.policy``.

    Args:
        curves: of the model's profile, if there is one.

    Attributes:
        waiting: the sequences; a user's policy may reorder the list, and nothing else changes it.
    """

    def __init__(self, config: Config, curves: ProfileCurves | None = None) -> None:
        self.waiting: list[Sequence] = []
        self._tokens_per_step = config.prefill_budget
        self._predictor = StepTimePredictor(curves)
        self._ends: deque[float] = deque(maxlen=_MAX_ENDS)  # when the queue began, then when requests ended
        slo = config.semi_pd.slo
        self.policy = make_policy(config.scheduler, self._predictor, None if slo is None else slo.ttft_target_ms)

    def insert(self, sequence: Sequence) -> None:
        """Insert a sequence that begins to wait."""
        self.policy.on_waiting(sequence)
        sequence.rank = self.policy.rank(sequence)
        if self.waiting and sequence.rank < self.waiting[-1].rank:
            bisect.insort(self.waiting, sequence, key=lambda other: other.rank)
        else:
            self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that waits no more."""
        self.waiting.remove(sequence)

    def in_order(self, instances: Instances, now: float) -> Items[Sequence]:
        """Return the waiting sequences in the order of admission."""

        def admitted() -> tuple[list[tuple[Sequence, int]], int]:
            return _admitted(instances), max(1, len(instances.prefilling))

        return self.policy.order(self.waiting, now, admitted)

    # --- predictions -----------------------------------------------------------------------------

    def prompt_s(self, tokens: float, start: float) -> float:
        """Predict the time to compute tokens of a prompt after ``start`` others; 0: no step with prompts was seen."""
        return self._predictor.prompt_s(tokens, start)

    def on_step_done(self, step: InflightStep, busy_s: float) -> None:
        """Learn from a step with prompts how long they take."""
        if step.prefill_rows and step.work is not None:
            self._predictor.observe(step.work, busy_s)

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
        instances: Instances,
        slots_are_full: bool,
        now: float,
    ) -> float:
        """Predict how long a new request would wait for its first token.

        It waits until the steps under way have ended, and the prompts before it and its own are computed. If requests
        wait for allocations, it also waits until as many requests have ended as are before it. The longer wait counts.

        Returns 0 for an empty queue, because a single request is never overload. Returns 0 without data, too: step
        times may be known for other lengths only.
        """
        rank = self.policy.rank(sequence)
        before = self.waiting[: bisect.bisect_left(self.waiting, rank, key=lambda other: other.rank)]
        num_workers = len(instances.prefilling)
        prompts = [item for item in _admitted(instances) if not item[0].is_batch or sequence.is_batch]
        starts = [(len(other.tokens), start) for other, start in prompts] + [(len(other.tokens), 0) for other in before]
        num_tokens = sum(end - start for end, start in starts)
        step_s = _until_steps_end_s(instances, now)
        if not num_workers or (not num_tokens and step_s is None):
            return 0.0
        # The instances share the prompts before it; its own is computed by one.
        pairs, own = sum(num_pairs(end - start, start) for end, start in starts), len(sequence.tokens)
        prefill_s = (step_s or 0.0) + self._predictor.queue_s(
            num_tokens / num_workers + own, pairs / num_workers + num_pairs(own, 0), self._tokens_per_step
        )
        if not slots_are_full or not before or len(self._ends) < 2:
            return prefill_s
        return max(prefill_s, (len(before) + 1) * (now - self._ends[0]) / (len(self._ends) - 1))


def _until_steps_end_s(instances: Instances, now: float) -> float | None:
    """Return the seconds until the first prefill instance has ended its steps with prompts.

    Prompts in these steps may be planned to their ends, and then no queue has them. None: an instance has no such step,
    or no instance is ready.
    """
    times_s = []
    for instance in instances.prefilling:
        busy = [w for w in instance.workers.values() if any(step.prefill_rows for step in w.inflight)]
        if not busy:
            return None
        times_s.append(max((worker.timing.expected_end() or now) - now for worker in busy))
    return max(0.0, min(times_s)) if times_s else None


def _admitted(instances: Instances) -> list[tuple[Sequence, int]]:
    """Return the prompts with an allocation, each with the tokens that are planned."""
    return [(sequence, allocation.num_planned) for sequence, allocation in instances.prompts()]
