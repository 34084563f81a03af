"""Joins the results of all ranks into one result of the instance. Runs in rank 0, in its event loop."""

from __future__ import annotations

from collections.abc import Callable

from hbserve.messages.tiers import TierResult


class JointTierResults:
    """Results of each job, kept until all ranks have one: only then does no rank touch its blocks any more.

    Args:
        num_ranks: results that make one.
        report: called with the joint result.
    """

    def __init__(self, num_ranks: int, report: Callable[[TierResult], None]) -> None:
        self._num_ranks, self._report = num_ranks, report
        self._open: dict[int, dict[int, TierResult]] = {}

    def add(self, rank: int, result: TierResult) -> None:
        """Add the result of one rank."""
        parts = self._open.setdefault(result.job_id, {})
        parts[rank] = result
        if len(parts) == self._num_ranks:
            del self._open[result.job_id]
            self._report(_join([parts[number] for number in sorted(parts)]))

    def clear(self) -> None:
        """Forget incomplete results, because their epoch has ended."""
        self._open.clear()


def _join(parts: list[TierResult]) -> TierResult:
    failures: dict[int, str] = {}
    for part in reversed(parts):
        failures |= part.failures
    are_whole = all(part.checksums for part in parts)
    by_block = zip(*(part.checksums for part in parts), strict=True) if are_whole else ()
    return TierResult(
        epoch=parts[0].epoch,
        job_id=parts[0].job_id,
        failures=failures,
        error=next((part.error for part in parts if part.error is not None), None),
        checksums=[[number for numbers in block for number in numbers] for block in by_block],
        num_bytes=sum(part.num_bytes for part in parts),
        seconds=max(part.seconds for part in parts),
    )
