"""Prediction of a step's duration, learnt from confirmed steps."""

from __future__ import annotations

from dataclasses import dataclass

_RATE = 0.4
"""Learning rate: share of a step's prediction error that the coefficients take over."""

_FADING = 0.99
"""Factor on the longest step seen, per step."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """Work of a step, as far as its duration depends on it.

    Attributes:
        decode_rows: sequences that get one more token.
        decode_keys: sum of the positions before them.
        prompt_tokens: tokens of all prompt chunks.
        prompt_keys: query-key pairs of these tokens.
    """

    decode_rows: int
    decode_keys: float
    prompt_tokens: int
    prompt_keys: float

    @property
    def features(self) -> tuple[float, ...]:
        """Terms that the duration is linear in, each about 1 in a large step."""
        return (
            1.0,
            self.decode_rows / 64,
            self.decode_keys / 65_536,
            self.prompt_tokens / 1024,
            self.prompt_keys / 1_048_576,
        )


class StepTimePredictor:
    """Predictor of a step's duration from its work: normalised least mean squares without negative coefficients.

    (B. Widrow and M. E. Hoff, Adaptive switching circuits, 1960.) A prediction errs on the short side: a kind of work
    that has not been seen counts as free, and no step counts as longer than the longest recent one.
    """

    def __init__(self) -> None:
        self._coefficients = [0.0] * 5
        self._longest_s = 0.0

    def seconds(self, work: StepWork) -> float:
        """Predict the duration; 0 while nothing is known."""
        return min(self._longest_s, self.estimate_s(work))

    def estimate_s(self, work: StepWork) -> float:
        """Predict the duration without the bound of the longest recent step: it may be too long."""
        return sum(c * x for c, x in zip(self._coefficients, work.features, strict=True))

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learn from a confirmed step."""
        features = work.features
        surprise = seconds - self.estimate_s(work)
        correction = _RATE * surprise / sum(x * x for x in features)
        self._coefficients = [max(0.0, c + correction * x) for c, x in zip(self._coefficients, features, strict=True)]
        self._longest_s = max(seconds, _FADING * self._longest_s)
