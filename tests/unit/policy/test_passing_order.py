"""Short prompts pass long ones, and all but a few are no later than first come, first served or the tail makes them."""

from __future__ import annotations

import random

from hbserve.policy.passing_order import BACK_SHARE, MAX_WAIT, PassingOrder

EPSILON_S = 1e-9


def test_short_prompts_pass_a_long_one_as_long_as_it_keeps_its_deadline() -> None:
    order: PassingOrder[str] = PassingOrder()
    assert order.order([("slow", 0.0, 4.0)], 0.0) == ["slow"]  # the tail is now 4 s, of which 3 s may be waited
    prompts = [("long", 10.0, 1.0), ("a", 10.1, 0.2), ("b", 10.1, 0.1), ("c", 10.1, 0.9)]
    assert order.order(prompts, 10.1) == ["b", "a", "c", "long"]
    late = [("long", 10.0, 1.0), ("d", 12.1, 0.2)]  # with 0.9 s left it can wait for nothing
    assert order.order(late, 12.1) == ["long", "d"]


def test_equal_prompts_go_by_arrival() -> None:
    order: PassingOrder[int] = PassingOrder()
    assert order.order([(number, 0.0, 0.5) for number in range(5)], 0.0) == [0, 1, 2, 3, 4]


def _serve(jobs: list[tuple[float, float]]) -> tuple[list[float], list[float], list[float]]:
    """Serve (arrival, seconds) on one machine that changes jobs at each arrival.

    Returns the times from arrival to end, the same first come, first served, and the tails at each arrival.
    """
    order: PassingOrder[int] = PassingOrder()
    left = dict(enumerate(seconds for _, seconds in jobs))
    times, first_come, end = [0.0] * len(jobs), [], 0.0
    for arrival, seconds in jobs:
        end = max(end, arrival) + seconds
        first_come.append(end - arrival)
    tails = [sorted(first_come[: count + 1])[int(0.9 * (count + 1))] for count in range(len(jobs))]
    now = 0.0
    for count, until in enumerate([*(arrival for arrival, _ in jobs[1:]), float("inf")], start=1):
        now = max(now, jobs[count - 1][0])
        waiting = [(job, jobs[job][0], left[job]) for job in range(count) if left[job] > EPSILON_S]
        for job in order.order(waiting, now):
            seconds = min(left[job], until - now)
            now, left[job] = now + seconds, left[job] - seconds
            if left[job] <= EPSILON_S:
                times[job] = now - jobs[job][0]
            if now >= until:
                break
    return times, first_come, tails


def test_no_prompt_is_later_than_first_come_first_served_or_the_tail() -> None:
    sums = [0.0, 0.0]
    for seed in range(20):
        rng = random.Random(seed)
        now, jobs = 0.0, []
        for _ in range(60):
            now += rng.expovariate(0.6) if rng.random() < 0.5 else 0.0
            jobs.append((now, rng.lognormvariate(-1, 1)))
        times, first_come, tails = _serve(jobs)
        for time, limit, tail in zip(times, first_come, tails, strict=True):
            assert time <= max(limit, tail) + 100 * EPSILON_S
        sums = [total + sum(values) for total, values in zip(sums, (times, first_come), strict=True)]
    assert sums[0] < 0.95 * sums[1]


def _bursts(rng: random.Random, count: int) -> list[tuple[float, float]]:
    """Draw jobs that come in bursts, of heavy-tailed durations, and at times more than the machine can do."""
    now = 0.0
    jobs: list[tuple[float, float]] = []
    while len(jobs) < count:
        now += rng.expovariate(0.25)
        for _ in range(min(1 + int(rng.paretovariate(0.9)), 60)):
            now += rng.expovariate(20.0)
            jobs.append((now, min(0.05 * rng.paretovariate(1.2), 8.0)))
    return jobs[:count]


def test_few_prompts_stand_back_and_these_for_a_bounded_time() -> None:
    """A hundredth of the prompts ends later than first come, first served or the tail; the others sooner."""
    tails_s: list[float] = []
    for seed in range(6):
        times, first_come, tails = _serve(_bursts(random.Random(seed), 300))
        later = [
            time
            for time, limit, tail in zip(times, first_come, tails, strict=True)
            if time > max(limit, tail) + 100 * EPSILON_S
        ]
        assert len(later) <= 1 + BACK_SHARE * 300
        assert max(later, default=0.0) <= MAX_WAIT * max(first_come)
        tails_s += [sorted(times)[296] / sorted(first_come)[296]]
    assert max(tails_s) <= 1.05
    assert sum(tails_s) / len(tails_s) < 0.95


def test_one_that_has_stood_back_does_not_do_so_again() -> None:
    order: PassingOrder[int] = PassingOrder()
    for number in range(300):
        order.order([(number, float(number), 0.5)], float(number))
    now, long = 400.0, (1000, 400.0, 5.0)
    assert order.order([long, (1001, now, 0.3)], now)[-1] == 1000  # the other one would wait for 5.3 s
    now += MAX_WAIT * 0.5  # as long as it may
    assert order.order([long, *((2000 + n, now, 0.3) for n in range(9))], now)[0] == 1000
