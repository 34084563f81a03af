"""A scheduler that loads from a KV tier whatever it has: small models are computed about as fast as they are loaded.

Tiers that have failed rest for a moment only, so that a test need not wait for them.
"""

from __future__ import annotations

import math
from typing import Any

from hbserve.scheduler.scheduler import CpuScheduler
from hbserve.scheduler.tiers import tier


class AlwaysLoads(CpuScheduler):
    """Computing is predicted to take for ever."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        tier._REST_S = 0.2
        self._requests.tiers._compute_s = lambda tokens, start: math.inf
