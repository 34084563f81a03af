"""Which part of a stored prefix is loaded, and which is computed meanwhile. Pure.

Both begin at once, at different ends: what comes first is computed, since it needs nothing before it, and what comes
last is loaded, since a copy needs nothing at all (Jin et al., "Compute Or Load KV Cache? Why Not Both?", 2024). Loading
costs the same for every token, and computing the less the fewer tokens are before it, so this is the best split, too::

    0          cached          cut                        end            prompt
    ├── in the pool ──┼─ computed ─►│◄─────── loaded ─────┼── computed ──┤
                                                             after both
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items

from hbserve.scheduler.tiers.tier import StoredRun, Tier

_MIN_LOAD_SHARE = 0.5
"""Share of the time to compute all that loading all must take for a split, which then saves a third of the load.

Predictions are not good enough for less. Loads from the host's memory to an H200 take less than a tenth of the time to
compute, and splits made them later.
"""

ComputeTime = Callable[[float, float], float]
"""Predicts the time to compute tokens of a prompt after others: ``compute_s(tokens, start)``; 0: it is not known."""
LoadTime = Callable[[Tier, int], float]
"""Predicts the time to load blocks from a tier, after the loads under way."""


def choose_load(
    runs: Items[StoredRun], block_size: int, compute_s: ComputeTime, load_s: LoadTime, is_idle: bool
) -> list[StoredRun]:
    """Choose what to load so that the whole prefix is there soonest.

    A load leaves the device to others. So where others want it, only what would be loaded too late is computed.

    Args:
        runs: the stored prefix, neighbours of each other.
        block_size: tokens of a block.
        is_idle: nothing else is computed.

    Returns:
        The end of some of the first runs. Blocks before it are to be computed meanwhile, runs after it afterwards.
    """
    if not runs:
        return []
    first, last = runs[0].first, runs[-1].end
    whole_s = compute_s((last - first) * block_size, first * block_size)
    if not whole_s:  # without a prediction: loading leaves the device to others
        return list(runs)
    best: list[StoredRun] = []
    best_s = whole_s
    for count in range(len(runs), 0, -1):
        loaded, end = runs[:count], runs[count - 1].end
        rest_s = compute_s((last - end) * block_size, end * block_size)
        cuts = _cuts(loaded, block_size, compute_s, load_s, is_idle)
        for cut, seconds in cuts:
            if seconds + rest_s < best_s or (not best and seconds + rest_s <= best_s):
                best, best_s = [run.after(cut) for run in loaded if run.end > cut], seconds + rest_s
    return best


def _cuts(
    runs: Items[StoredRun], block_size: int, compute_s: ComputeTime, load_s: LoadTime, is_idle: bool
) -> Iterator[tuple[int, float]]:
    """Yield blocks from which on runs may be loaded, each with the time until all is there."""
    first, end = runs[0].first, runs[-1].end

    def computed_s(cut: int) -> float:
        return compute_s((cut - first) * block_size, first * block_size)

    def loaded_s(cut: int) -> float:
        num_blocks: dict[Tier, int] = {}
        for run in runs:
            num_blocks[run.tier] = num_blocks.get(run.tier, 0) + max(0, run.end - max(cut, run.first))
        return max(load_s(tier, number) for tier, number in num_blocks.items() if number)

    all_s = loaded_s(first)
    yield first, all_s
    if all_s < (_MIN_LOAD_SHARE if is_idle else 1.0) * computed_s(end):
        return
    low, high = first, end - 1
    while low < high:  # the first cut at which computing takes longer than loading
        middle = (low + high) // 2
        low, high = (low, middle) if computed_s(middle) >= loaded_s(middle) else (middle + 1, high)
    if low > first:
        yield low, max(computed_s(low), loaded_s(low))
