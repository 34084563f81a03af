"""Prediction of TTFT and TPOT under a split, and the confidence in it.

The forms are those of Semi-PD (arXiv 2504.19867, section 5). Further terms describe what two phases on one GPU do to
each other:

- Side by side, prompts are served by a queue whose rate grows with prefill's share x. Its mean wait is that of M/G/1
  (Pollaczek-Khinchine), ``λ·E[S²] / (2·(1 - λ·E[S]))``. With ``E[S] = s/x`` this has the form ``a₁/(x - λ·s)``:
  ``TTFT(x) = a₁/(x - λ·s) + b₁``, plus the wait for the present backlog.
- A worker that mixes both phases is one queue. Each step holds the batch, and the prompts that arrived during the step
  before. So the length of the mean step decides how many prompts are in it, and the other way round: it is a fixed
  point. A prompt waits for the rest of the step under way, and in a queue when prompts fill steps.
- A decode step takes ``a₂/y + b₂`` alone (`StepTimePredictor`), and longer by a factor for the share of time in which
  prefill runs beside it. The size of the batch follows from how long sequences stay in it (Little's law), so step time
  and batch are solved together.

The weights of the terms are learnt while serving: ``TTFT = c₁·wait + c₂·service`` and ``TPOT = d₁·alone + d₂·beside``,
all 1 at first.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

from hbserve.config.semi_pd import MIXED_PACE
from hbserve.policy.least_squares import LeastSquares
from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork, num_pairs
from hbserve.slo.constraints import SLOConstraints, SMAllocation

_MEMORY = 0.9  # factor on the weight of an observation at each later one
_HORIZON_S = 10.0  # a backlog counts by the wait that it adds to the requests of the next seconds
_TPOT_SPREAD = 0.15  # deviation of log TPOT over requests, before any has been seen
_ERROR_CAP = 1.0  # on the log ratio of one prediction
_ROUND_TRIP_MS = 1.0  # from a step's end to the next plan's arrival
_CHANGE_MS = 2.0  # a change of prefill's worker: a plan's travel after the last step of the old one
_MIN_CHUNK = 128.0  # prompt tokens in a mixed step that has any
_NUM_ERRORS = 8  # predictions that confidence looks back on


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadEstimate:
    """Load to serve, and its state now.

    Attributes:
        arrival_rate: requests per second.
        prompt_tokens: mean of the tokens to compute per request, without those in the prefix cache.
        prompt_tokens_squared: mean of their squares.
        context_tokens: mean of the tokens found in the prefix cache per request.
        output_tokens: mean per request.
        backlog_tokens: prompt tokens that have arrived and are not computed.
        running: sequences that decode now.
        tpot_spread: deviation of log TPOT over requests.
    """

    arrival_rate: float
    prompt_tokens: float
    prompt_tokens_squared: float
    context_tokens: float = 0.0
    output_tokens: float
    backlog_tokens: float = 0.0
    running: float = 0.0
    tpot_spread: float = _TPOT_SPREAD

    @property
    def tokens_of_its_prompt(self) -> float:
        """Mean prompt length over prompt tokens, not over prompts: decode steps mostly run beside long prompts."""
        return self.prompt_tokens_squared / max(1.0, self.prompt_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Predicted service under a split.

    Attributes:
        ttft_ms, tpot_ms: at the targets' percentiles.
        attainment: share of requests within both targets.
        goodput: requests per second within both targets.
        prefill_load: share of time in which prefill is busy; above 1 its queue grows without end.
        decode_batch: mean number of sequences that decode.
        ttft_terms, tpot_terms: features of the fit: (wait, service) and (alone, beside).
    """

    ttft_ms: float
    tpot_ms: float
    attainment: float
    goodput: float
    prefill_load: float
    decode_batch: float
    ttft_terms: tuple[float, float]
    tpot_terms: tuple[float, float]


class _Fits:
    """Learnt weights of the terms, for one kind of sharing: side by side, or mixed."""

    def __init__(self) -> None:
        self.ttft = LeastSquares((1.0, 1.0), (0.5, 0.3), _MEMORY)
        self.tpot = LeastSquares((1.0, 1.0), (0.3, 0.3), _MEMORY)

    def tpot_ms(self, terms: tuple[float, float]) -> float:
        """Compute TPOT from its terms."""
        return max(1e-6, self.tpot.predict(terms))


@dataclass(frozen=True, slots=True)
class _Queue:
    """Queue of prompts.

    Attributes:
        load: share of time in which it is busy.
        service_s: mean time that a prompt keeps it busy.
        own_s: time from a prompt's first step to its token.
        residual_s: mean wait for a step under way without prompts.
    """

    load: float
    service_s: float
    own_s: float
    residual_s: float = 0.0


class LatencyModel:
    """Model that predicts windows, learns from them, and keeps account of its errors.

    Args:
        steps: step times of the model on the device.
        targets: limits and percentiles to predict for.
        alone: each phase's percentage while the other one is idle: 100 if the ladder has such workers. None: its share.
        max_batch: largest number of sequences that decode together.
        prefill_batch_tokens: largest number of prompt tokens in a step.
        decode_interval_ms: mean interval of decode steps while prefill is busy; 0: as fast as they can.
    """

    def __init__(
        self,
        steps: StepTimePredictor,
        targets: SLOConstraints,
        alone: SMAllocation | None = None,
        max_batch: int = 256,
        prefill_batch_tokens: int = 4096,
        decode_interval_ms: float = 0.0,
    ) -> None:
        self.steps = steps
        self.targets = targets
        self.alone = alone
        self._max_batch = max_batch
        self._prefill_batch_tokens = prefill_batch_tokens
        self._decode_interval_ms = decode_interval_ms
        self._side_by_side, self._mixed = _Fits(), _Fits()
        self._errors: deque[float] = deque([0.2], maxlen=_NUM_ERRORS)

    @property
    def confidence(self) -> float:
        """1 minus the mean error of the last predictions, in [0, 1]; 0.8 before the first."""
        return max(0.0, 1.0 - sum(self._errors) / len(self._errors))

    def coefficients(self) -> dict[str, float]:
        """Return the present weight of each term by name."""
        terms = {}
        for prefix, fits in (("", self._side_by_side), ("mixed_", self._mixed)):
            values = (*fits.ttft.coefficients, *fits.tpot.coefficients)
            for name, value in zip(("ttft_wait", "ttft_service", "tpot_alone", "tpot_beside"), values, strict=True):
                terms[prefix + name] = value
        return terms

    # --- prediction ------------------------------------------------------------------------------

    def predict(self, workload: WorkloadEstimate, allocation: SMAllocation) -> Prediction:
        """Predict the service of a workload under a split."""
        return self._predict_mixed(workload) if allocation.mixed else self._predict_side_by_side(workload, allocation)

    def _predict_mixed(self, workload: WorkloadEstimate) -> Prediction:
        """Predict for one worker, each step of which has the whole batch and the waiting prompts in it."""
        batch = min(max(workload.running, 1.0), self._max_batch)
        tokens, rate_per_ms = max(1.0, workload.prompt_tokens), workload.arrival_rate / 1000
        decode_context = workload.context_tokens + tokens + workload.output_tokens / 2
        for _ in range(6):  # the step's time depends on the batch, and the batch on the step's time

            def step_ms(chunk: float, batch: float = batch) -> float:
                context = workload.context_tokens + max(0.0, tokens - chunk) / 2
                return self._step_ms(100, batch, decode_context, chunk, context)

            max_tokens = self._tokens_within(step_ms)
            full_ms, alone_ms = step_ms(max_tokens), step_ms(0.0)
            load = rate_per_ms * tokens * full_ms / max_tokens
            mean_ms = alone_ms
            for _ in range(4):  # prompts that arrive during a step are in the next one
                arrived = rate_per_ms * tokens * mean_ms
                share = min(1.0, max(1 - math.exp(-rate_per_ms * mean_ms), arrived / max_tokens))
                mean_ms = (1 - share) * alone_ms + share * step_ms(min(max_tokens, arrived / max(share, 1e-9)))
            tpot_terms = (alone_ms, max(0.0, mean_ms - alone_ms))
            tpot_ms = self._mixed.tpot_ms(tpot_terms)
            batch, decode_overload = self._next_batch(workload, load, tpot_ms, batch)
        # A prompt waits for the step that is under way even if there are only decode rows in it.
        decoding_share = 1 - math.exp(-batch) if workload.output_tokens > 1 else 0.0
        residual_ms = max(0.0, 1 - load) * decoding_share * mean_ms / 2
        own_ms = step_ms(tokens) if tokens <= max_tokens else tokens / max_tokens * full_ms
        queue = _Queue(load, tokens / max_tokens * full_ms / 1000, own_ms / 1000, residual_ms / 1000)
        return self._predict_percentiles(workload, self._mixed, queue, decode_overload, batch, tpot_ms, tpot_terms)

    def _tokens_within(self, step_ms: Callable[[float], float]) -> float:
        """Compute the prompt tokens of a full step: as many as the TPOT target leaves time for."""
        max_tokens = float(self._prefill_batch_tokens)
        limit_ms = MIXED_PACE * self.targets.tpot_target_ms
        if step_ms(max_tokens) <= limit_ms:
            return max_tokens
        low, high = 1.0, max_tokens
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if step_ms(middle) <= limit_ms else (low, middle)
        return max(low, min(max_tokens, _MIN_CHUNK))

    def _predict_side_by_side(self, workload: WorkloadEstimate, allocation: SMAllocation) -> Prediction:
        decode_alone = self.alone.decode_percentage if self.alone else allocation.decode_percentage
        batch = min(max(workload.running, 1.0), self._max_batch)
        for _ in range(4):  # the step's time depends on the batch, and the batch on the step's time
            step_tokens = max(1.0, min(workload.tokens_of_its_prompt, self._prefill_batch_tokens))
            context = workload.context_tokens + workload.prompt_tokens + workload.output_tokens / 2
            step_ms = self._step_ms(allocation.decode_percentage, batch, context)
            slowdown = self.steps.slowdown(*allocation.percentages, step_ms / 1000, step_tokens)
            step_ms *= slowdown.decode
            if step_ms < self._decode_interval_ms:
                step_ms += _ROUND_TRIP_MS  # each throttled step waits for the result of the one before
            shared_ms = max(step_ms, self._decode_interval_ms)
            beside = step_ms / shared_ms  # share of the time in which a decode step runs beside a prefill step
            load, service_s = self._service(workload, allocation, batch, slowdown.prefill, beside)
            busy = min(1.0, load)
            alone_ms = self._step_ms(decode_alone, batch, context)
            # Steps per second add up over the two kinds of time, not milliseconds per step.
            mean_ms = 1 / ((1 - busy) / alone_ms + busy / shared_ms)
            tpot_terms = (alone_ms, max(0.0, mean_ms - alone_ms))
            tpot_ms = self._side_by_side.tpot_ms(tpot_terms)
            batch, decode_overload = self._next_batch(workload, load, tpot_ms, batch)
        queue, fits = _Queue(load, service_s, service_s), self._side_by_side
        return self._predict_percentiles(workload, fits, queue, decode_overload, batch, tpot_ms, tpot_terms)

    def _next_batch(self, workload: WorkloadEstimate, load: float, tpot_ms: float, batch: float) -> tuple[float, float]:
        """Move the batch towards a steady state (Little's law); returns it and the overload of decode, at least 1."""
        decoding_rate = workload.arrival_rate / max(1.0, load)
        steady = decoding_rate * max(0.0, workload.output_tokens - 1) * tpot_ms / 1000
        batch = min(max(1.0, (batch + max(steady, 0.5 * workload.running)) / 2), self._max_batch)
        return batch, max(1.0, steady / self._max_batch)

    def _service(
        self, workload: WorkloadEstimate, allocation: SMAllocation, batch: float, slowdown: float, beside: float
    ) -> tuple[float, float]:
        """Compute the load of the prefill queue, and the seconds per prompt.

        Args:
            beside: share of the time in which decode steps run too. At other times prefill runs as if it were alone.
        """
        prefill_alone = self.alone.prefill_percentage if self.alone else allocation.prefill_percentage
        tokens, context = max(1.0, workload.prompt_tokens), workload.context_tokens
        beside_ms = self._prompt_ms(tokens, context, allocation.prefill_percentage) * slowdown
        alone_ms = self._prompt_ms(tokens, context, prefill_alone)
        idle_decode_share = math.exp(-batch) if workload.output_tokens > 1 else 1.0
        shared_ms = 1 / (beside / beside_ms + (1 - beside) / alone_ms)
        if self._decode_interval_ms and prefill_alone != allocation.prefill_percentage:
            shared_ms += _CHANGE_MS  # about once a prompt the throttle opens or closes, which changes the worker
        service_s = (idle_decode_share * alone_ms + (1 - idle_decode_share) * shared_ms) / 1000
        return workload.arrival_rate * service_s, service_s

    def _step_ms(
        self, percentage: int, batch: float, context: float, tokens: float = 0.0, prompt_context: float = 0.0
    ) -> float:
        """Compute the time of a step: a batch of sequences of a context, and tokens of a prompt after others."""
        work = StepWork(batch, batch * context, tokens, num_pairs(tokens, prompt_context))
        return 1000 * self.steps.at(percentage).seconds(work)

    def _prompt_ms(self, tokens: float, context: float, percentage: int) -> float:
        """Compute the time of a prompt: several short ones share a step, a long one takes several steps."""
        step_tokens = self._prefill_batch_tokens
        if tokens <= step_tokens:
            return self._step_ms(percentage, 0, 0, tokens, context)
        num_steps = tokens / step_tokens
        return num_steps * self._step_ms(percentage, 0, 0, step_tokens, context + (tokens - step_tokens) / 2)

    def _predict_percentiles(
        self,
        workload: WorkloadEstimate,
        fits: _Fits,
        queue: _Queue,
        decode_overload: float,
        batch: float,
        tpot_ms: float,
        tpot_terms: tuple[float, float],
    ) -> Prediction:
        load, service_s = queue.load, queue.service_s
        steady_load = min(load, 0.98)
        tokens = max(1.0, workload.prompt_tokens)
        variation = max(0.0, workload.prompt_tokens_squared / tokens**2 - 1)
        wait_s = steady_load * service_s * (1 + variation) / (2 * (1 - steady_load)) + queue.residual_s
        backlog_s = max(0.0, workload.backlog_tokens / tokens - workload.arrival_rate * service_s) * service_s
        wait_s = min(wait_s, _HORIZON_S) + _mean_backlog(backlog_s, load) + (decode_overload - 1) * _HORIZON_S / 2
        ttft_terms = (1000 * wait_s, 1000 * queue.own_s)
        fit = fits.ttft.coefficients
        if fits is self._side_by_side:
            # Waits that are longer than predicted while phases are mixed come from the arrivals: expect them here too.
            fit = [max(fit[0], self._mixed.ttft.coefficients[0]), fit[1]]
        mean_ms = max(1e-6, fit[0] * ttft_terms[0] + fit[1] * ttft_terms[1])
        # The waits of requests that wait are about exponential; service varies as the prompts do.
        idle = max(0.0, 1 - load) if not backlog_s else 0.0
        wait_ms = fit[0] * ttft_terms[0]
        variance = wait_ms**2 * (2 / max(0.02, 1 - idle) - 1) + (fit[1] * ttft_terms[1]) ** 2 * variation
        log_variance = math.log1p(variance / mean_ms**2)
        ttft = NormalDist(math.log(mean_ms) - log_variance / 2, math.sqrt(log_variance) + 1e-3)
        tpot = NormalDist(math.log(tpot_ms), max(0.02, workload.tpot_spread))
        attainment = ttft.cdf(math.log(self.targets.ttft_target_ms)) * tpot.cdf(math.log(self.targets.tpot_target_ms))
        return Prediction(
            ttft_ms=math.exp(ttft.inv_cdf(self.targets.ttft_percentile / 100)),
            tpot_ms=math.exp(tpot.inv_cdf(self.targets.tpot_percentile / 100)),
            attainment=attainment,
            goodput=attainment * workload.arrival_rate / max(1.0, load),
            prefill_load=load,
            decode_batch=batch,
            ttft_terms=ttft_terms,
            tpot_terms=tpot_terms,
        )

    # --- learning --------------------------------------------------------------------------------

    def observe(
        self,
        workload: WorkloadEstimate,
        allocation: SMAllocation,
        ttft: ObservedLatency | None,
        tpot: ObservedLatency | None,
    ) -> float:
        """Learn from a window in which this split served this workload.

        Args:
            ttft, tpot: observed latencies; None if there were none.

        Returns:
            How far the prediction was off, as a log ratio, the larger of both.
        """
        predicted = self.predict(workload, allocation)
        fits = self._mixed if allocation.mixed else self._side_by_side
        error = 0.0
        if ttft is not None:
            error = max(error, self._error(ttft, predicted.ttft_ms, self.targets.ttft_target_ms))
            spread = max(0.1, 1 / math.sqrt(ttft.count)) * ttft.mean_ms + 0.5
            fits.ttft.add(predicted.ttft_terms, ttft.mean_ms, 1 / spread**2)
            fits.ttft.solve()
        if tpot is not None:
            error = max(error, self._error(tpot, predicted.tpot_ms, self.targets.tpot_target_ms))
            spread = max(0.05, 0.3 / math.sqrt(tpot.count)) * tpot.mean_ms
            fits.tpot.add(predicted.tpot_terms, tpot.mean_ms, 1 / spread**2)
            fits.tpot.solve()
        if ttft is not None or tpot is not None:
            self._errors.append(error)
        return error

    @staticmethod
    def _error(seen: ObservedLatency, predicted_ms: float, target_ms: float) -> float:
        """Compute the error beyond chance. Values beyond twice the target count as twice: the decision is the same."""
        ratio = math.log(min(seen.percentile_ms, 2 * target_ms) / min(predicted_ms, 2 * target_ms))
        return min(_ERROR_CAP, max(0.0, abs(ratio) - 1 / math.sqrt(seen.count)))


@dataclass(frozen=True, slots=True)
class ObservedLatency:
    """Observed latency in a window.

    Attributes:
        percentile_ms: at the target's percentile.
    """

    count: int
    mean_ms: float
    percentile_ms: float


def _mean_backlog(backlog_s: float, load: float) -> float:
    """Compute the mean wait in seconds that a backlog adds to the requests within the horizon.

    The backlog grows or shrinks by ``load - 1`` seconds a second.
    """
    rate = load - 1
    if rate >= 0:
        return backlog_s + rate * _HORIZON_S / 2
    empty_after_s = backlog_s / -rate
    if empty_after_s >= _HORIZON_S:
        return backlog_s + rate * _HORIZON_S / 2
    return backlog_s * empty_after_s / (2 * _HORIZON_S)
