"""Step times at any split, size and batch, from the points of a profile.

Alone, a step's time is linear in its work (``b + a · tokens + c · tokens · keys``), with coefficients for each measured
percentage. Between two percentages it is interpolated in ``1 / percentage``: piece by piece the form ``a/y + b`` of
Semi-PD's section 5 (arXiv 2504.19867). One such curve over the whole range would be 13 % off at half of an H200, whose
bandwidth needs only half of its SMs.

Side by side, a decode step takes ``c + d · its time alone``. Each of its kernels waits for room on the device, however
small the batch is (c), and its memory traffic shares the bandwidth (d). A prefill step is slowed down more, the longer
decode steps take alone. Both are fitted to the batches of each measured split and number of prompt tokens in a step,
and interpolated between these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hbserve.slo.constraints import SMAllocation
from hbserve.slo.least_squares import PriorLeastSquares
from hbserve.slo.step_profile import BUILTIN_PROFILE, StepProfile, TogetherPoint

_MEASUREMENT_ERROR = 0.02  # of a point, relative
# Prior shares of a large step's time: fixed, per token, and per key.
_PREFILL_SHARES = (0.1, 0.8, 0.1)
_DECODE_SHARES = (0.5, 0.1, 0.4)
_USUAL_DECODE = (64, 1024)  # batch and context
_STEPS_PER_OCTAVE = 8  # of a decode step's time alone; slowdowns are cached at each
_Sample = tuple[tuple[float, ...], float]  # features, milliseconds


@dataclass(frozen=True, slots=True)
class Slowdown:
    """Factors on the step times of each phase while the other runs too."""

    prefill: float
    decode: float


class StepTimes:
    """Step times in milliseconds.

    Args:
        profile: of a model on a device; default: the built-in one. If it has no points side by side, the slowdowns of
            the built-in one stand in.
        priority: prefill runs below decode's priority.
    """

    def __init__(self, profile: StepProfile | None = None, priority: bool = True) -> None:
        self.profile = profile = profile or StepProfile.load(BUILTIN_PROFILE)
        self._prefill = _Curve(
            [(p.percentage, (_prefill_features(p.tokens, p.context), p.ms)) for p in profile.prefill], _PREFILL_SHARES
        )
        self._decode = _Curve(
            [(p.percentage, (_decode_features(p.batch, p.context), p.ms)) for p in profile.decode], _DECODE_SHARES
        )
        self._pairs = self._measured_pairs(priority)
        self._mixed = self._fit_mixed()
        self._cache: dict[tuple[SMAllocation, int, int], Slowdown] = {}

    def prefill_ms(self, tokens: float, context: float, percentage: int) -> float:
        """Compute a prefill step alone: ``tokens`` of prompts that have ``context`` tokens before them."""
        min_ms = self._decode.ms(_decode_features(1, 0), percentage)  # any step reads the weights
        return max(min_ms, self._prefill.ms(_prefill_features(tokens, context), percentage))

    def decode_ms(self, batch: float, context: float, percentage: int) -> float:
        """Compute a decode step alone: ``batch`` sequences of ``context`` tokens."""
        return self._decode.ms(_decode_features(batch, context), percentage)

    def mixed_ms(self, chunk: float, batch: float, context: float, prompt_context: float = 0.0) -> float:
        """Compute a step of one process on the whole device with a prompt chunk and a decode batch in it.

        Args:
            prompt_context: tokens of the prompt before the chunk.
        """
        if not chunk:
            return self.decode_ms(batch, context, 100)
        if not batch:
            return self.prefill_ms(chunk, prompt_context, 100)
        return self._mixed.predict(self._mixed_features(chunk, batch, context, prompt_context))

    def _measured_pairs(self, priority: bool) -> dict[int, list[_Pair]]:
        """Fit the splits that were measured side by side, by prompt tokens in a step."""
        alone = self if self.profile.together else StepTimes()
        together = alone.profile.together
        points: dict[tuple[int, SMAllocation], list[TogetherPoint]] = {}
        for point in [point for point in together if point.priority is priority] or together:
            split = SMAllocation(point.prefill_percentage, point.decode_percentage)
            points.setdefault((point.tokens, split), []).append(point)
        pairs: dict[int, list[_Pair]] = {}
        for (tokens, split), group in points.items():
            prefill_ms = alone.prefill_ms(tokens, 0, split.prefill_percentage)
            alone_ms = [alone.decode_ms(point.batch, point.context, split.decode_percentage) for point in group]
            pair = _Pair(
                split=split,
                decode_scale=alone.decode_ms(*_USUAL_DECODE, split.decode_percentage),
                decode=_line(alone_ms, [point.decode_ms for point in group], 1.0),
                prefill=_line(alone_ms, [point.prefill_ms / prefill_ms for point in group], 0.0),
            )
            pairs.setdefault(tokens, []).append(pair)
        return pairs

    def slowdown(self, allocation: SMAllocation, decode_ms: float, tokens: float) -> Slowdown:
        """Compute the slowdown while both phases run.

        Args:
            decode_ms: time of a decode step alone at its percentage.
            tokens: prompt tokens in a step.
        """
        sizes = sorted(self._pairs)
        below = max((size for size in sizes if size <= tokens), default=sizes[0])
        above = min((size for size in sizes if size >= tokens), default=sizes[-1])
        step = round(_STEPS_PER_OCTAVE * math.log2(max(0.01, decode_ms)))
        low = self._at_size(allocation, step, below)
        if below == above:
            return low
        high = self._at_size(allocation, step, above)
        share = math.log(tokens / below) / math.log(above / below)
        return Slowdown(
            low.prefill * (high.prefill / low.prefill) ** share, low.decode * (high.decode / low.decode) ** share
        )

    def _at_size(self, allocation: SMAllocation, step: int, size: int) -> Slowdown:
        """Compute the slowdown at a measured number of prompt tokens."""
        found = self._cache.get((allocation, step, size))
        if found is None:
            load = 2 ** (step / _STEPS_PER_OCTAVE) / self.decode_ms(*_USUAL_DECODE, allocation.decode_percentage)
            weights = prefill = decode = 0.0
            for pair in self._pairs[size]:
                distance = math.hypot(
                    (pair.split.prefill_percentage - allocation.prefill_percentage) / 100,
                    (pair.split.decode_percentage - allocation.decode_percentage) / 100,
                )
                weight = 1 / (distance**2 + 1e-6) ** 2
                slowdown = pair.slowdown(load)
                weights += weight
                prefill += weight * math.log(slowdown.prefill)
                decode += weight * math.log(slowdown.decode)
            found = Slowdown(math.exp(prefill / weights), math.exp(decode / weights))
            self._cache[allocation, step, size] = found
        return found

    def _mixed_features(
        self, chunk: float, batch: float, context: float, prompt_context: float = 0.0
    ) -> tuple[float, ...]:
        return (1.0, self.prefill_ms(chunk, prompt_context, 100), self.decode_ms(batch, context, 100))

    def _fit_mixed(self) -> PriorLeastSquares:
        """Fit steps with both: they take less than the sum of both, because they read the weights once."""
        fit = PriorLeastSquares((0.0, 1.0, 0.8), (5.0, 0.2, 0.4))
        for point in self.profile.mixed:
            features = self._mixed_features(point.chunk, point.batch, point.context)
            fit.observe(features, point.ms, _MEASUREMENT_ERROR * point.ms)
        return fit


def _prefill_features(tokens: float, context: float) -> tuple[float, ...]:
    return (1.0, tokens, tokens * (context + tokens / 2))


def _decode_features(batch: float, context: float) -> tuple[float, ...]:
    return (1.0, batch, batch * context)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Measured split, with steps of one number of prompt tokens.

    Attributes:
        decode_scale: milliseconds of a usual decode step alone at its percentage.
        decode: line of a decode step's time beside prefill over its time alone; constant and slope.
        prefill: line of prefill's slowdown over the same time.
    """

    split: SMAllocation
    decode_scale: float
    decode: tuple[float, float]
    prefill: tuple[float, float]

    def slowdown(self, decode_load: float) -> Slowdown:
        """Compute the slowdown beside decode steps that take ``decode_load`` times a usual one."""
        alone_ms = decode_load * self.decode_scale
        decode_ms = self.decode[0] + self.decode[1] * alone_ms
        return Slowdown(max(1.0, self.prefill[0] + self.prefill[1] * alone_ms), max(1.0, decode_ms / alone_ms))


def _line(x: list[float], y: list[float], slope_share: float) -> tuple[float, float]:
    """Fit a line by least squares; returns constant and slope, neither negative.

    Args:
        slope_share: share of the value that grows with x if there is one point only.
    """
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    variance = sum((value - mean_x) ** 2 for value in x)
    slope = slope_share * mean_y / mean_x
    if variance:
        covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
        slope = min(max(0.0, covariance / variance), mean_y / mean_x)
    return mean_y - slope * mean_x, slope


class _Curve:
    """Step time of one phase alone: coefficients at each measured percentage."""

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
            # The prior is the whole device's curve, scaled; many points may bend it.
            ratio = math.exp(sum(math.log(ms / whole.predict(features)) for features, ms in group) / len(group))
            scaled = [ratio * coefficient for coefficient in whole.coefficients]
            deviations = [0.2 * coefficient + 1e-9 for coefficient in scaled]
            self._fits[percentage] = _fit(PriorLeastSquares(scaled, deviations), group)

    def ms(self, features: tuple[float, ...], percentage: int) -> float:
        below = max((p for p in self._percentages if p <= percentage), default=self._percentages[0])
        above = min((p for p in self._percentages if p >= percentage), default=self._percentages[-1])
        if percentage < below:  # below the measured range: half the share, twice the time
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
    """Fit with a weak prior: each coefficient may be twice the guess."""
    features, ms = max(samples, key=lambda sample: sample[1])
    guess = [share * ms / feature for share, feature in zip(shares, features, strict=True)]
    return _fit(PriorLeastSquares(guess, guess), samples)
