"""Step times at any split, size and batch, from the points of a profile.

Alone, a step's time is linear in its work (``b + a · tokens + c · tokens · keys``), with coefficients
for each measured percentage; between two of these it is interpolated in ``1 / percentage``, which is
the form ``a/y + b`` of Semi-PD's section 5 (arXiv 2504.19867) piece by piece. One such curve over the
whole range would be 13 % off at half of an H200, whose bandwidth needs only half of its SMs.

Side by side each phase is slower by a factor that depends on both percentages, on the priority, on
the batch and on the prompt tokens in a step; it is interpolated between the measured splits and sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hbserve.semi_pd.builtin_profile import H200_8B
from hbserve.semi_pd.least_squares import PriorLeastSquares
from hbserve.semi_pd.sm_allocation import SMAllocation
from hbserve.semi_pd.step_profile import StepProfile, TogetherPoint

_MEASUREMENT_ERROR = 0.02  # of a point, relative
# Where the points do not tell, a large step's time is believed to be so much fixed, per token, and per key.
_PREFILL_SHARES = (0.1, 0.8, 0.1)
_DECODE_SHARES = (0.5, 0.1, 0.4)
_Sample = tuple[tuple[float, ...], float]  # features, milliseconds


@dataclass(frozen=True, slots=True)
class Slowdown:
    """How many times longer the steps of each phase take while the other runs too."""

    prefill: float
    decode: float


class StepTimes:
    """Milliseconds per step.

    Args:
        profile: of a model on a device. Where it has no points side by side, the slowdowns of the
            built-in one stand in.
        priority: prefill runs below decode's priority.
    """

    def __init__(self, profile: StepProfile = H200_8B, priority: bool = True) -> None:
        self.profile = profile
        self._prefill = _Curve(
            [(p.percentage, (_prefill_features(p.tokens, p.context), p.ms)) for p in profile.prefill], _PREFILL_SHARES
        )
        self._decode = _Curve(
            [(p.percentage, (_decode_features(p.batch, p.context), p.ms)) for p in profile.decode], _DECODE_SHARES
        )
        self._slowdowns = self._measured_slowdowns(priority)
        self._mixed = self._fit_mixed()
        self._cache: dict[tuple[SMAllocation, int, int], Slowdown] = {}

    def prefill_ms(self, tokens: float, context: float, percentage: int) -> float:
        """A prefill step alone: ``tokens`` of prompts that have ``context`` tokens before them."""
        least = self._decode.ms(_decode_features(1, 0), percentage)  # any step reads the weights
        return max(least, self._prefill.ms(_prefill_features(tokens, context), percentage))

    def decode_ms(self, batch: float, context: float, percentage: int) -> float:
        """A decode step alone: ``batch`` sequences of ``context`` tokens."""
        return self._decode.ms(_decode_features(batch, context), percentage)

    def mixed_ms(self, chunk: float, batch: float, context: float, prompt_context: float = 0.0) -> float:
        """A step of one process on the whole device with a prompt chunk and a decode batch in it.

        Args:
            prompt_context: tokens of the prompt before the chunk.
        """
        if not chunk:
            return self.decode_ms(batch, context, 100)
        if not batch:
            return self.prefill_ms(chunk, prompt_context, 100)
        return self._mixed.predict(self._mixed_features(chunk, batch, context, prompt_context))

    def _measured_slowdowns(self, priority: bool) -> dict[int, list[tuple[TogetherPoint, float, float]]]:
        """By prompt tokens, points side by side, with the logarithms of prefill's and decode's slowdown."""
        together = self.profile.together or H200_8B.together
        alone = self if self.profile.together or self.profile is H200_8B else StepTimes(H200_8B)
        slowdowns: dict[int, list[tuple[TogetherPoint, float, float]]] = {}
        for point in [point for point in together if point.priority is priority] or together:
            prefill_ms = alone.prefill_ms(point.tokens, 0, point.prefill_percentage)
            decode_ms = alone.decode_ms(point.batch, point.context, point.decode_percentage)
            prefill, decode = point.prefill_ms / prefill_ms, point.decode_ms / decode_ms
            logs = math.log(max(1.0, prefill)), math.log(max(1.0, decode))
            slowdowns.setdefault(point.tokens, []).append((point, *logs))
        return slowdowns

    def slowdown(self, allocation: SMAllocation, batch_octave: int, tokens: float) -> Slowdown:
        """While both phases run, with ``2 ** batch_octave`` sequences decoding and so many prompt tokens in a step."""
        sizes = sorted(self._slowdowns)
        below = max((size for size in sizes if size <= tokens), default=sizes[0])
        above = min((size for size in sizes if size >= tokens), default=sizes[-1])
        low = self._at_size(allocation, batch_octave, below)
        if below == above:
            return low
        high = self._at_size(allocation, batch_octave, above)
        share = math.log(tokens / below) / math.log(above / below)
        return Slowdown(
            low.prefill * (high.prefill / low.prefill) ** share, low.decode * (high.decode / low.decode) ** share
        )

    def _at_size(self, allocation: SMAllocation, batch_octave: int, size: int) -> Slowdown:
        """At a number of prompt tokens that was measured."""
        found = self._cache.get((allocation, batch_octave, size))
        if found is None:
            weights = prefill = decode = 0.0
            for point, prefill_log, decode_log in self._slowdowns[size]:
                distance = _distance(point, allocation, batch_octave)
                weight = 1 / (distance**2 + 1e-6) ** 2
                weights += weight
                prefill += weight * prefill_log
                decode += weight * decode_log
            found = Slowdown(math.exp(prefill / weights), math.exp(decode / weights))
            self._cache[allocation, batch_octave, size] = found
        return found

    def _mixed_features(
        self, chunk: float, batch: float, context: float, prompt_context: float = 0.0
    ) -> tuple[float, ...]:
        return (1.0, self.prefill_ms(chunk, prompt_context, 100), self.decode_ms(batch, context, 100))

    def _fit_mixed(self) -> PriorLeastSquares:
        """One step for both reads the weights once: the sum of both, less some of it."""
        fit = PriorLeastSquares((0.0, 1.0, 0.8), (5.0, 0.2, 0.4))
        for point in self.profile.mixed:
            features = self._mixed_features(point.chunk, point.batch, point.context)
            fit.observe(features, point.ms, _MEASUREMENT_ERROR * point.ms)
        return fit


def _prefill_features(tokens: float, context: float) -> tuple[float, ...]:
    return (1.0, tokens, tokens * (context + tokens / 2))


def _decode_features(batch: float, context: float) -> tuple[float, ...]:
    return (1.0, batch, batch * context)


def _distance(point: TogetherPoint, allocation: SMAllocation, batch_octave: int) -> float:
    return math.hypot(
        (point.prefill_percentage - allocation.prefill_percentage) / 100,
        (point.decode_percentage - allocation.decode_percentage) / 100,
        (math.log2(point.batch) - batch_octave) / 10,
    )


class _Curve:
    """Coefficients at each measured percentage."""

    def __init__(self, samples: Sequence[tuple[int, _Sample]], shares: tuple[float, ...]) -> None:
        by_percentage: dict[int, list[_Sample]] = {}
        for percentage, sample in samples:
            by_percentage.setdefault(percentage, []).append(sample)
        self._percentages = sorted(by_percentage)
        largest = self._percentages[-1]
        whole = _fit_freely(by_percentage[largest], shares)
        self._fits = {largest: whole}
        for percentage in self._percentages[:-1]:
            group = by_percentage[percentage]
            # That the whole curve is scaled is believed first; many points may bend it.
            ratio = math.exp(sum(math.log(ms / whole.predict(features)) for features, ms in group) / len(group))
            scaled = [ratio * coefficient for coefficient in whole.coefficients]
            deviations = [0.2 * coefficient + 1e-9 for coefficient in scaled]
            self._fits[percentage] = _fit(PriorLeastSquares(scaled, deviations), group)

    def ms(self, features: tuple[float, ...], percentage: int) -> float:
        below = max((p for p in self._percentages if p <= percentage), default=self._percentages[0])
        above = min((p for p in self._percentages if p >= percentage), default=self._percentages[-1])
        if percentage < below:  # beyond what was measured: half the share, twice the time
            return self._fits[below].predict(features) * below / percentage
        low = self._fits[below].predict(features)
        if below == above or percentage > above:
            return low
        high = self._fits[above].predict(features)
        share = (1 / below - 1 / percentage) / (1 / below - 1 / above)
        return low + share * (high - low)


def _fit(fit: PriorLeastSquares, samples: Sequence[_Sample]) -> PriorLeastSquares:
    for features, ms in samples:
        fit.observe(features, ms, _MEASUREMENT_ERROR * ms)
    return fit


def _fit_freely(samples: Sequence[_Sample], shares: tuple[float, ...]) -> PriorLeastSquares:
    """With little belief: each coefficient may well be twice the guess."""
    features, ms = max(samples, key=lambda sample: sample[1])
    guess = [share * ms / feature for share, feature in zip(shares, features, strict=True)]
    return _fit(PriorLeastSquares(guess, guess), samples)
