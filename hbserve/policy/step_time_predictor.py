"""Prediction of step times, from a profile and from confirmed steps.

Everything that must know how long a step or a prompt takes asks a `StepTimePredictor`: the order of prompts, the time
of plans, the size of mixed steps, the throttle of decode and the refusal of requests. Time is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from hbserve.policy.least_squares import LeastSquares
from hbserve.policy.profile_curves import ProfileCurves, Slowdown

_MEMORY = 0.98
"""Weight of the past at each step: about the last fifty steps of a kind count."""
_LEVEL_RATE = 0.5
"""Share of a step's relative error that the level takes over. Side by side with another phase, step times jump."""
_NUM_FIRST = 4
"""Steps of a kind that are believed whatever they took."""
_FIRST_SPREAD = 0.5
_MIN_SPREAD = 0.02
_SPREAD_RATE = 0.1
_MAX_DEVIATIONS = 4.0
"""Mean relative errors by which a step may be off and still count in full."""
_MAX_JUMP = 1.0
"""Logarithm of the largest change of the level that one step is believed."""
_FADING = 0.99
"""Factor on the longest step and the longest context seen, per step."""
_FIRST_TOKENS = 512
"""Prompt tokens of a step while nothing is known of such steps."""
_GROWTH = 2
"""Multiple of the largest step seen that a step may have, where no profile says what larger ones take."""
_ROWS_PER_READ = 4
"""Rows of one sequence for which attention reads its keys once, where a KV head has four query heads
(`hbserve.attention.paged_decode`)."""
_EXTRAPOLATION = 4.0
"""Multiple of the longest context seen that prompts are predicted for; longer ones cost as if they were that long.
Short prompts hardly tell what a pair costs."""


class StepWork(NamedTuple):
    """Work of a step, as far as its duration depends on it.

    Attributes:
        decode_rows: sequences that get one more token, and guesses of further ones (`hbserve.speculation`).
        decode_keys: keys that attention reads for them: the sequences' positions, and `keys_of_guesses`.
        prompt_tokens: tokens of all prompt chunks.
        prompt_pairs: pairs of queries and keys of these tokens.
        is_shared: another worker computes on the same device meanwhile.
    """

    decode_rows: float
    decode_keys: float
    prompt_tokens: float = 0
    prompt_pairs: float = 0.0
    is_shared: bool = False


def keys_of_guesses(num_guesses: float, position: float) -> float:
    """Compute the keys that attention reads for guesses of a sequence at ``position``, beside those for its token."""
    return num_guesses * position / _ROWS_PER_READ


def num_pairs(tokens: float, start: float) -> float:
    """Compute the pairs of queries and keys of a prompt's tokens, with ``start`` tokens of it before them."""
    return tokens * (start + tokens / 2)


class StepTimePredictor:
    """Predictor of step times at one share of a device, from a profile, from confirmed steps, or from both.

    There is one for each worker, and one for the workers that share a queue of prompts. The simulator and the SLO
    controller's model have one that never sees a step: it says what the profile says.

    A step's time is linear in its work. Steps with prompts and steps without have coefficients of their own, learnt by
    least squares that forget. A *level*, a factor on all coefficients, quickly follows causes outside the work, such as
    the other phase on the same device. Steps that share the device have one level, the other steps another.

    A step that takes much longer or shorter than predicted counts only as far as steps usually differ: a process may
    have been stopped. A second such step in a row is a change, and counts in full.

    With a profile, the sizes that were measured count as steps that have just been seen. Without a profile, all times
    are 0 at first, and no prediction exceeds the longest recent step. So predictions are rather too short: the next
    plan is then made early, and not late.

    Args:
        curves: of a profile; None: there is none for this model and device.
        percentage: share of the device.
    """

    def __init__(self, curves: ProfileCurves | None = None, percentage: int = 100) -> None:
        self.curves, self.percentage = curves, percentage
        samples = () if curves is None else curves.samples(percentage)
        self._prompts = _Fit(5, [((1.0, *work), seconds) for work, seconds in samples if work[2]])
        self._decodes = _Fit(3, [((1.0, *work[:2]), seconds) for work, seconds in samples if not work[2]])
        self._has_learnt = False
        self._longest_s = 0.0 if curves is None else math.inf
        self._max_context = 0.0 if curves is None else math.inf  # mean over the prompt tokens of a step
        self._max_tokens = 0.0 if curves is None else math.inf
        self._sum_s = self._sum_rest_s = self._weight = 0.0
        self._rate = self._prompts.sums.through_origin(3, 4)
        self._at: dict[int, StepTimePredictor] = {percentage: self}

    def at(self, percentage: int) -> StepTimePredictor:
        """Return the predictor for another share, which starts from the same profile."""
        found = self._at.get(percentage)
        if found is None:
            found = self._at[percentage] = StepTimePredictor(self.curves, percentage)
        return found

    def slowdown(self, prefill_percentage: int, decode_percentage: int, decode_s: float, tokens: float) -> Slowdown:
        """Compute the slowdown of two phases side by side; see `ProfileCurves.slowdown`. There must be a profile with
        points side by side."""
        assert self.curves is not None, "only a profile says what one phase costs the other"
        return self.curves.slowdown(prefill_percentage, decode_percentage, decode_s, tokens)

    # --- a step ----------------------------------------------------------------------------------

    def seconds(self, work: StepWork) -> float:
        """Predict the duration of a step; 0 if no step of its kind has been seen."""
        return min(self._longest_s, self.estimate_s(work))

    def estimate_s(self, work: StepWork) -> float:
        """Predict the duration without the bound of the longest recent step: it may be too long."""
        rows, keys, tokens, pairs, is_shared = work
        if self.curves is not None and not self._has_learnt:
            return self.curves.seconds(rows, keys, tokens, pairs, self.percentage)
        if tokens:
            return self._prompts.predict((1.0, rows, keys, tokens, pairs), is_shared)
        return self._decodes.predict((1.0, rows, keys), is_shared)

    def tokens_within(self, work: StepWork, start: float, limit_s: float) -> float:
        """Compute how many tokens of a prompt a step can take beside its other work and end within a time.

        Args:
            start: tokens of the prompt before them.

        Returns:
            At least 0; infinity while the cost of a prompt token is not known.
        """
        if limit_s == math.inf:
            return math.inf
        rows, keys, tokens, pairs, is_shared = work
        base_s = self._prompts.predict((1.0, rows, keys, tokens, pairs), is_shared)
        if rows and not tokens:  # prompts take no time off the step
            base_s = max(base_s, self._decodes.predict((1.0, rows, keys), is_shared))
        if base_s >= limit_s:
            return 0.0
        # The time grows by slope * n + curve * n²: the marginal cost of a token grows with those before it.
        factor, (*_, per_token, per_pair) = self._prompts.levels[is_shared], self._prompts.sums.coefficients
        slope, curve = factor * (per_token + per_pair * start), factor * per_pair / 2
        room_s = limit_s - base_s
        root = slope + math.sqrt(slope * slope + 4 * curve * room_s)
        return 2 * room_s / root if root else math.inf

    @property
    def max_known_tokens(self) -> float:
        """Prompt tokens up to which the time of a step can be predicted; infinite with a profile."""
        return max(_FIRST_TOKENS, _GROWTH * self._max_tokens)

    def efficient_tokens(self, max_overhead: float) -> float:
        """Compute how many prompt tokens make what every step costs, whatever is in it, a small share of its time.

        Args:
            max_overhead: that share, in (0, 1).

        Returns:
            Infinity while the cost of a prompt token is not known.
        """
        fixed_s, _, _, per_token, _ = self._prompts.sums.coefficients
        return fixed_s * (1 / max_overhead - 1) / per_token if per_token else math.inf

    # --- prompts ---------------------------------------------------------------------------------

    @property
    def step_s(self) -> float:
        """Recent mean duration of a step with prompts."""
        return self._sum_s / self._weight if self._weight else 0.0

    def prompt_s(self, tokens: float, start: float) -> float:
        """Predict the time to compute tokens of a prompt after ``start`` others, in steps with the usual company.

        Everything that recent steps with prompts took is attributed to their prompt tokens and pairs.
        """
        per_token, per_pair = self._rate
        context, limit = start + tokens / 2, self._max_context
        return tokens * (per_token + per_pair * (context if context < limit else limit))

    def queue_s(self, tokens: float, pairs: float, tokens_per_step: int) -> float:
        """Predict the time to compute all of several prompts.

        Args:
            tokens_per_step: of a full step. Recent steps may not have been full, and then had more other work for each
                prompt token.
        """
        per_token, per_pair = self._rate
        pairs = min(pairs, tokens * self._max_context)
        as_lately_s = tokens * per_token + pairs * per_pair
        rest_s, _, _, per_token, per_pair = self._prompts.sums.coefficients
        if self._weight:
            rest_s = self._sum_rest_s / self._weight
        return min(as_lately_s, tokens * per_token + pairs * per_pair + math.ceil(tokens / tokens_per_step) * rest_s)

    # --- learning --------------------------------------------------------------------------------

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learn from a confirmed step."""
        rows, keys, tokens, pairs, is_shared = work
        if seconds <= 0:
            return
        self._has_learnt = True
        if tokens:
            seconds = self._prompts.observe((1.0, rows, keys, tokens, pairs), seconds, is_shared)
            fixed_s, per_row, per_key, _, _ = self._prompts.sums.coefficients
            self._weight = _MEMORY * self._weight + 1
            self._sum_s = _MEMORY * self._sum_s + seconds
            self._sum_rest_s = _MEMORY * self._sum_rest_s + fixed_s + per_row * rows + per_key * keys
            self._max_context = max(_EXTRAPOLATION * pairs / tokens, _FADING * self._max_context)
            self._max_tokens = max(self._max_tokens, tokens)
            self._rate = self._prompts.sums.through_origin(3, 4)
        else:
            seconds = self._decodes.observe((1.0, rows, keys), seconds, is_shared)
        self._longest_s = max(seconds, _FADING * self._longest_s)


class _Fit:
    """Fit of the steps of one kind.

    Args:
        samples: features and seconds of steps that it starts from.

    Attributes:
        levels: factors on the times of steps that have the device for themselves, and of those that share it.
    """

    def __init__(self, size: int, samples: Sequence[tuple[Sequence[float], float]]) -> None:
        self.sums = LeastSquares([0.0] * size, memory=_MEMORY)
        self.levels = [1.0, 1.0]
        self._spread = _FIRST_SPREAD  # mean of the absolute relative errors
        self._side = 0  # on which side of the believed range the last step was: 1 above, -1 below, 0 within
        self._num_seen = len(samples)
        for features, seconds in samples:
            self.sums.add(features, seconds, 1 / seconds)
        self.sums.solve()

    def predict(self, features: tuple[float, ...], is_shared: bool) -> float:
        return self.sums.predict(features) * self.levels[is_shared]

    def observe(self, features: tuple[float, ...], seconds: float, is_shared: bool) -> float:
        """Learn from a step; returns the seconds that it counts as."""
        predicted_s = self.predict(features, is_shared)
        self._num_seen += 1
        if predicted_s and self._num_seen > _NUM_FIRST:
            error = self._believed(math.log(seconds / predicted_s))
            self.levels[is_shared] *= math.exp(_LEVEL_RATE * error)
            seconds = predicted_s * math.exp(error)
        self.sums.add(features, seconds, 1 / seconds)
        self.sums.sweep()
        return seconds

    def _believed(self, error: float) -> float:
        """Cut off a relative error that no step before had."""
        limit = _MAX_DEVIATIONS * self._spread
        side = (error > limit) - (error < -limit)
        is_outlier, self._side = side not in (0, self._side), side
        error = side * limit if is_outlier else min(max(error, -_MAX_JUMP), _MAX_JUMP)
        self._spread += _SPREAD_RATE * (min(abs(error), 2 * limit) - self._spread)
        self._spread = max(self._spread, _MIN_SPREAD)
        return error
