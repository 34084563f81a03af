"""Configuration of instances whose prefill and decode share a device, and of their latency targets."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from hbserve.config.fields import (
    NonNegativeFloat,
    NonNegativeInt,
    NonNegativeSeconds,
    Percentage,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Section,
)

DECODE_PACE = 0.8
"""Share of the TPOT target that a decode step may take beside prefill."""
MIXED_PACE = 0.9
"""Share of the TPOT target that a mixed step may take: no other worker slows it down."""

MixedLevel = Annotated[
    tuple[Percentage, ...], Meta(max_length=1, description="one percentage: one worker mixes both phases at a time")
]


class LadderConfig(Section, frozen=True):
    """Share levels: percentages at which a phase always has a warm worker, besides its share.

    Attributes:
        prefill, decode: percentages in any order.
        unified: percentage of the worker that mixes both phases in its steps. Default: 100 if ``semi_pd.mixed`` or
            ``semi_pd.slo`` can choose such a worker, else none.
    """

    prefill: tuple[Percentage, ...] = (100,)
    decode: tuple[Percentage, ...] = (100,)
    unified: MixedLevel | None = None


class SLOConfig(Section, frozen=True):
    """Latency targets for which the split of a ``semi_pd`` instance is moved; see docs/slo_control.md.

    Attributes:
        ttft_target_ms, tpot_target_ms: targets of every request.
        ttft_percentile, tpot_percentile: percentile of the requests that is compared with the target.
        ttft_violation_threshold, tpot_violation_threshold: multiple of the target that counts as a violation.
        profile: file of step times, from ``hbserve profile``; default: a built-in one.
        monitoring_interval_s: time between two measurements.
        window_s: age of the oldest request in a measurement.
        min_percentage, max_total_percentage, adjustment_step: limits of the splits that may be chosen.
        cooldown_s: shortest time between two moves.
        rotation_cooldown_s: shortest time between two moves that need new processes.
        hysteresis: share of goodput that a move must gain.
        min_confidence_threshold: confidence of the latency model below which its advice is ignored.
        holds_back_decode: while prompts are computed, decode makes only as many steps as the TPOT target needs.
    """

    ttft_target_ms: PositiveFloat
    tpot_target_ms: PositiveFloat
    ttft_percentile: PositiveFloat = 95.0
    tpot_percentile: PositiveFloat = 95.0
    ttft_violation_threshold: PositiveFloat = 1.1
    tpot_violation_threshold: PositiveFloat = 1.1
    profile: str | None = None
    monitoring_interval_s: Seconds = 2.0
    window_s: Seconds = 5.0
    min_percentage: PositiveInt = 10
    max_total_percentage: PositiveInt = 200
    adjustment_step: PositiveInt = 10
    cooldown_s: NonNegativeSeconds = 4.0
    rotation_cooldown_s: NonNegativeSeconds = 60.0
    hysteresis: NonNegativeFloat = 0.05
    min_confidence_threshold: NonNegativeFloat = 0.7
    holds_back_decode: bool = True

    @property
    def decode_interval_ms(self) -> float:
        """Mean time from the start of one decode step to the next while prefill is busy; 0: no limit."""
        return DECODE_PACE * self.tpot_target_ms if self.holds_back_decode else 0.0


class SemiPDConfig(Section, frozen=True):
    """Instances of type ``semi_pd``: how prefill and decode share a device.

    Attributes:
        prefill_percentage, decode_percentage: share of the device while both phases are busy; the sum may
            exceed 100. Default: the environment's SEMI_PD_PREFILL_SM_PERCENTILE and
            SEMI_PD_DECODE_SM_PERCENTILE, else 80 and 100.
        mixed: begin with one worker that does both phases in the same steps, instead of one worker for each. Default:
            true with ``slo``, whose controller separates the phases where that is better, unless the ladder has no
            worker for both phases.
        prefill_priority: `CUDA_MPS_CLIENT_PRIORITY` of prefill workers: 1 asks MPS to let them yield to
            decode, 0 does not (no difference was measured: docs/semi_pd.md).
        ladder: further percentages to keep workers at. A phase that is alone gets its largest.
        num_sleepers: standby processes that have imported everything and wait to become workers.
        preparation_timeout_s: new workers that are not ready by then are discarded.
        drain_timeout_s: a retired worker that has not ended by then is reported, and killed.
        heartbeat_interval_s: time between two heartbeats of the resident process.
        slo: targets for which the split is moved; None: the split stays as configured.
    """

    prefill_percentage: Percentage | None = None
    decode_percentage: Percentage | None = None
    mixed: bool | None = None
    prefill_priority: Literal[0, 1] = 1
    ladder: LadderConfig = LadderConfig()
    num_sleepers: NonNegativeInt = 2
    preparation_timeout_s: Seconds = 60.0
    drain_timeout_s: Seconds = 60.0
    heartbeat_interval_s: Seconds = 1.0
    slo: SLOConfig | None = None
