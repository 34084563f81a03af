"""The SLO controller of a running system: windows come from the scheduler, moves go to the rotation manager."""

from __future__ import annotations

import logging
import time
from typing import Any

from hbserve.config import Config
from hbserve.config.semi_pd import SLOConfig
from hbserve.errors import ConfigError, EngineDeadError
from hbserve.messages.supervisor import ReportEvent
from hbserve.metrics.window_metrics import AggregatedMetrics
from hbserve.policy.profile_file import load_profile, profiled_predictor
from hbserve.policy.step_profile import StepProfile
from hbserve.semi_pd.scheduler_link import SchedulerLink
from hbserve.semi_pd.slo_algorithm import RotationManager, SLOAwareResourceController
from hbserve.slo.constraints import SLOConstraints, SMAllocation, SplitBounds
from hbserve.slo.latency_model import LatencyModel

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 2.0
_MAX_WINDOW_S = 30.0
"""Longest window that the scheduler's collector keeps."""


class SchedulerMetricsSource:
    """Scheduler's metrics for one controller: its window can begin anew without a change for other readers."""

    def __init__(self, link: SchedulerLink, window_s: float) -> None:
        self._link, self._window_s = link, window_s
        self._since = time.monotonic()

    def get_current_window_metrics(self) -> AggregatedMetrics:
        """Get the metrics of the last ``window_s`` seconds, or since `reset_window`.

        Raises:
            EngineDeadError: if the scheduler does not answer.
        """
        seconds = min(self._window_s, time.monotonic() - self._since)
        metrics = self._link.get_window(seconds, _ANSWER_TIMEOUT_S)
        if metrics is None:
            raise EngineDeadError(f"the scheduler did not answer within {_ANSWER_TIMEOUT_S:g} s")
        return metrics

    def reset_window(self) -> None:
        """Begin a new window now."""
        self._since = time.monotonic()

    def begin_exclusion(self) -> None:
        """Leave out latencies that overlap the time from now."""
        self._link.mark_rotation(True)

    def end_exclusion(self) -> None:
        """End the time that is left out."""
        self._link.mark_rotation(False)


def make_controller(
    config: Config, slo: SLOConfig, manager: RotationManager, link: SchedulerLink
) -> SLOAwareResourceController:
    """Make the configured controller, not yet started.

    Raises:
        ConfigError: naming what cannot be honoured.
    """
    constraints, bounds, profile = check_slo(slo)
    ladder = config.semi_pd.ladder
    alone = SMAllocation(max(ladder.prefill), max(ladder.decode)) if ladder.prefill and ladder.decode else None
    model = LatencyModel(
        profiled_predictor(profile, priority=bool(config.semi_pd.prefill_priority)),
        constraints,
        alone,
        config.performance.max_num_seqs,
        config.prefill_budget,
        slo.decode_interval_ms,
    )
    source = SchedulerMetricsSource(link, slo.window_s)
    logger.info(
        "SLO control: TTFT %g ms, TPOT %g ms; step times of %s on %s",
        *(slo.ttft_target_ms, slo.tpot_target_ms, profile.model, profile.device),
    )

    def on_error(error: str) -> None:
        link.send(ReportEvent(kind="slo_failed", subject="the SLO controller", text=error))

    return SLOAwareResourceController(constraints, source, manager, slo.monitoring_interval_s, bounds, model, on_error)


def check_slo(slo: SLOConfig) -> tuple[SLOConstraints, SplitBounds, StepProfile]:
    """Read targets, bounds and profile from a configuration.

    Raises:
        ConfigError: naming what cannot be honoured.
    """
    try:
        constraints = SLOConstraints(**_fields(slo, SLOConstraints))
        bounds = SplitBounds(**_fields(slo, SplitBounds))
    except ConfigError as error:
        raise ConfigError(f"semi_pd.slo.{error}", f"semi_pd.slo.{error.key}") from None
    if not bounds.min_window_s <= slo.window_s <= _MAX_WINDOW_S:
        what = f"must be in {bounds.min_window_s:g}..{_MAX_WINDOW_S:g}, got {slo.window_s:g}"
        raise ConfigError(f"semi_pd.slo.window_s: {what}", "semi_pd.slo.window_s")
    return constraints, bounds, load_profile(slo.profile)


def _fields(slo: SLOConfig, kind: Any) -> dict[str, Any]:
    return {name: getattr(slo, name) for name in kind.__dataclass_fields__ if name in slo.__struct_fields__}
