"""The bound of any schedule: the true optimum of small instances, and never below what a system reaches."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbserve.bench.request_record import RequestTargets
from hbserve.config import SchedulerConfig
from hbserve.policy.profile_file import profiled_predictor
from hbserve.policy.step_time_predictor import StepWork, num_pairs
from hbserve.simulate import __main__ as command
from hbserve.simulate.config import Sizes
from hbserve.simulate.oracle import largest_set, serve_best
from hbserve.simulate.requests import SimulatedRequest
from hbserve.simulate.systems import Setting, System, simulate
from tests.support.simulated_load import poisson

STEPS = profiled_predictor()
SETTING = Setting(STEPS, STEPS, Sizes(chunk_size=1024), RequestTargets(ttft_ms=300, tpot_ms=30))
Job = tuple[float, float, float]  # release, duration, deadline


def can_all_end(jobs: list[Job]) -> bool:
    """Whether one machine ends all jobs in time: the earliest deadline first, with preemption, from event to event."""
    left = [duration for _, duration, _ in jobs]
    now = 0.0
    while any(left):
        ready = [i for i, (release, _, _) in enumerate(jobs) if left[i] and release <= now]
        later = min((release for i, (release, _, _) in enumerate(jobs) if left[i] and release > now), default=math.inf)
        if not ready:
            now = later
            continue
        first = min(ready, key=lambda i: jobs[i][2])
        step = min(left[first], later - now)
        left[first] -= step
        now += step
        if not left[first] and now > jobs[first][2]:
            return False
    return True


def most_by_force(jobs: list[Job]) -> int:
    return max(
        len(chosen)
        for size in range(len(jobs) + 1)
        for chosen in itertools.combinations(jobs, size)
        if can_all_end(list(chosen))
    )


small_jobs = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=7).map(sorted)


@settings(max_examples=80, deadline=None)
@given(small_jobs, st.integers(1, 15))
def test_the_bound_is_the_optimum_of_one_machine(jobs: list[tuple[int, int]], target: int) -> None:
    ends = largest_set([r for r, _ in jobs], [p for _, p in jobs], [r + target for r, _ in jobs])
    full = [(float(r), float(p), float(r + target)) for r, p in jobs]
    assert sum(end is not None for end in ends) == most_by_force(full)
    for (release, duration, deadline), end in zip(full, ends, strict=True):
        assert end is None or release + duration <= end <= deadline


@settings(max_examples=40, deadline=None)
@given(small_jobs, st.integers(1, 15), st.integers(0, 127))
def test_two_machines_do_no_more_than_one_of_twice_the_speed(
    jobs: list[tuple[int, int]], target: int, places: int
) -> None:
    """However the jobs are dealt to two machines."""
    ends = largest_set([r for r, _ in jobs], [p / 2 for _, p in jobs], [r + target for r, _ in jobs])
    full = [(float(r), float(p), float(r + target)) for r, p in jobs]
    sides = [[job for i, job in enumerate(full) if places >> i & 1 == side] for side in (0, 1)]
    assert sum(map(most_by_force, sides)) <= sum(end is not None for end in ends)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4096), st.integers(0, 30_000), st.integers(0, 256), st.integers(1, 20_000))
def test_no_step_computes_prompts_faster_than_the_bound_counts(
    tokens: int, start: int, rows: int, context: int
) -> None:
    work = StepWork(rows, rows * context, tokens, num_pairs(tokens, start))
    assert STEPS.curves is not None
    assert STEPS.curves.added_prompt_s(tokens, num_pairs(tokens, start)) <= STEPS.seconds(work)


@pytest.mark.parametrize("name", ["unified@1024", "slo@80-100+mixed", "1p1d", "unified@1024*2"])
def test_no_system_exceeds_the_bound(name: str) -> None:
    system = System.parse(name)
    outcome = simulate(system, SETTING, poisson(45 * system.num_gpus, 1.5, (300, 2500), (5, 30), seed=3))
    assert 0 < outcome.attainment <= outcome.bound < 1
    assert outcome.share_of_bound == outcome.attainment / outcome.bound
    best = System.parse(f"oracle*{system.num_gpus}")
    load = poisson(45 * system.num_gpus, 1.5, (300, 2500), (5, 30), seed=3)
    assert simulate(best, SETTING, load).attainment == outcome.bound


def test_a_block_costs_the_first_request_that_begins_with_it() -> None:
    requests = [SimulatedRequest(0.0, 4096, 1, prefix_blocks=tuple(range(8))) for _ in range(6)]
    assert STEPS.curves is not None
    one_s = STEPS.curves.added_prompt_s(4096, num_pairs(4096, 0))
    assert all(end is not None for end in serve_best(requests, STEPS, 1100 * one_s, 1))
    others = [SimulatedRequest(0.0, 4096, 1) for _ in range(6)]
    assert sum(end is not None for end in serve_best(others, STEPS, 1100 * one_s, 1)) == 1
    assert not any(serve_best(others, STEPS, 900 * one_s, 8))  # no GPU is in time, and none shares a prompt


@pytest.mark.parametrize(
    ("target", "requests", "reason"),
    [
        ((40, 1000), [(0.0, 2048, 2)], {"TTFT": "own prompt"}),
        ((1000, 2), [(0.0, 64, 20)], {"TPOT": "own decode"}),
        ((90, 1000), [(0.0, 4096, 1), (0.001, 512, 1)], {"TTFT": "queue"}),
        ((1000, 9), [(0.0, 64, 12), (0.02, 4096, 1)], {"TPOT": "mixed step"}),
    ],
)
def test_a_miss_has_a_reason(
    target: tuple[float, float], requests: list[tuple[float, int, int]], reason: dict[str, str]
) -> None:
    setting = Setting(STEPS, STEPS, Sizes(scheduler=SchedulerConfig(policy="fcfs")), RequestTargets(*target))
    load = [SimulatedRequest(*request) for request in requests]
    outcome = simulate(System.parse("unified@1024"), setting, load, records_misses=True)
    assert outcome.misses is not None
    found = {miss.target: miss.reason for miss in outcome.misses}
    assert reason.items() <= found.items(), outcome.misses


def test_the_command_line_prints_misses_and_the_share_reached(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = ["--rate", "30", "--duration", "3", "--misses"]
    monkeypatch.setattr(
        "sys.argv", ["hbserve", "--goodput", "ttft:60,tpot:25", *load, "--system", "unified", "--system", "oracle"]
    )
    assert command.main() == 0
    out = capsys.readouterr().out
    assert "of bound" in out
    assert "missed TTFT: queue" in out
    monkeypatch.setattr("sys.argv", ["hbserve", "--goodput", "ttft:60,tpot:25", "--sweep", "--misses"])
    assert command.main() == 1
    assert "--misses" in capsys.readouterr().err
