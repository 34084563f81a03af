"""Step times learnt from steps: every question that a user asks, outliers, changes and unseen work."""

from __future__ import annotations

import math
import random
import statistics
from copy import deepcopy
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbserve.policy.least_squares import LeastSquares
from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork, num_pairs

PER_TOKEN_S, PER_PAIR_S = 2.4e-5, 4e-10


def seconds(work: StepWork) -> float:
    """What an 8B model on a fast GPU takes, roughly."""
    rows, keys, tokens, pairs, _ = work
    return 4e-3 + 3e-5 * rows + 2.8e-8 * keys + PER_TOKEN_S * tokens + PER_PAIR_S * pairs


def draw_work(draw: random.Random) -> StepWork:
    rows, tokens = draw.randrange(1, 192), draw.choice((0, draw.randrange(1, 2048), 2048))
    return StepWork(rows, rows * draw.randrange(100, 4000), tokens, num_pairs(tokens, draw.randrange(8000)))


@cache
def trained(noise: float = 0.0, pauses: float = 0.0) -> StepTimePredictor:
    """A predictor that has seen steps of all kinds, some of them while the process was stopped."""
    draw, predictor = random.Random(5), StepTimePredictor()
    for _ in range(400):
        work = draw_work(draw)
        pause_s = draw.uniform(0.1, 30.0) if draw.random() < pauses else 0.0
        predictor.observe(work, seconds(work) * math.exp(draw.gauss(0.0, noise)) + pause_s)
    return predictor


def errors(predictor: StepTimePredictor) -> list[float]:
    works = [draw_work(draw) for draw in map(random.Random, range(200))]
    return [abs(predictor.estimate_s(work) / seconds(work) - 1) for work in works]


@pytest.mark.parametrize(
    ("noise", "pauses", "median", "largest"), [(0.0, 0.0, 1e-3, 0.02), (0.03, 0.0, 0.03, 0.25), (0.03, 0.02, 0.04, 0.3)]
)
def test_steps_are_predicted_whatever_pauses_between_them(
    noise: float, pauses: float, median: float, largest: float
) -> None:
    off = errors(trained(noise=noise, pauses=pauses))
    assert statistics.median(off) < median
    assert max(off) < largest


def test_a_pause_changes_nothing_and_a_change_counts_from_its_second_step() -> None:
    predictor, work = deepcopy(trained()), StepWork(64, 64_000)
    before_s = predictor.seconds(work)
    predictor.observe(work, 100 * seconds(work))
    assert predictor.seconds(work) == pytest.approx(before_s, rel=0.1)
    for _ in range(6):
        predictor.observe(work, seconds(work))
    for _ in range(8):
        predictor.observe(work, 2 * seconds(work))
    assert predictor.estimate_s(work) == pytest.approx(2 * seconds(work), rel=0.1)
    for _ in range(8):
        predictor.observe(work, seconds(work))
    assert predictor.seconds(work) == pytest.approx(seconds(work), rel=0.1)


def test_steps_that_share_the_device_are_learnt_apart() -> None:
    predictor, work = deepcopy(trained()), StepWork(64, 64_000)
    shared = work._replace(is_shared=True)
    for _ in range(40):
        predictor.observe(work, seconds(work))
        predictor.observe(shared, 1.5 * seconds(work))
    assert predictor.estimate_s(shared) / predictor.estimate_s(work) == pytest.approx(1.5, rel=0.05)


def test_nothing_is_known_at_first() -> None:
    predictor = StepTimePredictor()
    assert predictor.seconds(StepWork(4, 100, 5, 12.0)) == predictor.prompt_s(100, 0) == predictor.step_s == 0
    assert predictor.queue_s(1000, 1e6, 512) == 0
    assert predictor.tokens_within(StepWork(4, 100), 0, 1e-3) == math.inf
    predictor.observe(StepWork(4, 100), 5e-3)
    assert predictor.seconds(StepWork(4, 100)) == pytest.approx(5e-3)
    assert predictor.seconds(StepWork(4, 100, 2000, 2e6)) == 0
    assert predictor.seconds(StepWork(400, 10_000)) <= 5e-3  # no prediction is longer than what was seen


def test_the_time_of_prompts_includes_the_company_that_they_have() -> None:
    predictor = StepTimePredictor()
    for index in range(300):  # full steps, the prompts of which are long by turns
        work = StepWork(64, 64_000, 1024, num_pairs(1024, 4000 * (index % 4)))
        predictor.observe(work, seconds(work))
    rest_s = 4e-3 + 3e-5 * 64 + 2.8e-8 * 64_000  # in each step
    for start in (0, 8000):
        chunks = [num_pairs(1024, start + 1024 * index) for index in range(8)]
        expected_s = sum(rest_s + PER_TOKEN_S * 1024 + PER_PAIR_S * pairs for pairs in chunks)
        assert predictor.prompt_s(8192, start) == pytest.approx(expected_s, rel=0.05)
        assert predictor.queue_s(8192, num_pairs(8192, start), 1024) == pytest.approx(expected_s, rel=0.05)
    assert predictor.step_s == pytest.approx(rest_s + PER_TOKEN_S * 1024 + PER_PAIR_S * num_pairs(1024, 6000), rel=0.05)


def test_the_wait_of_a_queue_is_that_of_full_steps() -> None:
    """Steps with few prompt tokens tell what full ones take."""
    predictor = StepTimePredictor()
    for index in range(200):
        tokens = 16 + 37 * index % 500
        work = StepWork(64, 64_000, tokens, num_pairs(tokens, 500 * (index % 3)))
        predictor.observe(work, seconds(work))
    full = StepWork(64, 64_000, 2048, num_pairs(2048, 0))
    assert predictor.queue_s(16 * 2048, 16 * full.prompt_pairs, 2048) == pytest.approx(16 * seconds(full), rel=0.2)


def test_short_prompts_do_not_say_what_long_ones_cost() -> None:
    predictor = StepTimePredictor()
    for index in range(100):
        predictor.observe(StepWork(0, 0, 40 - index % 2, 800.0 if index % 2 else 790.0), 1e-2 + 1e-4 * (index % 2))
    assert predictor.prompt_s(4000, 0) < 4000 / 40 * 4e-2
    assert predictor.queue_s(4000, num_pairs(4000, 0), 512) < 4000 / 40 * 4e-2


@settings(max_examples=50)
@given(st.integers(0, 200), st.integers(0, 30_000), st.floats(1e-3, 0.2), st.integers(0, 1024))
def test_the_tokens_that_fit_are_the_inverse_of_the_time_that_they_take(
    rows: int, start: int, limit_s: float, before: int
) -> None:
    predictor, work = trained(), StepWork(rows, rows * 1000, before, num_pairs(before, 0))
    tokens = predictor.tokens_within(work, start, limit_s)
    pairs = work.prompt_pairs + num_pairs(tokens, start)
    whole_s = predictor.estimate_s(work._replace(prompt_tokens=before + tokens, prompt_pairs=pairs))
    if tokens:
        assert whole_s == pytest.approx(limit_s, rel=1e-6)
    else:
        assert not before or predictor.estimate_s(work) >= limit_s


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 4096), st.floats(1e-9, 1e4)), max_size=60))
def test_more_work_never_takes_less_time(steps: list[tuple[int, int, float]]) -> None:
    predictor = StepTimePredictor()
    for rows, tokens, took_s in steps:
        predictor.observe(StepWork(rows, rows * 100, tokens, num_pairs(tokens, rows)), took_s)
    for smaller, larger in (
        (StepWork(1, 10), StepWork(2, 20)),
        (StepWork(1, 10, 1, 1.0), StepWork(1, 10, 2, 1.0)),
        (StepWork(1, 10, 1, 1.0), StepWork(1, 10, 1, 9.0)),
    ):
        assert 0 <= predictor.estimate_s(smaller) <= predictor.estimate_s(larger) < math.inf
    assert 0 <= predictor.prompt_s(10, 0) <= predictor.prompt_s(10, 100) <= predictor.prompt_s(20, 100) < math.inf


def test_least_squares_begins_with_its_prior_and_ends_with_the_observations() -> None:
    fit = LeastSquares((1.0, 1.0), (0.5, 0.5))
    assert fit.predict((2.0, 3.0)) == pytest.approx(5.0)
    for x in range(1, 200):
        fit.add((1.0, x), 3.0 + 0.25 * x, 1e4)
    fit.solve()
    assert fit.coefficients == pytest.approx([3.0, 0.25], rel=0.01)
    for x in range(1, 200):
        fit.add((1.0, x), -5.0 - x, 1e4)
    fit.solve()
    assert min(fit.coefficients) >= 0  # more work never takes less time
