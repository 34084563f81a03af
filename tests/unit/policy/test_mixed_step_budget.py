"""Size of steps with prompts and decode rows: the batch keeps its pace, and short sequences their targets."""

from __future__ import annotations

import math
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbserve.policy.mixed_step_budget import MixedStepBudget, StepTimeBudget, slack_s
from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork


def seconds(work: StepWork) -> float:
    return 0.002 + 5e-5 * work.decode_rows + 2e-5 * work.prompt_tokens + 1e-9 * work.prompt_pairs


@cache
def trained_predictor() -> StepTimePredictor:
    """A predictor that has seen steps of all kinds."""
    predictor = StepTimePredictor()
    for size in range(1, 400):
        work = StepWork(size % 64, 0.0, 37 * size % 2048, 1e6 * (size % 7))
        predictor.observe(work, seconds(work))
    return predictor


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 30000)), min_size=50, max_size=120), st.integers(1, 60))
def test_a_batch_among_prompts_keeps_its_pace(prompts: list[tuple[int, int]], batch: int) -> None:
    """Whatever arrives, decode steps begin on average within the interval, but for the lead that is forgotten."""
    interval_s, now, decoded, predictor, budget = 0.04, 0.0, 0, trained_predictor(), MixedStepBudget()
    for waiting, start in prompts:
        full_step_s = seconds(StepWork(0, 0.0, 2048, 2048**2 / 2))
        limit_s = budget.limit_s(now, interval_s, math.inf, full_step_s, waiting >= 2048)
        rows = 0 if limit_s == math.inf else batch
        decode = StepWork(rows, 0.0, 0, 0.0)
        assert rows or waiting
        tokens = min(waiting, 2048)
        if rows:
            step = StepTimeBudget(predictor, decode, limit_s)
            tokens = step.take(tokens, start) if tokens else 0
            assert min(waiting, 128) <= tokens <= min(waiting, 2048)
            assert step.is_full is (tokens < min(waiting, 2048))
            budget.on_decode_step(now, bool(tokens))
            decoded += 1
        now += seconds(StepWork(rows, 0.0, tokens, tokens * (start + tokens / 2)))
    assert now <= (decoded + 18) * interval_s


def test_a_new_sequence_does_not_pay_for_the_lead_of_the_batch() -> None:
    interval_s, full_step_s, budget = 0.04, 0.09, MixedStepBudget()
    for _ in range(20):  # decode alone, faster than it needs to be
        budget.limit_s(0.0, interval_s, math.inf, full_step_s, False)
        budget.on_decode_step(0.0, True)
    ahead_s = budget.limit_s(0.0, interval_s, math.inf, full_step_s, False) - interval_s
    assert ahead_s == pytest.approx(8 * interval_s)
    assert budget.limit_s(0.0, interval_s, math.inf, full_step_s, True) == math.inf
    assert budget.limit_s(0.0, interval_s, 0.05, full_step_s, True) == pytest.approx(interval_s + 0.05)
    assert interval_s / 2 <= budget.limit_s(0.0, interval_s, -0.05, full_step_s, True) < interval_s
    assert budget.limit_s(0.0, interval_s, -9.0, full_step_s, True) == interval_s / 2
    # 15 of 16 tokens come after the first: at a target of 48 ms the slack is 120 ms, less 2 % of 720 and a fifth of 48.
    kept_s = 0.02 * 0.72 + 0.2 * 0.048
    assert slack_s(7.0, 7.0, 15, 15, 0.048, interval_s) == pytest.approx(0.12 - kept_s)
    assert slack_s(7.16, 7.0, 15, 14, 0.048, interval_s) == pytest.approx(-kept_s)
    assert slack_s(7.3, 7.0, 15, 14, 0.048, interval_s) == pytest.approx(-0.14 - kept_s)
    assert slack_s(7.5, 7.0, 15, 14, 0.048, interval_s) == math.inf  # too late, so no step waits for it
