"""The next round of a step follows from the tokens of the one before, for the worker and for the scheduler alike."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import msgspec
import pytest

from hbserve.engine.model_runner import ModelRunner
from hbserve.messages.worker import NO_TOKEN, TO_BE_DRAFTED, PlanRow, StepPlan, StepResult
from hbserve.speculation import Draft
from hbserve.speculation.rounds import next_round
from hbserve.speculation.speculator import Record
from hbserve.worker.events import RoundDone, StepDone, StepEvent
from hbserve.worker.step_pipeline import StepPipeline

ROWS = [
    PlanRow(0, 10, 3, [1, 2, 3], [7], True, num_drafts=2, ahead=[4, 5, 6]),
    PlanRow(1, 20, 3, [9, TO_BE_DRAFTED, TO_BE_DRAFTED], [], True, num_drafts=2),
    PlanRow(2, 30, 1, [50], [], True),
]
PLAN = StepPlan(epoch=1, step_id=5, rows=ROWS, new_sequences=[], sends=[], rounds=2)


def result(*token_ids: int, draft_ids: tuple[int, ...] = (60, 61)) -> StepResult:
    return StepResult(1, 5, list(token_ids), None, 0.001, draft_ids=list(draft_ids))


def test_each_row_goes_on_behind_its_tokens() -> None:
    # the first guess was right, and the token after it is another one; both of the draft model's guesses were right
    following = next_round(PLAN, result(2, 8, 0, 60, 61, 62, 51), lambda slot: [])
    assert following is not None
    assert following.rounds == 1
    assert following.rows == [
        PlanRow(0, 12, 3, [8, 4, 5], [], True, num_drafts=2, unread_start=11, ahead=[6]),
        PlanRow(1, 23, 3, [62, TO_BE_DRAFTED, TO_BE_DRAFTED], [], True, num_drafts=2, unread=[61], unread_start=22),
        PlanRow(2, 31, 1, [51], [], True, unread_start=30),
    ]
    assert next_round(following, result(4, 5, 6, 0, 0, 0, 0), lambda slot: []) is None


def test_the_scheduler_knows_the_guesses_of_the_next_round() -> None:
    draft = Draft([2, 3], "ngram", Record(), [4, 5, 6])
    assert (draft.after(2).token_ids, draft.after(2).ahead) == ([4, 5], [6])
    assert (draft.after(3).token_ids, draft.after(3).ahead) == ([5, 6], [])
    assert draft.after(3).after(3).token_ids == [0, 0]  # none are left, but rows keep their length
    assert Draft([60, 61], "draft_model", Record()).after(1).token_ids == [TO_BE_DRAFTED] * 2


def test_a_row_that_ends_stays_and_a_step_ends_with_its_last_row_or_a_missing_mask() -> None:
    plan = msgspec.structs.replace(PLAN, rounds=5)
    samples = 2, 3, 99, 60, 0, 0, 51  # two right guesses and an end token; a right and a wrong guess; no guess

    def starts(plan: StepPlan | None, *token_ids: int, end: int = 99) -> list[int]:
        following = plan and next_round(plan, result(*token_ids), lambda slot: [end])
        return [] if following is None else [row.start for row in following.rows]

    assert starts(plan, *samples, end=98) == [13, 22, 31]
    assert starts(plan, *samples) == [10, 22, 31]
    assert starts(plan, *samples[:1], 0, 99, *samples[3:]) == [12, 22, 31]  # an end token behind a wrong guess
    following = next_round(plan, result(*samples), lambda slot: [99])
    assert starts(following, 2, 0, 0, 60, 61, 62, 51) == [10, 25, 32]  # what is sampled for it does not count any more
    assert starts(following, 2, 3, 99, 99, 0, 0, 99) == []
    assert starts(plan, 2, NO_TOKEN, NO_TOKEN, 60, 0, 0, 51) == []
    stopping = [msgspec.structs.replace(row, stop=stop) for row, stop in zip(ROWS, (12, 99, 31), strict=True)]
    assert starts(msgspec.structs.replace(plan, rows=stopping), *samples, end=98) == [10, 22, 30]


@dataclasses.dataclass
class Launched:
    """A step that a played device computes when its result is asked for."""

    device: Device
    token: int
    ready_at: float = 0.0

    def result(self) -> StepResult:
        self.device.log.append(f"result {self.token}")
        return StepResult(1, 5, [self.token, 0], None, 0.001)


@dataclasses.dataclass
class Device:
    """A runner that knows the next round without the result of the last one, or does not; no guess is right."""

    repeats: bool
    log: list[str] = dataclasses.field(default_factory=list)
    board: None = None
    spec: Any = dataclasses.field(default_factory=lambda: type("Spec", (), {"vocab_size": 1000}))
    num_launched: int = 0

    def launch(self, plan: StepPlan) -> Launched:
        self.num_launched += 1
        self.log.append(f"launch {self.num_launched}")
        return Launched(self, self.num_launched)

    def repeat(self, plan: StepPlan) -> Launched | None:
        return self.launch(plan) if self.repeats else None

    def end_tokens_of(self, slot: int) -> list[int]:
        return [3]


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize(("rounds", "num_done"), [(1, 1), (2, 2), (8, 3)])  # the third token is an end token
def test_a_round_may_be_launched_before_the_result_of_the_last_one(repeats: bool, rounds: int, num_done: int) -> None:
    device, events = Device(repeats), list[StepEvent]()
    num_done += repeats and rounds > num_done  # until the round behind the end is over, it writes to blocks
    pipeline = StepPipeline(cast(ModelRunner, device), events.append)
    row = PlanRow(0, 10, 2, [7, 8], [], True, num_drafts=1, ahead=[9] * 30)
    pipeline.launch(StepPlan(1, 5, [row], [], [], rounds=rounds))
    pipeline.close()
    results = [event.result for event in events if isinstance(event, RoundDone | StepDone)]
    assert [type(event) for event in events] == [*[RoundDone] * (num_done - 1), StepDone]
    assert [result.token_ids[0] for result in results] == [*range(1, num_done + 1)]
    assert [result.more for result in results] == [*[True] * (num_done - 1), False]
    if rounds > 1:
        assert (device.log.index("launch 2") < device.log.index("result 1")) == repeats
