"""The real scheduler with a played worker on a virtual clock: drafts save time, and cost none where they cannot."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import msgspec
import pytest

from hbserve import PdDisaggConfig, SamplingParams
from hbserve.messages.client import AddRequest
from hbserve.messages.worker import StepPlan, StepResult
from hbserve.policy.step_time_predictor import keys_of_guesses
from hbserve.scheduler.core_io import FromClient, FromWorker, InboxEvent, Outbox, Start
from hbserve.scheduler.scheduler import CpuScheduler
from hbserve.speculation.rounds import next_round
from tests.support.hellos import hello
from tests.support.scheduler_parts import DEMO

TRAVEL_S = 0.5e-3
"""A result's or a plan's."""
ROUND_GAP_S = 0.2e-3
NUM_TOKENS = 120
PROMPT_TOKENS = 20


@dataclass(frozen=True)
class Model:
    """What a step takes, about: for its weights, a row, a key; ``pass_ms``: a pass of a draft model; ``read_ms``: one
    that reads what the draft model has missed, without a graph; ``hidden_ms``: of the host, before each plan with
    drafts, of which no result tells.
    """

    weights_ms: float
    row_ms: float
    key_ms: float
    pass_ms: float = 0.0
    read_ms: float = 0.0
    hidden_ms: float = 0.0

    def step_s(self, plan: StepPlan) -> float:
        rows = sum(row.num_tokens for row in plan.rows)
        keys = sum(
            row.start * (row.num_tokens - row.num_drafts) + keys_of_guesses(row.num_drafts, row.start)
            for row in plan.rows
        )
        return (self.weights_ms + self.row_ms * rows + self.key_ms * keys) / 1000


LARGE = Model(4.0, 0.032, 3e-5)
"""An 8B shape on an H200."""
SMALL = Model(0.7, 0.008, 1e-5)
"""A 0.6B shape: a result and a plan travel longer than a step takes."""
WITH_DRAFT_MODEL = Model(4.0, 0.032, 3e-5, pass_ms=0.65, read_ms=2.0)
"""The large one with the small one as its draft model."""


def token(request: int, position: int) -> int:
    return hash((request, position)) % 1000


@dataclass
class Device:
    """A worker that does one plan after the other; its draft model is right with a given probability."""

    model: Model
    acceptance: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(2))
    request_of_slot: dict[int, int] = field(default_factory=dict)
    free_at: float = 0.0
    last_id: int = 0

    def answers(self, plan: StepPlan, now: float) -> Iterator[tuple[float, StepResult]]:
        """Yield when the results come that a plan gives, and the results."""
        following: StepPlan | None = plan
        while following is not None:
            at, result = self.answer(following, now)
            following = next_round(following, result, lambda slot: [])
            yield at, msgspec.structs.replace(result, more=following is not None)
            now = at - 2 * TRAVEL_S + ROUND_GAP_S

    def answer(self, plan: StepPlan, now: float) -> tuple[float, StepResult]:
        came = now + TRAVEL_S
        early_s, begin = self.free_at - came, max(came, self.free_at)
        num_passes = max((row.num_to_draft for row in plan.rows), default=0)
        reads = sum(len(row.unread or ()) for row in plan.rows) > len(plan.rows)
        if plan.step_id != self.last_id and any(row.num_drafts for row in plan.rows):
            begin += self.model.hidden_ms / 1000
        self.last_id = plan.step_id
        draft_s = (num_passes * self.model.pass_ms + reads * self.model.read_ms) / 1000
        self.free_at = begin + draft_s + self.model.step_s(plan)
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
            draft_s=draft_s,
            draft_ids=[
                right if self.rng.random() < self.acceptance else (right + 1) % 1000
                for row in plan.rows
                for place in range(row.num_to_draft)
                for right in [token(self.request_of_slot[row.slot], row.start + 1 + place)]
            ],
        )
        return self.free_at + TRAVEL_S, result


@dataclass
class Run:
    """What a run has shown.

    Attributes:
        ends: when each request ended.
        plans: all plans, in their order.
    """

    ends: list[float] = field(default_factory=list)
    plans: list[StepPlan] = field(default_factory=list)

    def planned_ahead(self, num_last: int) -> list[bool]:
        """Return for each of the last plans whether it was made before the last token of its first row was known."""
        return [plan.rows[0].token_ids is None for plan in self.plans[-num_last:]]


def run(
    model: Model,
    batch: int,
    acceptance: float | None,
    method: str = "none",
    before: tuple[float | None, ...] = (),
    every_s: float = 0.0,
) -> Run:
    """Run a batch of requests to their end; their predictions are right so often, or there are none.

    If the model has a draft model, that one is right so often, and there are no predictions.

    Args:
        every_s: between the requests of a batch.
        before: acceptance of other batches, each of which comes when the one before has ended, and before this one.
    """
    drafts = model.pass_ms > 0 and acceptance is not None
    drafting = {"speculation_method": method}
    if drafts:
        drafting = {"speculation_method": "draft_model", "speculation_model": str(DEMO)}
    rng = random.Random(1)
    num_blocks = 12 * batch
    config = PdDisaggConfig.from_arguments(
        str(DEMO), mode="unified", device="cpu", num_blocks=num_blocks, max_num_seqs=256, **drafting
    ).freeze()
    scheduler = CpuScheduler(config, {"unified-0": "nowhere"}, Start(now=0.0, time_ns=1))
    device, numbers = Device(model, acceptance or 0.0), itertools.count()
    events: list[tuple[float, int, InboxEvent]] = [(0.0, next(numbers), FromWorker(1, hello(num_blocks=num_blocks)))]

    def add_batch(now: float, first: int, acceptance: float | None) -> None:
        for number in range(first, first + batch):
            target = [token(number, PROMPT_TOKENS + place) for place in range(NUM_TOKENS)]
            guesses = [t if rng.random() < (acceptance or 0.0) else (t + 1) % 1000 for t in target]
            request = AddRequest(
                request_id=str(number),
                prompt_token_ids=[number] * PROMPT_TOKENS,
                end_token_ids=[],
                sampling=SamplingParams(temperature=0, max_tokens=NUM_TOKENS),
                predicted_token_ids=None if acceptance is None or drafts else guesses,
            )
            at = now + every_s * (number - first)
            heapq.heappush(events, (at, next(numbers), FromClient(b"client", request)))

    batches = [*before, acceptance]
    add_batch(0.0, 0, batches[0])
    now, found = 0.0, Run()

    def handle(outbox: Outbox) -> None:
        found.ends.extend([now] * len(outbox.ended))
        for instance in scheduler.instances.values():
            device.request_of_slot.update({a.slot: int(sequence.id) for sequence, a in instance.allocations.items()})
        for _, command in outbox.to_workers:
            if isinstance(command, StepPlan):
                found.plans.append(command)
                for at, result in device.answers(command, now):
                    heapq.heappush(events, (at, next(numbers), FromWorker(1, result)))

    while len(found.ends) < batch * len(batches):
        inbox = []
        while events and events[0][0] <= now:
            inbox.append(heapq.heappop(events)[2])
        outbox = scheduler.step(now, inbox)
        handle(outbox)
        if outbox.ended and (num_ended := len(found.ends)) % batch == 0 and num_ended < batch * len(batches):
            add_batch(now, num_ended, batches[num_ended // batch])
        now = max(now, min([outbox.call_at, *(at for at, _, _ in events[:1])]))
    return found


def mean_time_s(model: Model, batch: int, acceptance: float | None) -> float:
    """Return when requests end, in the mean."""
    return sum(run(model, batch, acceptance).ends) / batch


@pytest.mark.parametrize(
    ("model", "batch", "min_gain_at_0_7", "min_gain_at_0_9"),
    [
        (LARGE, 1, 1.8, 3.0),
        (LARGE, 64, 1.1, 1.4),
        (SMALL, 1, 1.4, 2.6),
        (WITH_DRAFT_MODEL, 1, 0.975, 1.9),
        (WITH_DRAFT_MODEL, 64, 0.98, 1.25),
    ],
)
def test_drafts_save_time_where_they_are_right_and_cost_none_where_they_are_not(
    model: Model, batch: int, min_gain_at_0_7: float, min_gain_at_0_9: float
) -> None:
    plain_s = mean_time_s(model, batch, None)
    gains = {acceptance: plain_s / mean_time_s(model, batch, acceptance) for acceptance in (0.0, 0.3, 0.7, 0.9)}
    # Drafts must be tried before they show anything, which these first requests pay for.
    assert min(gains.values()) > 0.965, gains
    assert gains[0.7] >= min_gain_at_0_7, gains
    assert gains[0.9] >= min_gain_at_0_9, gains


@pytest.mark.parametrize(
    ("acceptance", "method", "before"),
    [(0.0, "none", ()), (0.0, "none", (0.9, 0.7)), (None, "ngram", ()), (None, "suffix", ()), (None, "auto", (0.9,))],
)
def test_a_sequence_without_guesses_is_planned_ahead_as_one_without_drafters(
    acceptance: float | None, method: str, before: tuple[float, ...]
) -> None:
    num_last = NUM_TOKENS - 20
    expected, found = run(SMALL, 1, None), run(SMALL, 1, acceptance, method, before)
    assert all(expected.planned_ahead(num_last))
    assert found.planned_ahead(num_last) == expected.planned_ahead(num_last)


@pytest.mark.parametrize(("model", "before"), [(SMALL, (1.0, 1.0)), (LARGE, (0.9,))])
def test_a_drafter_that_was_right_for_others_alone_gets_one_round(model: Model, before: tuple[float, ...]) -> None:
    plain_s, found = mean_time_s(model, 1, None), run(model, 1, 0.0, before=before)
    first = max(number for number, plan in enumerate(found.plans) if plan.new_sequences)
    assert max(plan.rounds for plan in found.plans[:first]) > 1
    assert all(plan.rounds == 1 for plan in found.plans[first:])
    assert found.ends[-1] - found.ends[-2] < 1.02 * plain_s


def test_a_step_with_prompts_has_no_drafts_and_leaves_out_no_sequence_that_had_some() -> None:
    found = run(LARGE, 8, 0.9, every_s=0.009)
    slots, num_after_drafts, had_drafts = set[int](), 0, False
    for plan in found.plans:
        has_prompts = any(row.token_ids and row.num_tokens > 1 + row.num_drafts for row in plan.rows)
        has_drafts = any(row.num_drafts for row in plan.rows)
        assert not (has_prompts and has_drafts)
        if has_prompts:
            assert slots <= {row.slot for row in plan.rows}
            num_after_drafts += had_drafts
        slots, had_drafts = slots | {row.slot for row in plan.rows}, has_drafts
    assert num_after_drafts


@dataclass(frozen=True)
class FewRows(Model):
    """One that takes longer for several rows than for one; ``few_ms``: by so much at once."""

    few_ms: float = 0.0

    def step_s(self, plan: StepPlan) -> float:
        rows = sum(row.num_tokens for row in plan.rows)
        return (self.weights_ms + (self.few_ms if rows > 1 else 0.0) + self.row_ms * (rows - 1)) / 1000


@pytest.mark.parametrize("hidden_ms", [0.0, 1.0])
@pytest.mark.parametrize("before", [(), (0.89, 0.7)])
@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (FewRows(3.76, 0.025, 0.0, few_ms=0.5), 1),
        (FewRows(3.76, 0.025, 0.0, few_ms=0.5), 32),
        (FewRows(0.65, 0.012, 0.0, few_ms=0.2), 1),
        (FewRows(0.65, 0.012, 0.0, few_ms=0.2), 8),
    ],
)
def test_drafts_that_hardly_pay_lose_a_few_steps_at_most(
    model: FewRows, batch: int, before: tuple[float, ...], hidden_ms: float
) -> None:
    """The times are those of an 8B and a 0.6B shape on an H200. Earlier batches whose drafts gained change nothing."""
    model = replace(model, hidden_ms=hidden_ms)

    def last_s(acceptance: float | None, before: tuple[float | None, ...]) -> float:
        ends = sorted(run(model, batch, acceptance, before=before).ends)
        return ends[-1] - (ends[-batch - 1] if before else 0.0)

    plain_s = last_s(None, (None,) * len(before))
    step_s = plain_s / NUM_TOKENS
    for acceptance in (0.5, 0.3, 0.0):
        assert last_s(acceptance, before) <= plain_s + 8 * step_s, acceptance
