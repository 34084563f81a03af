"""When decode computes beside prefill: in turns, often enough for the TPOT target and no more.

Which share of the device a phase's next step gets: a pure function of what there is to do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def choose_percentage(levels: Sequence[int], share: int, alone: bool) -> int:
    """The level to use.

    Args:
        levels: percentages of the phase's warm workers.
        share: the phase's percentage while the other phase is busy too.
        alone: the other phase has nothing to do: the largest level, so that no part of the device idles.

    Returns:
        The share itself where there is a worker of it, else the level nearest to it.
    """
    if alone:
        return max(levels)
    return min(levels, key=lambda level: (abs(level - share), level))


_HYSTERESIS_STEPS = 1.0
"""Decode steps that may be owed before a turn begins, and that are done ahead before it ends. A change of turn can
mean a change of prefill's worker, which costs some milliseconds."""
_MAX_DEFICIT_STEPS = 8.0
"""Decode steps: what is owed beyond them is given up, and whoever owes so many does not wait for its turn."""


class DecodeThrottle:
    """Two phases that share a device, of which one has time to spare.

    A decode step reads all weights, however small its batch, and slows prefill down. So while prompts are computed,
    decode does as many steps as one in each ``interval_s``, and does them in runs: during a *turn* it goes as fast as
    it can at its share, beside a prefill that keeps to its own; between turns prefill has the whole device. That is
    less work for the device than to spread the steps evenly, because what two workers gain by sharing is largest at
    shares where both are quick.

    Time is passed in, in seconds of any clock.

    Args:
        interval_s: from one decode step to the next, mean, while prefill is busy.

    Attributes:
        interval_s: the one in effect.
        is_open: decode has its turn. False while not both phases are busy: then nobody needs to wait.
        is_overdue: it has waited too long, for a prefill step that is very long or does not end, or for one that a
            sequence of few tokens cannot wait for.
    """

    def __init__(self, interval_s: float) -> None:
        self._usual_s = self.interval_s = interval_s
        self._due = 0.0  # when the next decode step should begin
        self._deficit = 0.0
        self.is_open = self.is_overdue = False

    def on_idle(self, now: float) -> None:
        """Not both phases are busy."""
        self.is_open = self.is_overdue = False
        self._deficit = 0.0
        self._due = min(max(self._due, now), now + _HYSTERESIS_STEPS * self.interval_s)

    def update(
        self, now: float, needed_s: float | None = None, min_slack_s: float = math.inf, step_s: float = 0.0
    ) -> bool:
        """Both are busy; returns `is_open`, which decides about the prefill steps that are planned now.

        Args:
            needed_s: an interval that sequences in the batch need, where it is shorter than the usual one.
            min_slack_s: of these sequences, see `hbserve.policy.mixed_step_budget.slack_s`.
            step_s: that a prefill step takes: who cannot spare it must have its turn before the next one ends.
        """
        self.interval_s = self._usual_s if needed_s is None else min(self._usual_s, needed_s)
        self._deficit = deficit = min((now - self._due) / self.interval_s, _MAX_DEFICIT_STEPS)
        self._due = now - deficit * self.interval_s
        self.is_overdue = deficit == _MAX_DEFICIT_STEPS or min_slack_s < 0
        self.is_open = deficit > -_HYSTERESIS_STEPS if self.is_open else deficit >= _HYSTERESIS_STEPS
        self.is_open |= min_slack_s < step_s
        return self.is_open

    @property
    def is_behind(self) -> bool:
        """A step is owed even after those that have begun, so that the next one need not wait to see how they end."""
        return self._deficit > 0

    def on_decode_step(self) -> None:
        """A decode step begins beside a prefill step."""
        self._due += self.interval_s
        self._deficit -= 1
