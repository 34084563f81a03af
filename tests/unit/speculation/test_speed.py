"""The real scheduler with a played worker on a virtual clock: drafts save time, and cost none where they cannot."""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass, field

import pytest

from hbserve import PdDisaggConfig, SamplingParams
from hbserve.messages.client import AddRequest
from hbserve.messages.worker import StepPlan, StepResult
from hbserve.scheduler.core_io import FromClient, FromWorker, InboxEvent, Outbox, Start
from hbserve.scheduler.scheduler import CpuScheduler
from tests.support.hellos import hello
from tests.support.scheduler_parts import DEMO

TRAVEL_S = 0.5e-3
"""A result's or a plan's."""
NUM_TOKENS = 120
PROMPT_TOKENS = 20


def step_s(plan: StepPlan) -> float:
    """Time of a step of an 8B shape on an H200, about: weights, rows, and keys."""
    rows = sum(row.num_tokens for row in plan.rows)
    keys = sum(row.start * row.num_tokens for row in plan.rows)
    return (4.0 + 0.032 * rows + 3e-5 * keys) / 1000


def token(request: int, position: int) -> int:
    return hash((request, position)) % 1000


@dataclass
class Device:
    """A worker that does one plan after the other."""

    request_of_slot: dict[int, int] = field(default_factory=dict)
    free_at: float = 0.0

    def answer(self, plan: StepPlan, now: float) -> tuple[float, StepResult]:
        came = now + TRAVEL_S
        early_s, begin = self.free_at - came, max(came, self.free_at)
        self.free_at = begin + step_s(plan)
        tokens = [
            token(self.request_of_slot[row.slot], row.start + row.num_tokens - row.num_samples + 1 + place)
            for row in plan.rows
            for place in range(row.num_samples)
        ]
        result = StepResult(
            epoch=1,
            step_id=plan.step_id,
            token_ids=tokens,
            logprobs=None,
            busy_s=self.free_at - begin,
            early_s=early_s,
        )
        return self.free_at + TRAVEL_S, result


def mean_time_s(batch: int, acceptance: float | None) -> float:
    """Return when requests end, in the mean; their predictions are right so often, or there are none."""
    rng = random.Random(1)
    num_blocks = 12 * batch
    config = PdDisaggConfig.from_arguments(
        str(DEMO), mode="unified", device="cpu", num_blocks=num_blocks, max_num_seqs=256
    ).freeze()
    scheduler = CpuScheduler(config, {"unified-0": "nowhere"}, Start(now=0.0, time_ns=1))
    device, numbers = Device(), itertools.count()
    events: list[tuple[float, int, InboxEvent]] = [(0.0, next(numbers), FromWorker(1, hello(num_blocks=num_blocks)))]
    for number in range(batch):
        target = [token(number, PROMPT_TOKENS + place) for place in range(NUM_TOKENS)]
        guesses = [t if rng.random() < (acceptance or 0.0) else (t + 1) % 1000 for t in target]
        request = AddRequest(
            request_id=str(number),
            prompt_token_ids=[number] * PROMPT_TOKENS,
            end_token_ids=[],
            sampling=SamplingParams(temperature=0, max_tokens=NUM_TOKENS),
            predicted_token_ids=None if acceptance is None else guesses,
        )
        events.append((0.0, next(numbers), FromClient(b"client", request)))
    now, ends = 0.0, []

    def handle(outbox: Outbox) -> None:
        ends.extend([now] * len(outbox.ended))
        for instance in scheduler.instances.values():
            device.request_of_slot.update({a.slot: int(sequence.id) for sequence, a in instance.allocations.items()})
        for _, command in outbox.to_workers:
            if isinstance(command, StepPlan):
                at, result = device.answer(command, now)
                heapq.heappush(events, (at, next(numbers), FromWorker(1, result)))

    while len(ends) < batch:
        inbox = []
        while events and events[0][0] <= now:
            inbox.append(heapq.heappop(events)[2])
        outbox = scheduler.step(now, inbox)
        handle(outbox)
        now = max(now, min([outbox.call_at, *(at for at, _, _ in events[:1])]))
    return sum(ends) / batch


@pytest.mark.parametrize(
    ("batch", "min_gain_at_0_7", "min_gain_at_0_9"), [(1, 1.8, 3.0), (12, 1.4, 2.2), (64, 1.05, 1.3)]
)
def test_drafts_save_time_where_they_are_right_and_cost_none_where_they_are_not(
    batch: int, min_gain_at_0_7: float, min_gain_at_0_9: float
) -> None:
    plain_s = mean_time_s(batch, None)
    gains = {acceptance: plain_s / mean_time_s(batch, acceptance) for acceptance in (0.0, 0.3, 0.7, 0.9)}
    assert min(gains.values()) > 0.98, gains
    assert gains[0.7] >= min_gain_at_0_7, gains
    assert gains[0.9] >= min_gain_at_0_9, gains
