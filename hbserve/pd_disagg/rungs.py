"""Which share of the device a phase's next step gets: a pure function of what there is to do."""

from __future__ import annotations

from collections.abc import Sequence


def choose_percentage(rungs: Sequence[int], share: int, alone: bool) -> int:
    """The rung to use.

    Args:
        rungs: percentages of the phase's warm workers.
        share: the phase's percentage while the other phase is busy too.
        alone: the other phase has nothing to do: the largest rung, so that no part of the device idles.

    Returns:
        The share itself where there is a worker of it, else the rung nearest to it.
    """
    if alone:
        return max(rungs)
    return min(rungs, key=lambda rung: (abs(rung - share), rung))
