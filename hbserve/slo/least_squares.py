"""Weighted linear least squares that begins with what is believed and forgets what is old."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class PriorLeastSquares:
    """``y = coefficients · features``, each coefficient believed to be ``prior ± deviation`` at first.

    Observations carry a standard deviation of their own. With ``memory`` below 1 what was observed
    before counts that much less with every observation, while the belief stays: where nothing new
    is seen the coefficients return to it. Coefficients below 0 are set to 0: more work never takes
    less time.

    Args:
        prior: coefficients before any observation.
        deviation: how far each may be off.
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
        """Add one observation, known to ``± deviation``."""
        row = np.asarray(features, dtype=float)
        weight = 1 / deviation**2
        self._precision = self._memory * self._precision + weight * np.outer(row, row)
        self._moment = self._memory * self._moment + weight * y * row
        self.coefficients = self._solve()

    def predict(self, features: Sequence[float]) -> float:
        """The value at these features."""
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
