"""A step that is under way, and what comes of it."""

from __future__ import annotations

import time

import torch

from hbserve.engine.sampler import Sampled
from hbserve.messages.base import TokenLogprobs
from hbserve.messages.worker import StepPlan, StepResult


class StepTimer:
    """How long the device works between two points of its stream, seconds.

    Attributes:
        started_at: when the host came to the first point, on `time.perf_counter`.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = None
        if device.type == "cuda":
            self._events = torch.Event(device, enable_timing=True), torch.Event(device, enable_timing=True)
        self._seconds = 0.0
        self.start()

    def start(self) -> None:
        """The first point; once more to move it: before the device has its work it only waits for the host."""
        if self._events is not None:
            self._events[0].record()
        self.started_at = time.perf_counter()

    def stop(self) -> None:
        """The second point."""
        if self._events is not None:
            self._events[1].record()
        self._seconds = time.perf_counter() - self.started_at

    def wait(self) -> float:
        """Wait until the device has come to the second point; the seconds between them."""
        if self._events is None:
            return self._seconds
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000


class PendingStep:
    """The result of a step, once the device has it.

    Args:
        sampled: None where the step sampled nothing.
        num_logprobs: per sampled row, as `SamplingParams.logprobs`, -1 for none.
        timer: started with the step; it is stopped here, after the results' copies.

    Attributes:
        ready_at: when the host had prepared it, on `time.perf_counter`.
    """

    def __init__(self, plan: StepPlan, sampled: Sampled | None, num_logprobs: list[int], timer: StepTimer) -> None:
        self._epoch, self._step_id = plan.epoch, plan.step_id
        self._num_logprobs = num_logprobs
        self._timer = timer
        self.ready_at = timer.started_at
        self._token_ids = None if sampled is None else _to_host(sampled.token_ids)
        self._logprobs = None
        if sampled is not None and sampled.logprobs is not None:
            logprobs = sampled.logprobs
            self._logprobs = _to_host(logprobs.token), _to_host(logprobs.top_ids), _to_host(logprobs.top)
        timer.stop()

    def result(self) -> StepResult:
        """Wait for the device and read what it found."""
        busy_s = self._timer.wait()
        return StepResult(
            epoch=self._epoch,
            step_id=self._step_id,
            token_ids=[] if self._token_ids is None else self._token_ids.tolist(),
            logprobs=self._read_logprobs(),
            busy_s=busy_s,
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
    """A copy on the host, there when the stream has come so far; on CPU the tensor itself."""
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
