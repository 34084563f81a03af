"""A pending step: launched, with a result that the device has not computed yet."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

import torch

from hbserve.engine.prompt_scores import PromptScores
from hbserve.engine.sampler import Sampled
from hbserve.messages.base import TokenLogprobs
from hbserve.messages.worker import NO_TOKEN, StepPlan, StepResult
from hbserve.platform.cuda_driver import has_triton

_MAX_RESULT_BYTES = 2048
_WORD_BYTES = 4
_NUM_KEPT = 64
"""More results than are ever in flight."""
_kept: deque[torch.Tensor] = deque(maxlen=_NUM_KEPT)
"""Host copies that a kernel may still write to, even if the scheduler has dropped their step."""


class StepTimer:
    """A timer of the device's work between two points of its stream, in seconds.

    Points take the device 3 µs each. So a step that is launched while the one before runs begins where that one ends.

    Attributes:
        started_at: when the host reached the first point, on `time.perf_counter`.
    """

    _last_end: torch.Event | None = None
    """The last second point of any timer; only the thread that launches steps sets it."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda, self._device = device.type == "cuda", device
        self._begin: torch.Event | None = None
        self._end: torch.Event | None = None
        self._seconds = 0.0
        self.started_at = time.perf_counter()

    def start(self) -> None:
        """Set the first point, or move it: until the device has its work, it only waits for the host."""
        if self._is_cuda:
            last = StepTimer._last_end
            self._begin = self._recorded() if last is None or last.query() else last
        self.started_at = time.perf_counter()

    def stop(self) -> None:
        """Set the second point."""
        if self._is_cuda:
            self._begin = self._begin or self._recorded()
            self._end = StepTimer._last_end = self._recorded()
        self._seconds = time.perf_counter() - self.started_at

    def _recorded(self) -> torch.Event:
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def seconds_to(self, end: StepTimer) -> float:
        """Return the seconds from the first point to the second one of another timer, which has been waited for."""
        if self._begin is None or end._end is None:
            return end.started_at + end._seconds - self.started_at
        return self._begin.elapsed_time(end._end) / 1000

    def wait(self) -> float:
        """Wait until the device reaches the second point; return the seconds between the points."""
        if self._begin is None or self._end is None:
            return self._seconds
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1000


class Drafted(NamedTuple):
    """What a draft model has done for a step: its guesses, in the plan's order, and since when it has worked."""

    token_ids: list[int]
    timer: StepTimer


class PendingStep:
    """The result of a step, which is copied to the host as soon as the device has it.

    Args:
        sampled: None if the step sampled nothing.
        num_logprobs: per sampled row, as `SamplingParams.logprobs`, -1 for none.
        timer: started with the step; stopped here, after the copies of the results.
        scores: of the prompts' tokens; None: no row asks for them.
        missing: samples without a token, and why they can never get one; see `GrammarTable.take_missing`.
        drafted: what the draft model has done first; None: nothing.
        forced: see `GrammarTable.take_forced`.

    Attributes:
        ready_at: when the host had prepared the step, on `time.perf_counter`.
        expert_tokens: to be reported with the result, see `StepResult`.
    """

    expert_tokens: list[list[int]] | None = None

    def __init__(
        self,
        plan: StepPlan,
        sampled: Sampled | None,
        num_logprobs: list[int],
        timer: StepTimer,
        scores: PromptScores | None = None,
        missing: dict[int, str | None] | None = None,
        drafted: Drafted | None = None,
        forced: dict[int, list[int]] | None = None,
    ) -> None:
        self._forced = forced or None
        self._missing = missing or {}
        self._epoch, self._step_id = plan.epoch, plan.step_id
        self._num_logprobs = num_logprobs
        self._timer = timer
        self._drafted = drafted
        self.ready_at = timer.started_at if drafted is None else drafted.timer.started_at
        self._token_ids = None if sampled is None else _to_host(sampled.token_ids)
        self._logprobs = None
        if sampled is not None and sampled.logprobs is not None:
            logprobs = sampled.logprobs
            self._logprobs = _to_host(logprobs.token), _to_host(logprobs.top_ids), _to_host(logprobs.top)
        self._scores = None if scores is None else scores.map(_to_host)
        timer.stop()

    def result(self) -> StepResult:
        """Wait for the device and return the step's result."""
        step_s = busy_s = self._timer.wait()
        if self._drafted is not None:
            busy_s = self._drafted.timer.seconds_to(self._timer)
        token_ids = [] if self._token_ids is None else self._token_ids.tolist()
        for index in self._missing:
            token_ids[index] = NO_TOKEN
        errors = {index: error for index, error in self._missing.items() if error is not None}
        return StepResult(
            epoch=self._epoch,
            step_id=self._step_id,
            token_ids=token_ids,
            logprobs=self._read_logprobs(),
            busy_s=busy_s,
            prompt_logprobs=None if self._scores is None else self._scores.to_lists(),
            row_errors=errors or None,
            expert_tokens=self.expert_tokens,
            draft_s=busy_s - step_s,
            forced=self._forced,
            draft_ids=[] if self._drafted is None else self._drafted.token_ids,
        )

    def _read_logprobs(self) -> list[TokenLogprobs | None] | None:
        if self._logprobs is None:
            return None
        token, top_ids, top = self._logprobs
        values = zip(token.tolist(), top_ids.tolist(), top.tolist(), strict=True)
        return [None if num_top < 0 else _cut(next(values), num_top) for num_top in self._num_logprobs]


def _cut(values: tuple[float, list[int], list[float]], num_top: int) -> TokenLogprobs:
    token, top_ids, top = values
    return TokenLogprobs(token=token, top_ids=top_ids[:num_top], top=top[:num_top])


def _to_host(x: torch.Tensor) -> torch.Tensor:
    """Return a copy on the host, complete when the stream reaches this point; on CPU the tensor itself."""
    if x.device.type == "cpu":
        return x
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    is_small = 0 < x.nbytes <= _MAX_RESULT_BYTES and x.nbytes % _WORD_BYTES == 0 and x.is_contiguous()
    if not is_small or not has_triton(x.device):
        return host.copy_(x, non_blocking=True)
    from hbserve.platform.small_copies import copy_small

    copy_small(x, host)
    _kept.append(host)
    return host
