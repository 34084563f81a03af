"""Linear least squares without negative coefficients: the one way in which this package learns times."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import add, mul, sub

_MAX_SWEEPS = 20_000
_TOLERANCE = 1e-10
"""Relative change of the coefficients in a sweep at which a solution is exact."""
_MIN_INDEPENDENCE = 1e-3
"""Bound of how independent two features are. If all observations have both in one proportion, their coefficients cannot
be told apart."""


class LeastSquares:
    """Fit of ``y = coefficients · features``. No coefficient is negative, because more work never takes less time.

    It keeps sums, not observations. The coefficients follow by coordinate descent (Gauss-Seidel on the normal
    equations, each coefficient cut off at 0). They start from those of the time before, so one sweep for each
    observation is enough to follow a stream. Directions in which the observations say nothing keep their coefficients.

    Args:
        prior: coefficients before any observation; their number is that of the features.
        deviation: standard deviation of each. Without new observations the coefficients return to the prior.
            None: the observations alone decide.
        memory: factor in (0, 1] on the weight of all earlier observations at each new one.
    """

    def __init__(self, prior: Sequence[float], deviation: Sequence[float] | None = None, memory: float = 1.0) -> None:
        size = len(prior)
        self._values = [*prior, -1.0]  # a row of sums times these is 0 if the coefficients are right
        self._memory = memory
        self._sums = [0.0] * (size * (size + 1))  # for each feature: its products with all features, and with y
        self._prior_sums: list[float] | None = None  # the same of the prior, which is not forgotten
        if deviation is not None:
            weights = [1 / d**2 for d in deviation]
            self._prior_sums = [
                weights[i] * (prior[i] if j == size else float(i == j)) for i in range(size) for j in range(size + 1)
            ]

    @property
    def coefficients(self) -> list[float]:
        """The present coefficients."""
        return self._values[:-1]

    def predict(self, features: Sequence[float]) -> float:
        """Compute ``y`` at these features."""
        return float(sum(map(mul, features, self._values)))

    def add(self, features: Sequence[float], y: float, weight: float) -> None:
        """Add an observation; the coefficients change with the next `sweep` or `solve`.

        Args:
            weight: 1 / variance of ``y``.
        """
        row = [weight * feature for feature in features]
        row.append(weight * y)
        products = [one * two for one in features for two in row]
        self._sums = list(map(add, map(mul, self._sums, repeat(self._memory)), products))

    def sweep(self) -> None:
        """Improve each coefficient once."""
        values, sums, width, begin = self._values, self._sums, len(self._values), 0
        if self._prior_sums is not None:
            sums = list(map(add, sums, self._prior_sums))
        for i in range(width - 1):
            row = sums[begin : begin + width]
            begin += width
            if row[i] > 0:
                value = values[i] - sum(map(mul, row, values)) / row[i]
                values[i] = value if value > 0 else 0.0

    def solve(self) -> None:
        """Compute the coefficients exactly."""
        for _ in range(_MAX_SWEEPS):
            before = self._values.copy()
            self.sweep()
            changes = map(abs, map(sub, self._values, before))
            if all(change <= _TOLERANCE * abs(value) for change, value in zip(changes, self._values, strict=True)):
                return

    def through_origin(self, first: int, second: int) -> tuple[float, float]:
        """Compute the coefficients of the fit that has two of the features and no others.

        It attributes everything to these two, and so tells what a unit of each costs in the company that it had.
        """
        width, sums = len(self._values), self._sums
        one, both, y_one = (sums[first * width + column] for column in (first, second, width - 1))
        two, y_two = (sums[second * width + column] for column in (second, width - 1))
        determinant = one * two - both * both
        if determinant > _MIN_INDEPENDENCE * one * two:
            a, b = (y_one * two - y_two * both) / determinant, (y_two * one - y_one * both) / determinant
            if a >= 0 and b >= 0:
                return a, b
        # What a pair adds cannot be told, or would be negative.
        return (y_one / one if one else 0.0), 0.0
