"""Choice of the next split: the decision of the SLO controller, without a clock, thread or process of its own."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

from hbserve.slo.constraints import SLOConstraints, SMAllocation, SplitBounds
from hbserve.slo.latency_model import LatencyModel, Prediction, WorkloadEstimate
from hbserve.slo.workload import ObservedWindow, WorkloadEstimator

_MARGIN = 0.9  # share of a target that the prediction for a new split must meet
_HARM_WEIGHT = 0.1  # of a log ratio over a target, relative to a share of attainment
_REVERSAL_GUARD_S = 60.0
_MIN_RELIEF = 0.95  # of a violation that a move must leave at most, if the model is not trusted
_SIMILAR = 1.25  # loads whose token rates differ by a smaller factor count as the same


class WarmPercentages(NamedTuple):
    """Percentages that have workers, by role; a split of such percentages needs no new process."""

    prefill: Collection[int]
    decode: Collection[int]
    unified: Collection[int] = ()

    def has(self, split: SMAllocation) -> bool:
        """Whether a split needs no new process."""
        if split.mixed:
            return bool(self.unified)
        return split.prefill_percentage in self.prefill and split.decode_percentage in self.decode


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Decision with the numbers that led to it.

    Attributes:
        time: end of the window.
        chosen: the split to move to; ``current`` for no move.
        reason: why, in a few words.
        violations: ``ttft`` and ``tpot``, each to the observed multiple of its target.
        predicted: prediction for the current split; ``best``: for the best candidate.
        confidence: of the model, the error of its last prediction included.
    """

    time: float
    current: SMAllocation
    chosen: SMAllocation
    reason: str
    workload: WorkloadEstimate
    violations: dict[str, float]
    confidence: float
    predicted: Prediction | None = None
    candidate: SMAllocation | None = None
    best: Prediction | None = None
    num_candidates: int = 0

    @property
    def moves(self) -> bool:
        """Whether another split is wanted."""
        return self.chosen != self.current


@dataclass(frozen=True)
class _LeftSplit:
    """Split that was left, and what was observed under it."""

    time: float
    allocation: SMAllocation
    workload: WorkloadEstimate
    badness: float


class SplitPolicy:
    """Policy that maximises predicted goodput subject to both targets.

    Candidates are the neighbours of the current split and all splits on the grid of ``adjustment_step``, overcommitted
    ones included. Mixing both phases in one worker is a candidate if a worker for that is warm. The best candidate
    has the most goodput among those that are predicted to hold both targets. If there are none, the best has the most
    attainment minus harm, where harm is how far both latencies are beyond their targets.

    A move needs a reason: a target is violated, or predicted to be, or the gain exceeds the hysteresis. Three moves are
    forbidden: any move during the cool-down; a move back to a split that was left under the same load, unless the
    present split is worse; and, while confidence is low, a move beyond neighbours. While confidence is low, an observed
    violation is a reason to move even if the model predicts none (`_relief`).
    """

    def __init__(self, model: LatencyModel, constraints: SLOConstraints, bounds: SplitBounds | None = None) -> None:
        self.model = model
        self.constraints = constraints
        self.bounds = bounds or SplitBounds()
        self._estimator = WorkloadEstimator()
        self._learnt_until = -math.inf
        self._moved_at = -math.inf
        self._rotated_at = -math.inf
        self._left: _LeftSplit | None = None
        self._wanted: SMAllocation | None = None

    def decide(self, window: ObservedWindow, current: SMAllocation, warm: WarmPercentages | None = None) -> Decision:
        """Judge a window. The caller makes the move, and then calls `moved`.

        Args:
            current: the split in effect during the window.
            warm: percentages with warm workers; None: all percentages of both phases, and no worker mixes.
        """
        workload = self._estimator.update(window.workload, window.start, window.end)
        self._learn(window, workload, current)
        violations = self._violations(window)

        stay = Decision(
            time=window.end,
            current=current,
            chosen=current,
            reason="the window is too short",
            workload=workload,
            violations=violations,
            confidence=self.model.confidence,
        )
        if window.end - window.start < self.bounds.min_window_s:
            return stay
        if workload.arrival_rate <= 0 and not workload.running and not workload.backlog_tokens:
            self._wanted = None
            return replace(stay, reason="nothing to do")
        if window.end - self._moved_at < self.bounds.cooldown_s:
            return replace(stay, reason="cooling down")
        candidates = self._candidates(current, violations, warm, window.end)
        predictions = {split: self.model.predict(workload, split) for split in (*candidates, current)}
        predicted = predictions[current]
        best = max(predictions, key=lambda split: (*self._rank(predictions[split], split == current), _key(split)))
        stay = replace(
            stay, predicted=predicted, candidate=best, best=predictions[best], num_candidates=len(predictions)
        )
        why = "the current split is the best" if best == current else None
        moves = False
        if best != current:
            changes_kind = best.mixed is not current.mixed
            why = self._why_move(predicted, predictions[best], violations, best.mixed, changes_kind)
            moves = why is not None
        relief = None if moves else self._relief(predictions, current, window)
        if relief is not None:
            best, moves, why = relief, True, f"{' and '.join(violations)} violated"
            stay = replace(stay, candidate=best, best=predictions[best])
        if not moves:
            self._wanted = None
            return replace(stay, reason=why or "too little to gain")
        assert why is not None
        if self._is_reversal(best, workload, window, violations):
            return replace(stay, reason="it was left under this load")
        # Two windows in a row must want a move, unless the service is bad already: one window may be chance.
        urgent = max(violations.values(), default=0.0) > 1.5 or predicted.attainment < 0.5
        if self._wanted is None and not urgent:
            self._wanted = best
            return replace(stay, reason="to be confirmed by the next window")
        return replace(stay, reason=why, chosen=best)

    def moved(self, decision: Decision, rotated: bool) -> None:
        """Note that a decision has been carried out.

        Args:
            rotated: new processes had to be started.
        """
        self._moved_at = decision.time
        if rotated:
            self._rotated_at = decision.time
        self._wanted = None
        badness = max(decision.violations.values(), default=1.0)
        self._left = _LeftSplit(decision.time, decision.current, decision.workload, badness)

    # --- parts -----------------------------------------------------------------------------------

    def _learn(self, window: ObservedWindow, workload: WorkloadEstimate, current: SMAllocation) -> None:
        """Let the model learn from windows that overlap by at most half."""
        duration = window.end - window.start
        if duration < self.bounds.min_window_s or window.end - self._learnt_until < duration / 2:
            return
        self._learnt_until = window.end
        self.model.observe(workload, current, window.ttft, window.tpot)

    def _seen(self, window: ObservedWindow) -> dict[str, float]:
        """Return the observed latencies as multiples of their targets."""
        slo = self.constraints
        seen = (("ttft", window.ttft, slo.ttft_target_ms), ("tpot", window.tpot, slo.tpot_target_ms))
        return {name: latency.percentile_ms / target for name, latency, target in seen if latency is not None}

    def _violations(self, window: ObservedWindow) -> dict[str, float]:
        slo = self.constraints
        thresholds = {"ttft": slo.ttft_violation_threshold, "tpot": slo.tpot_violation_threshold}
        return {name: ratio for name, ratio in self._seen(window).items() if ratio > thresholds[name]}

    def _relief(
        self, predictions: dict[SMAllocation, Prediction], current: SMAllocation, window: ObservedWindow
    ) -> SMAllocation | None:
        """Find the neighbour that relieves a violated target most, while the model is known to be wrong.

        The model may have been made for another device, so only ratios of its times are used: the observed latencies
        are scaled by the model's ratio between the neighbour and the current split.
        """
        is_trusted = self.model.confidence >= self.bounds.min_confidence_threshold
        if is_trusted or current.mixed or not self._violations(window):
            return None
        seen = self._seen(window)

        def worst(split: SMAllocation) -> float:
            scaled = zip(self._ratios(predictions[split]), self._ratios(predictions[current]), strict=True)
            factors = dict(zip(("ttft", "tpot"), (new / old for new, old in scaled), strict=True))
            return max(ratio * factors[name] for name, ratio in seen.items())

        best = min(predictions, key=lambda split: (split.mixed, worst(split)))
        return best if worst(best) <= _MIN_RELIEF * worst(current) else None

    def _candidates(
        self, current: SMAllocation, violations: dict[str, float], warm: WarmPercentages | None, now: float
    ) -> list[SMAllocation]:
        step = self.bounds.adjustment_step
        around = [
            (current.prefill_percentage + i * step, current.decode_percentage + j * step)
            for i in range(-2, 3)
            for j in range(-2, 3)
        ]
        if self.model.confidence >= self.bounds.min_confidence_threshold:
            grid = range(100, self.bounds.min_percentage - 1, -step)
            around += [(prefill, decode) for prefill in grid for decode in grid]
        elif not violations:
            return []
        only_warm = warm if now - self._rotated_at < self.bounds.rotation_cooldown_s else None
        if only_warm is not None:
            around += [(p, d) for p in only_warm.prefill for d in only_warm.decode]
        splits = [SMAllocation(*split) for split in dict.fromkeys(around) if self.bounds.allows(*split)]
        if only_warm is not None:
            splits = [split for split in splits if only_warm.has(split)]
        # Mixing keeps the workers of the current percentages ready.
        mixed = replace(current, mixed=True)
        return [*splits, mixed] if warm is not None and warm.has(mixed) else splits

    def _rank(self, prediction: Prediction, is_current: bool) -> tuple[bool, float, float]:
        """Rank by feasibility, then value, then the room left, in coarse steps so that small gains do not count."""
        margin = 1.0 if is_current else _MARGIN
        largest_ratio = max(self._ratios(prediction))
        return largest_ratio <= margin, round(self._value(prediction), 2), round(-4 * math.log(largest_ratio))

    def _ratios(self, prediction: Prediction) -> tuple[float, float]:
        """Return TTFT and TPOT as multiples of their targets."""
        slo = self.constraints
        return prediction.ttft_ms / slo.ttft_target_ms, prediction.tpot_ms / slo.tpot_target_ms

    def _value(self, prediction: Prediction) -> float:
        """Compute the attainment of served requests minus the harm to late ones."""
        harm = sum(max(0.0, math.log(ratio)) for ratio in self._ratios(prediction))
        return prediction.attainment / max(1.0, prediction.prefill_load) - _HARM_WEIGHT * harm

    def _value_seen(self, violations: dict[str, float]) -> float:
        """Bound the value of a window with violated targets: at their percentiles requests were this late."""
        percentiles = {"ttft": self.constraints.ttft_percentile, "tpot": self.constraints.tpot_percentile}
        attainment = min((percentiles[name] / 100 for name in violations), default=1.0)
        return attainment - _HARM_WEIGHT * sum(map(math.log, violations.values()))

    def _why_move(
        self, predicted: Prediction, best: Prediction, violations: dict[str, float], to_mix: bool, changes_kind: bool
    ) -> str | None:
        """Say why to move; None if it is not worth it.

        Args:
            to_mix: the best candidate mixes both phases.
            changes_kind: the move is between mixing and side by side. Errors of two models do not cancel as those of
                two splits do. So such a move must gain twice as much, and observed violations of a split count too.
        """
        if changes_kind and not to_mix and not self._rank(best, False)[0]:
            return None  # under overload, no split has been found to serve more than mixing
        value = self._value(predicted)
        gain = self._value(best) - (min(value, self._value_seen(violations)) if to_mix and changes_kind else value)
        if gain >= self.bounds.hysteresis * (1 + changes_kind):
            return f"gains {gain:.2f}"
        if changes_kind:
            return None
        if not self._rank(predicted, True)[0] and self._rank(best, False)[0]:
            return "holds both targets again"
        if violations and gain >= self.bounds.hysteresis / 2:
            return f"{' and '.join(violations)} violated"
        return None

    def _is_reversal(
        self, best: SMAllocation, workload: WorkloadEstimate, window: ObservedWindow, violations: dict[str, float]
    ) -> bool:
        left = self._left
        if left is None or best != left.allocation or window.end - left.time > _REVERSAL_GUARD_S:
            return False
        worse_here = max(violations.values(), default=1.0) > left.badness
        return not worse_here and _is_similar(workload, left.workload)


def _key(split: SMAllocation) -> tuple[bool, int, int]:
    """Order equals: mixing first, which needs no other step's end; then larger shares, which are faster unless the
    phases compete."""
    return split.mixed, split.prefill_percentage + split.decode_percentage, split.decode_percentage


def _is_similar(a: WorkloadEstimate, b: WorkloadEstimate) -> bool:
    rates = [(w.arrival_rate * w.prompt_tokens + 1.0, w.arrival_rate * w.output_tokens + 1.0) for w in (a, b)]
    return all(max(x / y, y / x) < _SIMILAR for x, y in zip(*rates, strict=True))
