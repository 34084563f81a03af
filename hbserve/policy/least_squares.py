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

    Attributes:
        coefficients: the present ones.
    """

    def __init__(self, prior: Sequence[float], deviation: Sequence[float] | None = None, memory: float = 1.0) -> None:
        size = len(prior)
        self.coefficients: list[float] = list(prior)
        self._precision = [0.0] * size if deviation is None else [1 / d**2 for d in deviation]
        self._pull = [p * c for p, c in zip(self._precision, prior, strict=True)]
        self._memory = memory
        self._gram = [0.0] * size**2  # row by row
        self._moments = [0.0] * size

    def predict(self, features: Sequence[float]) -> float:
        """Compute ``y`` at these features."""
        return float(sum(map(mul, self.coefficients, features)))

    def add(self, features: Sequence[float], y: float, weight: float) -> None:
        """Add an observation; the coefficients change with the next `sweep` or `solve`.

        Args:
            weight: 1 / variance of ``y``.
        """
        weighted = [weight * feature for feature in features]
        products = [one * two for one in weighted for two in features]
        self._gram = list(map(add, map(mul, self._gram, repeat(self._memory)), products))
        self._moments = [self._memory * old + y * w for old, w in zip(self._moments, weighted, strict=True)]

    def sweep(self) -> None:
        """Improve each coefficient once."""
        coefficients, size = self.coefficients, len(self.coefficients)
        for i, (moment, prior, pull) in enumerate(zip(self._moments, self._precision, self._pull, strict=True)):
            row = self._gram[i * size : i * size + size]
            precision = row[i] + prior
            if precision > 0:
                now = coefficients[i]
                new = now + (moment + pull - prior * now - sum(map(mul, row, coefficients))) / precision
                coefficients[i] = new if new > 0 else 0.0

    def solve(self) -> None:
        """Compute the coefficients exactly."""
        for _ in range(_MAX_SWEEPS):
            before = self.coefficients.copy()
            self.sweep()
            changes = map(abs, map(sub, self.coefficients, before))
            if all(change <= _TOLERANCE * value for change, value in zip(changes, self.coefficients, strict=True)):
                return

    def through_origin(self, first: int, second: int) -> tuple[float, float]:
        """Compute the coefficients of the fit that has two of the features and no others.

        It attributes everything to these two, and so tells what a unit of each costs in the company that it had.
        """
        size, gram = len(self.coefficients), self._gram
        one, two, both = gram[first * size + first], gram[second * size + second], gram[first * size + second]
        y_one, y_two = self._moments[first], self._moments[second]
        determinant = one * two - both * both
        if determinant > _MIN_INDEPENDENCE * one * two:
            a, b = (y_one * two - y_two * both) / determinant, (y_two * one - y_one * both) / determinant
            if a >= 0 and b >= 0:
                return a, b
        # What a pair adds cannot be told, or would be negative.
        return (y_one / one if one else 0.0), 0.0
