"""Which target a simulated request missed, and why.

A request's time is divided by what it did at each moment, as its worker's steps say. The largest part of the time that
it could have been spared is the reason:

| target | reason | time |
|---|---|---|
| TTFT | own prompt | the prompt alone takes longer than the target |
| | queue | before its first chunk began |
| | turn | between two of its chunks, while others were computed |
| | mixed step | in its steps, for what else was in them |
| TPOT | own decode | a decode step of this sequence alone takes longer than the target |
| | mixed step | in its decode steps, for the prompts in them |
| | turn | in no step: it was left out, preempted, or handed over |
| | decode batch | in its decode steps, for the other sequences in them |
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork, num_pairs
from hbserve.simulate.device import SimulatedWorker
from hbserve.simulate.requests import SimulatedRequest
from hbserve.simulate.world import SimulatedSystem


@dataclass(frozen=True)
class Miss:
    """A target that a request missed, and the reason; times in milliseconds."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    target: str
    reason: str
    ttft_ms: float
    tpot_ms: float


@dataclass
class _Times:
    """What a request did, in seconds.

    Attributes:
        prompt_s, decode_s: in steps with its chunks before its first token, and in steps with its decode rows.
        beside_prompts_s: of ``decode_s``, what prompts added to these steps.
    """

    first_start: float | None = None
    prompt_s: float = 0.0
    decode_s: float = 0.0
    beside_prompts_s: float = 0.0


class MissRecorder:
    """Records the steps of each request, on a system that has served nothing yet."""

    def __init__(self, system: SimulatedSystem, steps: StepTimePredictor) -> None:
        self._system, self._steps = system, steps
        self._times: dict[str, _Times] = {}
        for instance_id, device in system.devices.items():
            device.on_step = functools.partial(self._on_step, instance_id)

    def _on_step(self, instance_id: str, worker: SimulatedWorker, step_id: int, began: float) -> None:
        inflight = self._system.core.instances[instance_id].workers[worker.id].inflight
        step = next(step for step in inflight if step.step_id == step_id)
        seconds = worker.device.clock.now - began
        without_prompts_s = 0.0
        if step.prefill_rows and step.work is not None and step.work.decode_rows:
            decode = step.work._replace(prompt_tokens=0, prompt_pairs=0.0)
            without_prompts_s = self._steps.at(worker.percentage).seconds(decode)
        for row in step.rows:
            times = self._times.setdefault(row.sequence.id, _Times())
            if times.first_start is None:
                times.first_start = began
            if row.start >= row.allocation.num_tokens_at_entry:
                times.decode_s += seconds
                times.beside_prompts_s += max(0.0, seconds - without_prompts_s) if step.prefill_rows else 0.0
            elif not times.decode_s:
                times.prompt_s += seconds

    def misses(self, requests: Sequence[SimulatedRequest], ttft_target_ms: float, tpot_target_ms: float) -> list[Miss]:
        """Return what requests, in the order in which they were served, have missed."""
        found = []
        for number, request in enumerate(requests, 1):
            times = self._times.get(str(number), _Times())
            if request.ttft_ms > ttft_target_ms:
                found.append(_miss(request, "TTFT", self._why_ttft(request, times, ttft_target_ms)))
            if request.tpot_ms > tpot_target_ms:
                found.append(_miss(request, "TPOT", self._why_tpot(request, times, tpot_target_ms)))
        return found

    def _why_ttft(self, request: SimulatedRequest, times: _Times, target_ms: float) -> str:
        tokens = request.prompt_tokens - request.cached_tokens
        alone_s = self._steps.seconds(StepWork(0, 0, tokens, num_pairs(tokens, request.cached_tokens)))
        if 1000 * alone_s > target_ms:
            return "own prompt"
        began = request.arrival if times.first_start is None else times.first_start
        parts = {
            "queue": began - request.arrival,
            "turn": request.ttft_ms / 1000 - (began - request.arrival) - times.prompt_s,
            "mixed step": times.prompt_s - alone_s,
        }
        return max(parts, key=lambda part: parts[part])

    def _why_tpot(self, request: SimulatedRequest, times: _Times, target_ms: float) -> str:
        alone_s = self._steps.seconds(StepWork(1, request.prompt_tokens))
        if 1000 * alone_s > target_ms:
            return "own decode"
        tokens = request.output_tokens - 1
        parts = {
            "mixed step": times.beside_prompts_s,
            "turn": request.tpot_ms / 1000 * tokens - times.decode_s,
            "decode batch": times.decode_s - times.beside_prompts_s - alone_s * tokens,
        }
        return max(parts, key=lambda part: parts[part])


def _miss(request: SimulatedRequest, target: str, reason: str) -> Miss:
    return Miss(
        request.arrival,
        request.prompt_tokens,
        request.output_tokens,
        target,
        reason,
        round(request.ttft_ms, 1),
        round(request.tpot_ms, 2),
    )
