"""Orders and report of the process that predicts what the candidates of mode ``auto`` would serve."""

from __future__ import annotations

from typing import Any

import msgspec

from hbserve.messages.admin import LoadEntry
from hbserve.messages.base import Value


class PredictionOrders(Value, frozen=True):
    """Orders of that process, its first line.

    Attributes:
        profile: a `StepProfile` as plain data.
        candidates: systems, by the simulator's names.
        num_requests: of each load.
        load: requests to simulate in place of the standard loads; empty: simulate these.
        ttft_ms, ttft_ms_per_1k_tokens: TTFT target of a request, by the length of its prompt; ``tpot_ms``: its TPOT
            target. ``targets_are_soft``: see `hbserve.config.SchedulerConfig`; for a given load only.
    """

    profile: dict[str, Any]
    candidates: list[str]
    num_requests: int
    ttft_ms: float
    ttft_ms_per_1k_tokens: float
    tpot_ms: float
    max_num_seqs: int
    load: list[LoadEntry] = msgspec.field(default_factory=list)
    targets_are_soft: bool = False


class CandidatePrediction(Value, frozen=True):
    """Prediction for one system.

    Attributes:
        attainment: share of the requests of each load within both targets; ``recent`` is the name of a given load.
        bound: share that no schedule on these GPUs exceeds.
    """

    system: str
    attainment: dict[str, float]
    bound: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean attainment over the loads."""
        return sum(self.attainment.values()) / len(self.attainment)
