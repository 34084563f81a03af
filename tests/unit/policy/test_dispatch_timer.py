"""Time of plans: late in long steps, at once in short ones, and never so late that the device waits for long."""

from __future__ import annotations

import itertools
import random

import pytest

from hbserve.policy.dispatch_timer import DispatchTimer
from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork

WAY_S = 2e-3  # of a plan, until the device could begin
Step = tuple[StepWork, float]


def decode(rows: int, context: int = 800) -> StepWork:
    return StepWork(rows, rows * context, 0, 0)


def seconds(work: StepWork) -> float:
    """What an 8B model on a fast GPU takes, roughly."""
    read_s = 4e-3 + 3e-5 * work.decode_rows + 2.8e-8 * work.decode_keys
    return read_s + 2.4e-5 * work.prompt_tokens + 4e-10 * work.prompt_pairs


def drive(timer: DispatchTimer, steps: list[Step]) -> tuple[list[float], list[float]]:
    """Run steps on a made-up device; returns how long each step waited for it, and how long it waited for each."""
    waits, idle = [0.0], [0.0]
    timer.on_planned(steps[0][0], 0.0)
    begin = WAY_S
    for (_, took), (following, _) in itertools.pairwise(steps):
        now, end = begin, begin + took
        planned_at = now + timer.wait_s(now)
        if planned_at < end:
            timer.on_planned(following, planned_at)
        timer.on_confirmed(end, took, waits[-1] - idle[-1])
        if planned_at >= end:  # the end of the step wakes the scheduler
            assert not timer.wait_s(end)
            planned_at = end
            timer.on_planned(following, end)
        begin = max(end, planned_at + WAY_S)
        waits.append(begin - planned_at - WAY_S)
        idle.append(begin - end)
    timer.on_confirmed(begin + steps[-1][1], steps[-1][1], waits[-1] - idle[-1])
    return waits, idle


def test_long_steps_are_planned_shortly_before_they_are_needed() -> None:
    timer = DispatchTimer()
    waits, idle = drive(timer, [(decode(64), 20e-3)] * 200)
    assert min(waits[1:16]) == pytest.approx(18e-3)  # nothing is known yet: planned when the step before begins
    assert max(waits[60:]) <= 2e-3
    assert sum(idle[60:]) == 0.0
    waits, idle = drive(DispatchTimer(predecessor=timer), [(decode(64), 15e-3)] * 20)
    assert max(waits[8:]) <= 2e-3  # as soon as the timer knows its own step times
    assert sum(idle[1:]) == 0.0


def test_short_steps_are_planned_at_once() -> None:
    timer = DispatchTimer()
    waits, _ = drive(timer, [(decode(64), 3.9e-3)] * 200)
    assert min(waits[1:]) == pytest.approx(1.9e-3)


def test_steps_of_any_size_in_any_order_seldom_come_late() -> None:
    draw = random.Random(3)
    steps: list[Step] = []
    for _ in range(3000):
        tokens = draw.choice((0, 0, draw.randrange(1, 2048), 2048))
        work = StepWork(draw.randrange(16, 192), draw.randrange(16, 192) * 1000, tokens, tokens * draw.randrange(4000))
        steps.append((work, seconds(work) * draw.gauss(1.0, 0.02)))
    waits, idle = drive(DispatchTimer(), steps)
    busy_s = sum(took for _, took in steps)
    assert sum(idle[100:]) < 0.01 * busy_s
    assert (
        sum(waits[100:]) < 0.4 * busy_s
    )  # if planned when the step before begins, they would wait for nearly all of it


def test_steps_that_end_sooner_than_ever_widen_the_lead() -> None:
    """As when the other phase falls idle: prompts are then computed in two thirds of the time."""
    steps = [(StepWork(0, 0, 2048, 2048 * 1024), 60e-3 if index // 5 % 2 else 40e-3) for index in range(1000)]
    _, idle = drive(DispatchTimer(), steps)
    late = sum(idle_s > 0 for idle_s in idle[100:])
    assert late < 0.06 * len(steps)
    assert max(idle) == pytest.approx(WAY_S)  # the end of a step wakes the scheduler


def test_a_step_that_cannot_be_predicted_holds_no_plan_back() -> None:
    timer = DispatchTimer()
    drive(timer, [(decode(64), 20e-3)] * 100)
    now = 100.0
    timer.on_planned(None, now)
    assert not timer.wait_s(now)
    timer.on_confirmed(now + 1.0, 1.0, 0.0)
    timer.on_planned(decode(64), now + 1.0)
    assert timer.wait_s(now + 1.0) > 10e-3
    assert not DispatchTimer().wait_s(now)


def test_unseen_work_is_predicted_to_be_short() -> None:
    predictor = StepTimePredictor()
    assert predictor.seconds(decode(64)) == 0.0
    for _ in range(50):
        predictor.observe(decode(64), 10e-3)
    assert predictor.seconds(decode(64)) == pytest.approx(10e-3)
    assert predictor.seconds(StepWork(64, 64 * 800, 2048, 2048 * 1024)) <= 10e-3
    assert predictor.seconds(decode(640)) <= 10e-3
    for index in range(400):
        work = decode(1 + index % 100) if index % 2 else StepWork(8, 800, 512 + index, 512 * 256)
        predictor.observe(work, seconds(work))
    for work in (decode(30), decode(90), StepWork(8, 800, 700, 512 * 256)):
        assert predictor.seconds(work) == pytest.approx(seconds(work), rel=0.15)
