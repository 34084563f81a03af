"""The rate of decode steps beside prefill: enough for the TPOT target, and no more.

Runs in the scheduler's process, and on the simulator's clock. `choose_percentage` says which share of the device a
phase's next step gets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def choose_percentage(levels: Sequence[int], share: int, alone: bool) -> int:
    """Choose the share level of a phase's next step.

    Args:
        levels: percentages of the phase's warm workers.
        share: percentage of the phase while the other phase is busy too.
        alone: the other phase is idle. The largest level then leaves no part of the device idle.

    Returns:
        The share itself if a worker has it, else the level nearest to it.
    """
    if alone:
        return max(levels)
    return min(levels, key=lambda level: (abs(level - share), level))


_HYSTERESIS_STEPS = 1.0
"""Deficit of decode steps that opens the throttle, and lead of steps that closes it. A change can mean a change of
prefill's worker, which costs some milliseconds."""
_MAX_DEFICIT_STEPS = 8.0
"""Decode steps. A larger deficit is cut to this one, and decode at this deficit is overdue."""
_MARGIN_S = 1e-3
"""Added to the time at which decode is overdue, so that rounding cannot make that time too early."""


class DecodeThrottle:
    """Throttle of decode while two phases share a device and decode has time to spare.

    A decode step reads all weights, however small its batch is, and slows prefill down. So while prompts are computed,
    decode does one step in each ``interval_s`` on average, in bursts:

        throttle  open       closed            open       closed
        decode    ▪▪▪▪▪                        ▪▪▪▪▪
        prefill   own share  the whole device  own share  the whole device

    While the throttle is open, decode goes as fast as it can at its share, beside a prefill that keeps to its own.
    Bursts cost the device less than evenly spread steps, because two workers gain most from sharing at shares where
    both are fast.

    Time is passed in, in seconds of any clock.

    Args:
        interval_s: mean time from one decode step to the next while prefill is busy.

    Attributes:
        interval_s: the interval in effect.
        is_open: decode steps may run beside prefill. False while only one phase is busy: decode need not wait then.
        is_overdue: decode has waited too long for a prefill step. The step is very long or does not end, or a sequence
            with few tokens left has too little slack for it.
        overdue_at: latest time at which `update` makes decode overdue; infinity while only one phase is busy.
    """

    def __init__(self, interval_s: float) -> None:
        self._usual_s = self.interval_s = interval_s
        self._due = 0.0  # when the next decode step should begin
        self._deficit = 0.0
        self.is_open = self.is_overdue = False
        self.overdue_at = math.inf

    def on_idle(self, now: float) -> None:
        """Note that at least one phase has nothing to do."""
        self.is_open = self.is_overdue = False
        self.overdue_at = math.inf
        self._deficit = 0.0
        self._due = min(max(self._due, now), now + _HYSTERESIS_STEPS * self.interval_s)

    def update(
        self, now: float, needed_s: float | None = None, min_slack_s: float = math.inf, step_s: float = 0.0
    ) -> bool:
        """Open or close the throttle while both phases are busy.

        Args:
            needed_s: interval that the sequences in the batch need, if it is shorter than the usual one.
            min_slack_s: smallest slack of these sequences, see `hbserve.policy.mixed_step_budget.slack_s`.
            step_s: duration of a prefill step. A sequence with less slack opens the throttle before the next one ends.

        Returns:
            `is_open`, which decides about the prefill steps that are planned now.
        """
        self.interval_s = self._usual_s if needed_s is None else min(self._usual_s, needed_s)
        self._deficit = deficit = min((now - self._due) / self.interval_s, _MAX_DEFICIT_STEPS)
        self._due = now - deficit * self.interval_s
        self.is_overdue = deficit == _MAX_DEFICIT_STEPS or min_slack_s < 0
        left_s = min((_MAX_DEFICIT_STEPS - deficit) * self.interval_s, min_slack_s)
        self.overdue_at = now + max(0.0, left_s) + _MARGIN_S
        self.is_open = deficit > -_HYSTERESIS_STEPS if self.is_open else deficit >= _HYSTERESIS_STEPS
        self.is_open |= min_slack_s < step_s
        return self.is_open

    @property
    def is_behind(self) -> bool:
        """Whether decode lacks steps even after those in flight, so that the next one need not wait for their end."""
        return self._deficit > 0

    def on_decode_step(self) -> None:
        """Count a decode step that begins beside a prefill step."""
        self._due += self.interval_s
        self._deficit -= 1
