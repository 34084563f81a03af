"""The configuration of instances whose prefill and decode share a device, and of the targets that they keep.

What the sections of the configuration are made of.
"""

from __future__ import annotations

import difflib
from typing import Literal

import msgspec


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the sections: immutable, keyword-only, and strict about unknown keys."""


def nearest(name: str, valid: list[str]) -> str:
    """A hint such as ``; did you mean 'port'?``, or the list of valid names."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid are: {', '.join(sorted(valid))}"


DECODE_PACE = 0.8
"""Of the TPOT target, for decode beside prefill."""
MIXED_PACE = 0.9
"""Likewise in one worker, whose steps wait for nobody else's."""


class LadderConfig(Section, frozen=True):
    """Percentages at which a phase always has a warm worker, besides its share.

    Attributes:
        prefill, decode: each 1..100, no order.
        unified: of the worker that mixes both phases in its steps, at most one. Default: 100 where
            something can choose it, which is ``semi_pd.mixed`` or ``semi_pd.slo``, else none.
    """

    prefill: tuple[int, ...] = (100,)
    decode: tuple[int, ...] = (100,)
    unified: tuple[int, ...] | None = None


class SLOConfig(Section, frozen=True):
    """Targets that the split of a ``semi_pd`` instance is moved to hold; see docs/slo_control.md.

    Attributes:
        ttft_target_ms, tpot_target_ms: what a request should meet.
        ttft_percentile, tpot_percentile: of requests at which that is judged.
        ttft_violation_threshold, tpot_violation_threshold: how many times the target is a violation.
        profile: file of step times, from ``python -m hbserve.profile``; default: a built-in one.
        monitoring_interval_s: from one look to the next.
        window_s: how far back a look goes.
        min_percentage, max_total_percentage, adjustment_step: which splits may be chosen.
        cooldown_s: from one move to the next.
        rotation_cooldown_s: from one move that needs new processes to the next of that kind.
        hysteresis: share of goodput that a move must gain.
        min_confidence_threshold: of the latency model, below which it is not followed.
        holds_back_decode: while prompts are computed, decode does no more steps than the TPOT target
            calls for with some room, in turns.
    """

    ttft_target_ms: float
    tpot_target_ms: float
    ttft_percentile: float = 95.0
    tpot_percentile: float = 95.0
    ttft_violation_threshold: float = 1.1
    tpot_violation_threshold: float = 1.1
    profile: str | None = None
    monitoring_interval_s: float = 2.0
    window_s: float = 5.0
    min_percentage: int = 10
    max_total_percentage: int = 200
    adjustment_step: int = 10
    cooldown_s: float = 4.0
    rotation_cooldown_s: float = 60.0
    hysteresis: float = 0.05
    min_confidence_threshold: float = 0.7
    holds_back_decode: bool = True

    @property
    def decode_interval_ms(self) -> float:
        """Mean time from the beginning of a decode step to the next's while prefill is busy; 0: no matter."""
        return DECODE_PACE * self.tpot_target_ms if self.holds_back_decode else 0.0


class SemiPDConfig(Section, frozen=True):
    """Instances of type ``semi_pd``: how prefill and decode share a device.

    Attributes:
        prefill_percentage, decode_percentage: of the device, while both phases are busy; the sum may
            pass 100. Default: the environment's SEMI_PD_PREFILL_SM_PERCENTILE and
            SEMI_PD_DECODE_SM_PERCENTILE, else 80 and 100.
        mixed: begin with one worker that does both phases in the same steps, instead of side by side. Default:
            with ``slo``, whose controller parts them where that is better, unless the ladder has no such worker.
        prefill_priority: `CUDA_MPS_CLIENT_PRIORITY` of prefill workers: 1 asks MPS to let them yield to
            decode, 0 does not (no difference was measured: docs/semi_pd.md).
        ladder: further percentages to keep workers at. A phase that is alone gets its largest.
        num_sleepers: processes kept that have imported everything and wait to become workers.
        preparation_timeout_s: new workers that are not ready by then are discarded.
        drain_timeout_s: a retired worker that has not ended by then is reported, and killed.
        heartbeat_interval_s: how often the resident process is asked for a sign of life.
        slo: targets to move the split for; None: it stays where it is put.
    """

    prefill_percentage: int | None = None
    decode_percentage: int | None = None
    mixed: bool | None = None
    prefill_priority: Literal[0, 1] = 1
    ladder: LadderConfig = LadderConfig()
    num_sleepers: int = 2
    preparation_timeout_s: float = 60.0
    drain_timeout_s: float = 60.0
    heartbeat_interval_s: float = 1.0
    slo: SLOConfig | None = None
