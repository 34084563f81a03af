"""A scheduler that fails whenever it is about to admit a marked request."""

from __future__ import annotations

from hbserve.scheduler.scheduler import CpuScheduler
from hbserve.scheduler.sequence import Sequence

POISON = [11, 13, 11, 13, 11]
"""The beginning of a marked prompt."""


class PoisonedScheduler(CpuScheduler):
    """Dies of some requests."""

    def _admit(self, sequence: Sequence) -> bool:
        if sequence.tokens[: len(POISON)] == POISON:
            raise RuntimeError("a planted fault")
        return super()._admit(sequence)
