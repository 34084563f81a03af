"""What the scheduler's core costs: CPU time of a step, and of the plan and the result in it, by the size of the batch.

The core runs in this process, and the program plays a worker that answers every plan at once. No message is encoded
or sent. Times are CPU time of the thread: the mean of many steps, and the median over rounds.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

from hbserve import PdDisaggConfig, SamplingParams
from hbserve.bench.arguments import find_model, positive
from hbserve.messages.client import AddRequest
from hbserve.messages.worker import StepPlan, StepResult
from hbserve.scheduler.core_io import FromClient, FromWorker, InboxEvent, Outbox, Start
from hbserve.scheduler.scheduler import CpuScheduler
from tests.support.hellos import hello

_STEP_S = 1e-3
_PROMPT_TOKENS = 100
_BLOCKS_PER_REQUEST = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", default="qwen3-0.6b", help="a folder, or a shape's name; only its limits count")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 32, 256], help="sequences in a step")
    parser.add_argument("--steps", type=positive, default=400, help="decode steps of a round")
    parser.add_argument("--rounds", type=positive, default=5)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print a table; all times are microseconds."""
    model = str(find_model(arguments.model))
    print(f"{'batch':>5} {'step':>8} {'plan':>8} {'result':>8}   CPU time, us")
    for batch in arguments.batch:
        rounds = [measure(model, batch, arguments.steps) for _ in range(arguments.rounds)]
        step, plan, result = (statistics.median(times) for times in zip(*rounds, strict=True))
        print(f"{batch:5} {step:8.1f} {plan:8.1f} {result:8.1f}")


def measure(model: str, batch: int, num_steps: int) -> tuple[float, float, float]:
    """Return the mean CPU time, in microseconds, of a decode step, of planning it and of taking its result."""
    worker = _Worker(model, batch)
    worker.begin()
    plan = _timed(worker.scheduler._planner, "plan_step")
    result = _timed(worker.scheduler._requests, "on_step_done")
    gc.collect()
    gc.freeze()
    total_ns = sum(worker.step() for _ in range(num_steps))
    gc.unfreeze()
    return total_ns / num_steps / 1000, plan() / num_steps, result() / num_steps


def _timed(part: Any, name: str) -> Callable[[], float]:
    """Measure all calls of a method; the returned function returns their CPU time in microseconds."""
    method, total_ns = getattr(part, name), 0

    def call(*arguments: Any) -> Any:
        nonlocal total_ns
        begin = time.thread_time_ns()
        try:
            return method(*arguments)
        finally:
            total_ns += time.thread_time_ns() - begin

    setattr(part, name, call)
    return lambda: total_ns / 1000


class _Worker:
    """A worker, and the client of as many requests as a step of it holds."""

    def __init__(self, model: str, batch: int) -> None:
        self._batch = batch
        num_blocks = _BLOCKS_PER_REQUEST * (batch + 1)
        config = PdDisaggConfig.from_arguments(
            model, mode="unified", device="cpu", num_blocks=num_blocks, max_num_seqs=batch
        ).freeze()
        self._now = 1.0
        start = Start(now=self._now, time_ns=time.time_ns())
        self.scheduler = CpuScheduler(config, {"unified-0": "nowhere"}, start)
        self._hello = hello(num_blocks=num_blocks, max_model_len=4096)
        self._plans: list[StepPlan] = []

    def begin(self) -> None:
        """Register, add the requests, and run until all of them decode."""
        self._take(
            self.scheduler.step(self._now, [FromWorker(1, self._hello), *map(self._request, range(self._batch))])
        )
        while any(len(plan.rows) < self._batch or plan.new_sequences for plan in self._plans):
            self.step()
        for _ in range(30):  # until the time of plans is learnt
            self.step()

    def _request(self, number: int) -> InboxEvent:
        prompt = [(7 * number + position) % 1000 for position in range(_PROMPT_TOKENS)]
        sampling = SamplingParams(temperature=0, max_tokens=_BLOCKS_PER_REQUEST * 16 - _PROMPT_TOKENS)
        request = AddRequest(request_id=str(number), prompt_token_ids=prompt, end_token_ids=[1023], sampling=sampling)
        return FromClient(b"client", request)

    def step(self) -> int:
        """Answer the oldest plan; returns the scheduler's CPU time in nanoseconds."""
        plan = self._plans.pop(0)
        num_samples = sum(row.sample for row in plan.rows)
        result = StepResult(
            epoch=1,
            step_id=plan.step_id,
            token_ids=[7] * num_samples,
            logprobs=None,
            busy_s=_STEP_S,
            host_s=_STEP_S / 2,
            early_s=_STEP_S / 2,
        )
        self._now += _STEP_S
        inbox = [FromWorker(1, result)]
        begin = time.thread_time_ns()
        outbox = self.scheduler.step(self._now, inbox)
        elapsed_ns = time.thread_time_ns() - begin
        self._take(outbox)
        return elapsed_ns

    def _take(self, outbox: Outbox) -> None:
        self._plans += [command for _, command in outbox.to_workers if isinstance(command, StepPlan)]
