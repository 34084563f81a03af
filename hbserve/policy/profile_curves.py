"""Step times at any share of the device, size and batch, from the points of a profile.

Alone, a step's time is linear in its work (``b + a · tokens + c · pairs``), with coefficients for each measured
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

from hbserve.policy.least_squares import LeastSquares
from hbserve.policy.step_profile import PairPoint, StepPoint, StepProfile

_MEASUREMENT_ERROR = 0.02  # of a point, relative
# Prior shares of a large step's time: fixed, per token, and per pair of query and key.
_PREFILL_SHARES = (0.1, 0.8, 0.1)
_DECODE_SHARES = (0.5, 0.1, 0.4)
_USUAL_DECODE = (64, 64 * 1024)  # rows and keys
_STEPS_PER_OCTAVE = 8  # of a decode step's time alone; slowdowns are cached at each
_Sample = tuple[tuple[float, ...], float]  # features, milliseconds


@dataclass(frozen=True, slots=True)
class Slowdown:
    """Factors on the step times of each phase while the other runs too."""

    prefill: float
    decode: float


class ProfileCurves:
    """Curves through the points of a profile.

    Args:
        profile: of a model on a device.
        priority: prefill runs below decode's priority.
        stand_in: another profile, for slowdowns if this one has no points side by side.
    """

    def __init__(self, profile: StepProfile, priority: bool = True, stand_in: StepProfile | None = None) -> None:
        self.profile = profile
        self._prefill = _Curve(profile.prefill, _PREFILL_SHARES)
        self._decode = _Curve(profile.decode, _DECODE_SHARES)
        self._mixed = self._fit_mixed()
        alone = self if profile.pairs or stand_in is None else ProfileCurves(stand_in, priority)
        self._pairs = alone._measured_pairs(priority)
        self._cache: dict[tuple[int, int, int, int], Slowdown] = {}

    def samples(self, percentage: int) -> list[tuple[tuple[float, float, float, float], float]]:
        """Compute the work and the seconds of each measured size of a step, at any percentage."""
        works = dict.fromkeys(
            (*_decode_features(point)[1:], *_prefill_features(point)[1:]) for point in self.profile.steps
        )
        return [(work, self.seconds(*work, percentage)) for work in works]

    def seconds(self, rows: float, keys: float, tokens: float, pairs: float, percentage: int) -> float:
        """Compute the time of a step alone; the numbers are those of a `StepWork`."""
        if not tokens:
            return self._decode_ms(rows, keys, percentage) / 1000
        if not rows:
            return self._prefill_ms(tokens, pairs, percentage) / 1000
        return self._mixed.predict(self._mixed_features(rows, keys, tokens, pairs, percentage)) / 1000

    def added_prompt_s(self, tokens: float, pairs: float) -> float:
        """Compute a lower bound of the time that prompt tokens add to any steps of a whole device.

        The fixed part of a step does not count, because any number of prompts and sequences may share it.
        """
        cheapest = min(1.0, self._mixed.coefficients[1])
        return cheapest * self._prefill.ms((0.0, tokens, pairs), 100) / 1000

    def _prefill_ms(self, tokens: float, pairs: float, percentage: int) -> float:
        min_ms = self._decode_ms(1, 0, percentage)  # any step reads the weights
        return max(min_ms, self._prefill.ms((1.0, tokens, pairs), percentage))

    def _decode_ms(self, rows: float, keys: float, percentage: int) -> float:
        return self._decode.ms((1.0, rows, keys), percentage)

    def _mixed_features(
        self, rows: float, keys: float, tokens: float, pairs: float, percentage: int
    ) -> tuple[float, float, float]:
        """Return the parts of a step with both: what is fixed, all tokens in one product, and decode's attention."""
        attention_ms = self._decode_ms(rows, keys, percentage) - self._decode_ms(rows, 0, percentage)
        return 1.0, self._prefill_ms(tokens + rows, pairs, percentage), attention_ms

    def _fit_mixed(self) -> LeastSquares:
        """Fit steps with both. A decode row costs as much as a prompt token, and its attention as in a decode step."""
        fit = LeastSquares((0.0, 1.0, 1.0), (5.0, 0.1, 0.4))
        samples = []
        for point in self.profile.mixed:
            _, rows, keys = _decode_features(point)
            _, tokens, pairs = _prefill_features(point)
            samples.append((self._mixed_features(rows, keys, tokens, pairs, point.percentage), point.ms))
        return _fit(fit, samples)

    # --- side by side ----------------------------------------------------------------------------

    def _measured_pairs(self, priority: bool) -> dict[int, list[_Pair]]:
        """Fit the splits that were measured side by side, by prompt tokens in a step."""
        measured = self.profile.pairs
        points: dict[tuple[int, int, int], list[PairPoint]] = {}
        for point in [point for point in measured if point.priority is priority] or measured:
            split = (point.prefill_percentage, point.decode_percentage)
            points.setdefault((point.prompt_tokens, *split), []).append(point)
        pairs: dict[int, list[_Pair]] = {}
        for (tokens, prefill_percentage, decode_percentage), group in points.items():
            prefill_ms = self._prefill_ms(tokens, tokens**2 / 2, prefill_percentage)
            alone_ms = [
                self._decode_ms(point.decode_rows, point.decode_rows * point.decode_context, decode_percentage)
                for point in group
            ]
            pair = _Pair(
                prefill_percentage=prefill_percentage,
                decode_percentage=decode_percentage,
                decode_scale=self._decode_ms(*_USUAL_DECODE, decode_percentage),
                decode=_line(alone_ms, [point.decode_ms for point in group], 1.0),
                prefill=_line(alone_ms, [point.prefill_ms / prefill_ms for point in group], 0.0),
            )
            pairs.setdefault(tokens, []).append(pair)
        return pairs

    def slowdown(self, prefill_percentage: int, decode_percentage: int, decode_s: float, tokens: float) -> Slowdown:
        """Compute the slowdown while both phases run; the profile must have points side by side.

        Args:
            decode_s: time of a decode step alone at its percentage.
            tokens: prompt tokens in a step.
        """
        sizes = sorted(self._pairs)
        below = max((size for size in sizes if size <= tokens), default=sizes[0])
        above = min((size for size in sizes if size >= tokens), default=sizes[-1])
        split, step = (prefill_percentage, decode_percentage), _octave_step(1000 * decode_s)
        low = self._at_size(*split, step, below)
        if below == above:
            return low
        high = self._at_size(*split, step, above)
        share = math.log(tokens / below) / math.log(above / below)
        return Slowdown(
            low.prefill * (high.prefill / low.prefill) ** share, low.decode * (high.decode / low.decode) ** share
        )

    def _at_size(self, prefill_percentage: int, decode_percentage: int, step: int, size: int) -> Slowdown:
        """Compute the slowdown at a measured number of prompt tokens."""
        found = self._cache.get((prefill_percentage, decode_percentage, step, size))
        if found is None:
            load = 2 ** (step / _STEPS_PER_OCTAVE) / self._decode_ms(*_USUAL_DECODE, decode_percentage)
            weights = prefill = decode = 0.0
            for pair in self._pairs[size]:
                distance = math.hypot(
                    (pair.prefill_percentage - prefill_percentage) / 100,
                    (pair.decode_percentage - decode_percentage) / 100,
                )
                weight = 1 / (distance**2 + 1e-6) ** 2
                slowdown = pair.slowdown(load)
                weights += weight
                prefill += weight * math.log(slowdown.prefill)
                decode += weight * math.log(slowdown.decode)
            found = Slowdown(math.exp(prefill / weights), math.exp(decode / weights))
            self._cache[prefill_percentage, decode_percentage, step, size] = found
        return found


def _octave_step(ms: float) -> int:
    return round(_STEPS_PER_OCTAVE * math.log2(max(0.01, ms)))


def _prefill_features(point: StepPoint) -> tuple[float, float, float]:
    return 1.0, point.prompt_tokens, point.prompt_tokens * (point.prompt_context + point.prompt_tokens / 2)


def _decode_features(point: StepPoint) -> tuple[float, float, float]:
    return 1.0, point.decode_rows, point.decode_rows * point.decode_context


@dataclass(frozen=True, slots=True)
class _Pair:
    """Measured split, with steps of one number of prompt tokens.

    Attributes:
        decode_scale: milliseconds of a usual decode step alone at its percentage.
        decode: line of a decode step's time beside prefill over its time alone; constant and slope.
        prefill: line of prefill's slowdown over the same time.
    """

    prefill_percentage: int
    decode_percentage: int
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

    def __init__(self, points: Sequence[StepPoint], shares: tuple[float, ...]) -> None:
        by_percentage: dict[int, list[_Sample]] = {}
        for point in points:
            features = _prefill_features(point) if point.prompt_tokens else _decode_features(point)
            by_percentage.setdefault(point.percentage, []).append((features, point.ms))
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
            self._fits[percentage] = _fit(LeastSquares(scaled, deviations), group)

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


def _fit(fit: LeastSquares, samples: Sequence[_Sample]) -> LeastSquares:
    for features, ms in samples:
        fit.add(features, ms, 1 / (_MEASUREMENT_ERROR * ms) ** 2)
    fit.solve()
    return fit


def _fit_freely(samples: Sequence[_Sample], shares: tuple[float, ...]) -> LeastSquares:
    """Fit with a weak prior: each coefficient may be twice the guess."""
    features, ms = max(samples, key=lambda sample: sample[1])
    guess = [share * ms / feature for share, feature in zip(shares, features, strict=True)]
    return _fit(LeastSquares(guess, guess), samples)
