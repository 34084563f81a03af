"""How long a step will take, learned from steps that have been confirmed."""

from __future__ import annotations

from dataclasses import dataclass

_RATE = 0.4
"""Of learning: how much of a step's surprise is believed."""

_FADING = 0.99
"""Per step, of the longest one that has been seen."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step's time depends on.

    Attributes:
        decode_rows: sequences that get one more token.
        decode_keys: positions before these, all together.
        prompt_tokens: of all prompt chunks.
        prompt_keys: query-key pairs of them.
    """

    decode_rows: int
    decode_keys: float
    prompt_tokens: int
    prompt_keys: float

    @property
    def features(self) -> tuple[float, ...]:
        """What time is taken to be linear in, each about 1 in a large step."""
        return (
            1.0,
            self.decode_rows / 64,
            self.decode_keys / 65_536,
            self.prompt_tokens / 1024,
            self.prompt_keys / 1_048_576,
        )


class StepTimePredictor:
    """Predicts a step's time from its work: normalised least mean squares, coefficients that are never negative.

    (B. Widrow and M. E. Hoff, Adaptive switching circuits, 1960.) Work of a kind that has not been seen is taken to
    cost nothing, and no step to take longer than the longest of late: a prediction errs on the short side.
    """

    def __init__(self) -> None:
        self._coefficients = [0.0] * 5
        self._longest_s = 0.0

    def seconds(self, work: StepWork) -> float:
        """How long it will take; 0 while nothing is known."""
        return min(self._longest_s, self.estimate_s(work))

    def estimate_s(self, work: StepWork) -> float:
        """The same without that bound, for those who would rather be told too long a time."""
        return sum(c * x for c, x in zip(self._coefficients, work.features, strict=True))

    def observe(self, work: StepWork, seconds: float) -> None:
        """It has taken so long."""
        features = work.features
        surprise = seconds - self.estimate_s(work)
        correction = _RATE * surprise / sum(x * x for x in features)
        self._coefficients = [max(0.0, c + correction * x) for c, x in zip(self._coefficients, features, strict=True)]
        self._longest_s = max(seconds, _FADING * self._longest_s)
