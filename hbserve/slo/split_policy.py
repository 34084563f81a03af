"""Which split next: the controller's decision, without a clock, a thread or a worker of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from hbserve.slo.constraints import SLOConstraints, SMAllocation, SplitBounds
from hbserve.slo.latency_model import LatencyModel, Prediction, WorkloadEstimate
from hbserve.slo.workload import ObservedWindow, WorkloadEstimator

_MARGIN = 0.9  # of a target: what a split must be predicted to meet to be moved to
_HARM_WEIGHT = 0.1  # of a log ratio over a target, against a share of attainment
_REVERSAL_GUARD_S = 60.0
_SIMILAR = 1.25  # two loads whose token rates differ by less are one load


class WarmPercentages(NamedTuple):
    """Percentages that have workers: what is made of them needs no process."""

    prefill: Collection[int]
    decode: Collection[int]
    unified: Collection[int] = ()

    def has(self, split: SMAllocation) -> bool:
        """Whether a split is made of them."""
        if split.mixed:
            return bool(self.unified)
        return split.prefill_percentage in self.prefill and split.decode_percentage in self.decode


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided, with the numbers that led there.

    Attributes:
        time: of the window's end.
        chosen: the split to go to, ``current`` for none.
        reason: why, in a few words.
        violations: ``ttft`` and ``tpot`` to how many times the target was seen.
        predicted: of the current split, ``best`` of the best candidate.
        confidence: of the model, error of its last prediction included.
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
    """A split that was left, and what was seen there."""

    time: float
    allocation: SMAllocation
    workload: WorkloadEstimate
    badness: float


class SplitPolicy:
    """Maximises predicted goodput subject to both targets.

    Candidates are the neighbours of the current split and every split on the grid of
    ``adjustment_step``, overcommitted ones included; the best of the grid is the model's optimum. To mix
    both phases in one worker is one more, where there is a warm worker for it.
    Of those predicted to hold both targets, the one with the most goodput is best. Where none is,
    the one with the most attainment less harm, harm being how far beyond the targets both are.

    A move is made only where a target is violated, or predicted to be, or where it gains more than
    the hysteresis; not before the cool-down is over; not back to a split that was left under the
    same load unless it is worse here; and not beyond neighbours on a prediction of little confidence.
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
        """Judge a window; the caller makes the move, and says so with `moved`.

        Args:
            current: the split in effect during the window.
            warm: who has warm workers; None: all phases at all percentages, and nobody mixes.
        """
        workload = self._estimator.update(window.workload, window.start, window.end)
        self._learn(window, workload, current)
        violations = self._violations(window)

        def stay(reason: str, **numbers: object) -> Decision:
            decision = Decision(
                time=window.end,
                current=current,
                chosen=current,
                reason=reason,
                workload=workload,
                violations=violations,
                confidence=self.model.confidence,
            )
            return dataclasses.replace(decision, **numbers)  # type: ignore[arg-type]

        if window.end - window.start < self.bounds.min_window_s:
            return stay("the window is too short")
        if workload.arrival_rate <= 0 and not workload.running and not workload.backlog_tokens:
            self._wanted = None
            return stay("nothing to do")
        if window.end - self._moved_at < self.bounds.cooldown_s:
            return stay("cooling down")
        candidates = self._candidates(current, violations, warm, window.end)
        predicted = self.model.predict(workload, current)
        predictions = {candidate: self.model.predict(workload, candidate) for candidate in candidates}
        predictions[current] = predicted
        best = max(predictions, key=lambda split: (*self._rank(predictions[split], split == current), _key(split)))
        numbers = {
            "predicted": predicted,
            "candidate": best,
            "best": predictions[best],
            "num_candidates": len(predictions),
        }
        if best == current:
            self._wanted = None
            return stay("the current split is the best", **numbers)
        changes_kind = best.mixed is not current.mixed
        why = self._why_move(predicted, predictions[best], violations, best.mixed, changes_kind)
        if why is None:
            self._wanted = None
            return stay("too little to gain", **numbers)
        if self._is_reversal(best, workload, window, violations):
            return stay("it was left under this load", **numbers)
        # Seen twice, unless it is bad already: one window's chance shall not move anything.
        urgent = max(violations.values(), default=0.0) > 1.5 or predicted.attainment < 0.5
        if self._wanted is None and not urgent:
            self._wanted = best
            return stay("to be confirmed by the next window", **numbers)
        return dataclasses.replace(stay(why, **numbers), chosen=best)

    def moved(self, decision: Decision, rotated: bool) -> None:
        """The decision has been carried out.

        Args:
            rotated: with new processes, not with warm ones.
        """
        self._moved_at = decision.time
        if rotated:
            self._rotated_at = decision.time
        self._wanted = None
        badness = max(decision.violations.values(), default=1.0)
        self._left = _LeftSplit(decision.time, decision.current, decision.workload, badness)

    # --- parts -----------------------------------------------------------------------------------

    def _learn(self, window: ObservedWindow, workload: WorkloadEstimate, current: SMAllocation) -> None:
        """From windows that share no more than half of their time."""
        duration = window.end - window.start
        if duration < self.bounds.min_window_s or window.end - self._learnt_until < duration / 2:
            return
        self._learnt_until = window.end
        self.model.observe(workload, current, window.ttft, window.tpot)

    def _violations(self, window: ObservedWindow) -> dict[str, float]:
        slo = self.constraints
        seen = (
            ("ttft", window.ttft, slo.ttft_target_ms, slo.ttft_violation_threshold),
            ("tpot", window.tpot, slo.tpot_target_ms, slo.tpot_violation_threshold),
        )
        ratios = {name: latency.percentile_ms / target for name, latency, target, _ in seen if latency is not None}
        return {name: ratios[name] for name, _, _, threshold in seen if ratios.get(name, 0.0) > threshold}

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
        # The percentages stay ready for when it is not mixed any more.
        mixed = dataclasses.replace(current, mixed=True)
        return [*splits, mixed] if warm is not None and warm.has(mixed) else splits

    def _rank(self, prediction: Prediction, is_current: bool) -> tuple[bool, float, float]:
        """Feasible first, then what counts, then the room that is left, coarsely: small gains are none."""
        margin = 1.0 if is_current else _MARGIN
        largest_ratio = max(self._ratios(prediction))
        return largest_ratio <= margin, round(self._value(prediction), 2), round(-4 * math.log(largest_ratio))

    def _ratios(self, prediction: Prediction) -> tuple[float, float]:
        """TTFT and TPOT over their targets."""
        slo = self.constraints
        return prediction.ttft_ms / slo.ttft_target_ms, prediction.tpot_ms / slo.tpot_target_ms

    def _value(self, prediction: Prediction) -> float:
        """Attainment of what is served, less the harm to what is late."""
        harm = sum(max(0.0, math.log(ratio)) for ratio in self._ratios(prediction))
        return prediction.attainment / max(1.0, prediction.prefill_load) - _HARM_WEIGHT * harm

    def _value_seen(self, violations: dict[str, float]) -> float:
        """At most, of a window with violated targets: at their percentiles requests were late by so much."""
        percentiles = {"ttft": self.constraints.ttft_percentile, "tpot": self.constraints.tpot_percentile}
        attainment = min((percentiles[name] / 100 for name in violations), default=1.0)
        return attainment - _HARM_WEIGHT * sum(map(math.log, violations.values()))

    def _why_move(
        self, predicted: Prediction, best: Prediction, violations: dict[str, float], to_mix: bool, changes_kind: bool
    ) -> str | None:
        """Why it is worth it to move; None if it is not.

        Args:
            to_mix: the move is to one worker of both phases, or there is none.
            changes_kind: it is between that and side by side. Errors of two models do not cancel as those of two splits
                do: such a move must gain twice as much, and what was seen of splits counts, too.
        """
        if changes_kind and not to_mix and not self._rank(best, False)[0]:
            return None  # under overload no split has been found that serves more
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
    """Among equals the one that needs no other's end, then the larger shares, which are faster where they do not
    compete."""
    return split.mixed, split.prefill_percentage + split.decode_percentage, split.decode_percentage


def _is_similar(a: WorkloadEstimate, b: WorkloadEstimate) -> bool:
    rates = [(w.arrival_rate * w.prompt_tokens + 1.0, w.arrival_rate * w.output_tokens + 1.0) for w in (a, b)]
    return all(max(x / y, y / x) < _SIMILAR for x, y in zip(*rates, strict=True))
