"""Splits of a shared GPU, the latency targets that the controller holds, and the bounds of its choice."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hbserve.config import InstanceRole
from hbserve.config.semi_pd import DECODE_PACE, SLOConfig
from hbserve.errors import ConfigError

_DEFAULTS = SLOConfig(ttft_target_ms=1.0, tpot_target_ms=1.0)  # of every field that is not a target


@dataclass(frozen=True, slots=True, order=True)
class SMAllocation:
    """Split of the streaming multiprocessors (of the threads, on a CPU) while both phases run, in percent.

    The sum may pass 100: the phases then compete, and prefill, which has the lower priority, yields.

    Attributes:
        mixed: one worker does both phases in the same steps. The percentages are then those of the other workers,
            which are kept ready.

    Raises:
        ConfigError: if a percentage is no whole number from 1 to 100.
    """

    prefill_percentage: int
    decode_percentage: int
    mixed: bool = False

    def __post_init__(self) -> None:
        for name in ("prefill_percentage", "decode_percentage"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 100:
                raise ConfigError(f"{name}: must be a whole number from 1 to 100, got {value!r}", name)

    def __str__(self) -> str:
        return f"({self.prefill_percentage}, {self.decode_percentage})" + " mixed" * self.mixed

    @property
    def percentages(self) -> tuple[int, int]:
        """The shares of prefill and of decode, in percent."""
        return self.prefill_percentage, self.decode_percentage

    def share_of(self, phase: InstanceRole) -> int:
        """Return the percentage of ``prefill`` or ``decode``."""
        return self.prefill_percentage if phase is InstanceRole.PREFILL else self.decode_percentage


@dataclass(frozen=True)
class SLOConstraints:
    """Latency targets.

    Attributes:
        ttft_target_ms, tpot_target_ms: latencies that a request should meet.
        ttft_percentile, tpot_percentile: percentile of requests that is compared with the target.
        ttft_violation_threshold, tpot_violation_threshold: multiple of the target that counts as a violation.

    Raises:
        ConfigError: naming the value that makes no sense.
    """

    ttft_target_ms: float
    tpot_target_ms: float
    ttft_percentile: float = _DEFAULTS.ttft_percentile
    tpot_percentile: float = _DEFAULTS.tpot_percentile
    ttft_violation_threshold: float = _DEFAULTS.ttft_violation_threshold
    tpot_violation_threshold: float = _DEFAULTS.tpot_violation_threshold

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            low, high = (0.0, 100.0) if field.name.endswith("percentile") else (0.0, float("inf"))
            if field.name.endswith("threshold"):
                low = 1.0 - 1e-9
            if not low < value < high:
                raise ConfigError(f"{field.name}: must be above {low:g} and below {high:g}, got {value}", field.name)

    @property
    def decode_interval_ms(self) -> float:
        """Mean interval of decode steps while prefill is busy: the TPOT target with some room. A longer interval speeds
        prefill up."""
        return DECODE_PACE * self.tpot_target_ms


@dataclass(frozen=True, kw_only=True)
class SplitBounds:
    """Bounds of the controller's choice.

    Attributes:
        min_percentage: smallest share of either phase.
        max_total_percentage: largest sum of both; 200 allows (100, 100), 100 forbids that the phases compete.
        adjustment_step: distance of neighbouring splits, percentage points.
        cooldown_s: shortest time from one move to the next.
        rotation_cooldown_s: shortest time from a move that starts processes to the next such move.
        hysteresis: share of goodput that a move must gain while no target is violated.
        min_confidence_threshold: confidence below which the controller does not follow the model. It then moves only to
            a neighbour, and only while a target is violated.
        min_window_s: shortest window that is judged.
    """

    min_percentage: int = _DEFAULTS.min_percentage
    max_total_percentage: int = _DEFAULTS.max_total_percentage
    adjustment_step: int = _DEFAULTS.adjustment_step
    cooldown_s: float = _DEFAULTS.cooldown_s
    rotation_cooldown_s: float = _DEFAULTS.rotation_cooldown_s
    hysteresis: float = _DEFAULTS.hysteresis
    min_confidence_threshold: float = _DEFAULTS.min_confidence_threshold
    min_window_s: float = 1.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("min_percentage", 1, 100),
            ("max_total_percentage", 2 * self.min_percentage, 200),
            ("adjustment_step", 1, 50),
            ("hysteresis", 0, 1),
            ("min_confidence_threshold", 0, 1),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name}: must be in {low}..{high}, got {getattr(self, name)}", name)

    def allows(self, prefill_percentage: int, decode_percentage: int) -> bool:
        """Whether a split is within the bounds."""
        return (
            self.min_percentage <= prefill_percentage <= 100
            and self.min_percentage <= decode_percentage <= 100
            and prefill_percentage + decode_percentage <= self.max_total_percentage
        )
