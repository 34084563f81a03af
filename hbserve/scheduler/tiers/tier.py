"""Plain records of KV tiers: a tier, and a part of a prompt that one holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hbserve.kv_cache.tier_directory import TierDirectory, TierEntry
from hbserve.messages.tiers import TierInfo

_REST_S = 10.0
"""How long a tier that did not answer in time, or failed, is left alone."""


@dataclass(eq=False, slots=True)
class Tier:
    """One memory: its directory, and how fast it is. Shared by all instances whose workers name it.

    Attributes:
        s_per_byte: recent mean of loads; 0: nothing was loaded yet.
        loading_bytes: of loads under way.
        rests_until: it is not used before this time, because it failed.
    """

    info: TierInfo
    directory: TierDirectory
    s_per_byte: float = 0.0
    loading_bytes: int = 0
    rests_until: float = -math.inf

    def rest(self, now: float) -> None:
        """Leave it alone for a while, because it has failed.

        A store may have been started anew and hold nothing. So it is asked again for all that it is known to hold.
        """
        self.rests_until = now + _REST_S
        if self.info.by_name:
            self.directory.forget_all()


@dataclass(frozen=True, slots=True)
class StoredRun:
    """Neighbouring blocks of a prompt that one tier has, from block ``first`` of the prompt on."""

    tier: Tier
    first: int
    entries: list[TierEntry]

    @property
    def end(self) -> int:
        """The block of the prompt behind the run."""
        return self.first + len(self.entries)

    def after(self, block: int) -> StoredRun:
        """Return the part of the run from a block of the prompt on."""
        skipped = max(0, block - self.first)
        return StoredRun(self.tier, self.first + skipped, self.entries[skipped:]) if skipped else self
