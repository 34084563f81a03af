"""The rate at which prompts are computed, learnt from steps that computed some."""

from __future__ import annotations

_FORGET = 0.98
"""Weight of the past at each step: about the last fifty steps count."""
_MANY_KEYS = 2**20
_MIN_INDEPENDENCE = 1e-3
"""Bound of how independent tokens and pairs are over the steps. If all steps have both in one proportion, their costs
cannot be told apart."""


class PrefillRate:
    """Two fits of prefill time by weighted least squares over running sums; the latest steps weigh most.

    A step takes ``fixed + per_token * tokens``. ``fixed`` is its time without prompts, such as that of decode rows.
    While all steps have one size, everything counts as ``per_token``. A prompt alone takes ``per_token * tokens +
    per_pair * pairs``, with pairs of queries and keys: the end of a long prompt is slower.

    Attributes:
        fixed_s, per_token_s: of a step.
        mean_per_token_s: recent mean with the fixed part included.
        step_s: recent mean duration of a step with prompts.
    """

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._pp = self._xp = self._py = 0.0
        self.fixed_s = 0.0
        self.per_token_s = 0.0
        self.mean_per_token_s = 0.0
        self.step_s = 0.0

    def observe(self, num_tokens: int, seconds: float, num_pairs: float = 0.0) -> None:
        """Learn from a step with ``num_tokens`` prompt tokens and ``num_pairs`` pairs of queries and keys."""
        if num_tokens <= 0 or seconds <= 0:
            return
        self._weight = self._weight * _FORGET + 1
        self._x = self._x * _FORGET + num_tokens
        self._y = self._y * _FORGET + seconds
        self._xx = self._xx * _FORGET + num_tokens * num_tokens
        self._xy = self._xy * _FORGET + num_tokens * seconds
        pairs = num_pairs / _MANY_KEYS
        self._pp = self._pp * _FORGET + pairs * pairs
        self._xp = self._xp * _FORGET + num_tokens * pairs
        self._py = self._py * _FORGET + pairs * seconds
        variance = self._xx - self._x * self._x / self._weight
        slope = 0.0
        if variance > 1e-6 * self._xx:
            slope = (self._xy - self._x * self._y / self._weight) / variance
        self.mean_per_token_s = self._y / self._x
        self.step_s = self._y / self._weight
        # neither part of a step's time is negative
        self.per_token_s = min(max(slope, 0.0), self._y / self._x) or self._y / self._x
        self.fixed_s = max(0.0, (self._y - self.per_token_s * self._x) / self._weight)

    def seconds(self, num_tokens: int, tokens_per_step: int) -> float:
        """Predict the time that one worker needs for prompt tokens; 0 while nothing is known.

        Args:
            tokens_per_step: prompt tokens in a full step.
        """
        return -(-num_tokens // tokens_per_step) * self.fixed_s + num_tokens * self.per_token_s

    def prompt_s(self, num_tokens: int, start: int) -> float:
        """Predict the time for tokens of one prompt that has ``start`` tokens before them; 0 while nothing is known."""
        determinant = self._xx * self._pp - self._xp * self._xp
        if determinant > _MIN_INDEPENDENCE * self._xx * self._pp:
            per_token = (self._xy * self._pp - self._py * self._xp) / determinant
            per_pair = (self._py * self._xx - self._xy * self._xp) / determinant
            if per_token >= 0 and per_pair >= 0:
                return num_tokens * (per_token + per_pair * (start + num_tokens / 2) / _MANY_KEYS)
        return num_tokens * self.mean_per_token_s
