"""Weighted linear least squares that begins with a prior and forgets old observations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class PriorLeastSquares:
    """Fit of ``y = coefficients · features``, whose coefficients are ``prior ± deviation`` at first.

    Each observation has a standard deviation. With ``memory`` below 1, each one multiplies the weight of all earlier
    ones by it, but not that of the prior: without new information the coefficients return to the prior. No coefficient
    is negative, because more work never takes less time.

    Args:
        prior: coefficients before any observation.
        deviation: standard deviation of each.
        memory: in (0, 1].
    """

    def __init__(self, prior: Sequence[float], deviation: Sequence[float], memory: float = 1.0) -> None:
        self._prior = np.asarray(prior, dtype=float)
        self._prior_precision = np.diag(1 / np.square(np.asarray(deviation, dtype=float)))
        self._memory = memory
        self._precision = np.zeros_like(self._prior_precision)
        self._moment = np.zeros_like(self._prior)
        self.coefficients = self._prior.copy()

    def observe(self, features: Sequence[float], y: float, deviation: float) -> None:
        """Add an observation with its standard deviation."""
        row = np.asarray(features, dtype=float)
        weight = 1 / deviation**2
        self._precision = self._memory * self._precision + weight * np.outer(row, row)
        self._moment = self._memory * self._moment + weight * y * row
        self.coefficients = self._solve()

    def predict(self, features: Sequence[float]) -> float:
        """Compute ``y`` at these features."""
        return float(np.dot(self.coefficients, np.asarray(features, dtype=float)))

    def _solve(self) -> np.ndarray:
        precision = self._precision + self._prior_precision
        moment = self._moment + self._prior_precision @ self._prior
        free = np.ones(len(moment), dtype=bool)
        while True:  # ends: each round but the last takes a coefficient out
            solution = np.zeros(len(moment))
            solution[free] = np.linalg.solve(precision[np.ix_(free, free)], moment[free])
            if (solution >= 0).all():
                return solution
            free &= solution >= 0
