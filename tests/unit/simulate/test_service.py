"""What the order of prompts promises, on the real core and the simulated clock: no request starves."""

from __future__ import annotations

import random
import statistics
from functools import cache, partial
from itertools import pairwise

import pytest

from hbserve.config import InstanceRole, SchedulerConfig
from hbserve.messages.admin import SetRole
from hbserve.messages.client import OutputBatch
from hbserve.policy.profile_file import profiled_predictor
from hbserve.policy.queue_policy import OVERDUE_SHARE, OVERDUE_TARGETS
from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork, num_pairs
from hbserve.scheduler.core_io import FromClient
from hbserve.simulate.config import Sizes, make_config
from hbserve.simulate.requests import SimulatedRequest
from hbserve.simulate.world import SimulatedSystem
from tests.support.simulated_load import poisson

TTFT_MS, TPOT_MS = 300.0, 40.0
SOFT = SchedulerConfig(ttft_ms=86.0, ttft_ms_per_1k_tokens=197.0, tpot_ms=43.0, targets_are_soft=True)


@cache
def steps() -> StepTimePredictor:
    return profiled_predictor()


@pytest.mark.parametrize(("roles", "rate"), [(("unified",), 40.0), (("prefill", "decode"), 55.0)])
def test_under_overload_no_request_starves(roles: tuple[str, ...], rate: float) -> None:
    """Prompts that can be in time fill the device for 8 s. A late one has its first token after a stated time."""
    requests = poisson(rate, 8.0, (500, 1500), (2, 4), seed=1)
    late = [SimulatedRequest(0.5, 12_000, 2)]  # 0.4 s: it gives way
    everything = sorted([*requests, *late], key=lambda request: request.arrival)
    config = make_config([InstanceRole(role) for role in roles], Sizes(), shares_prefixes=False)
    SimulatedSystem(config, steps(), Sizes().num_blocks, TTFT_MS, TPOT_MS).serve(everything)
    work_s = 0.0
    for request in late:
        assert request.ttft_ms > TTFT_MS
        work_s += steps().prompt_s(request.prompt_tokens, 0)
        assert request.ttft_ms / 1000 <= OVERDUE_TARGETS * TTFT_MS / 1000 + 1.1 * work_s / OVERDUE_SHARE
    in_time = sum(request.ttft_ms <= TTFT_MS for request in requests)
    assert in_time > 0.5 * len(requests)


@pytest.mark.parametrize("roles", [("unified",), ("unified", "unified")])
@pytest.mark.parametrize("seed", [0, 2])
def test_where_targets_are_a_guess_no_request_waits_much_longer_than_first_come_first_served(
    roles: tuple[str, ...], seed: int
) -> None:
    """Bursts of prompts of 1 to 30,000 tokens, more than the device can do, with best-effort ones among them."""
    rng, now = random.Random(seed), 0.0
    load: list[tuple[float, int, int, bool]] = []
    for _ in range(100):
        now += rng.expovariate(rng.choice([4, 30, 200]))
        prompt_tokens, output_tokens = rng.choice([1, 20, 500, 2000, 8000, 30_000]), rng.choice([1, 2, 20, 200])
        load.append((now, prompt_tokens, output_tokens, rng.random() < 0.1))
    longest_ms = []
    for scheduler in (SOFT, SchedulerConfig(policy="fcfs")):
        requests = [SimulatedRequest(at, prompt, output, is_batch=is_batch) for at, prompt, output, is_batch in load]
        config = make_config([InstanceRole(role) for role in roles], Sizes(scheduler=scheduler), shares_prefixes=False)
        SimulatedSystem(config, steps(), Sizes().num_blocks).serve(requests)
        longest_ms.append(max(request.ttft_ms for request in requests if not request.is_batch))
        assert max(request.ttft_ms for request in requests) < 60_000
    assert longest_ms[0] <= 2.5 * longest_ms[1]


@pytest.mark.parametrize("roles", [("unified",), ("prefill", "decode")])
def test_however_loose_targets_are_a_prompt_waits_for_a_short_step(roles: tuple[str, ...]) -> None:
    """Without any chunk, a prompt with an earlier deadline than the one that is computed is in the next step."""
    loose = SchedulerConfig(ttft_ms=2000.0, ttft_ms_per_1k_tokens=1000.0)
    config = make_config([InstanceRole(role) for role in roles], Sizes(scheduler=loose))
    before = poisson(6.0, 4.0, (100, 8000), (2, 4), seed=1)  # from which the scheduler learns what a step takes
    long, shorts = SimulatedRequest(6.0, 30_000, 4), [SimulatedRequest(6 + 0.2 * n, 100, 4) for n in range(1, 5)]
    SimulatedSystem(config, steps(), Sizes().num_blocks).serve([*before, long, *shorts])
    step_ms = 1000 * steps().seconds(StepWork(0, 0, 2500, num_pairs(2500, 15_000)))
    assert max(short.ttft_ms for short in shorts) < 2.5 * step_ms  # the step under way, and its own
    assert long.ttft_ms < 1.3 * 1000 * steps().prompt_s(30_000, 0)


def test_answers_of_few_tokens_keep_their_target_although_plans_are_made_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is made 12 ms before its step can begin. So late is the step's token, and a short answer has no other."""
    monkeypatch.setattr("hbserve.simulate.device.PLAN_DELAY_S", 12e-3)
    requests = poisson(10.0, 8.0, (500, 4000), (3, 5), seed=1)
    config = make_config([InstanceRole.UNIFIED], Sizes(), shares_prefixes=False)
    SimulatedSystem(config, steps(), Sizes().num_blocks, 500.0, TPOT_MS).serve(requests)
    learnt = [request for request in requests if request.arrival > 2]
    assert max(request.tpot_ms for request in learnt) < 1.02 * TPOT_MS


@pytest.mark.parametrize("roles", [("unified",) * 2, ("prefill", "prefill", "decode")])
@pytest.mark.parametrize("gap_s", [0.0, 0.02])
def test_prompts_that_begin_alike_go_where_their_beginning_is_computed(roles: tuple[str, ...], gap_s: float) -> None:
    """Bursts of requests about one document each: it is computed once, and the other instance has the next one."""
    requests = [
        SimulatedRequest(burst / 100 + gap_s * number, 6144 + 200, 4, (*range(100 * burst, 100 * burst + 12), 9**9 + n))
        for burst in range(2)
        for number, n in enumerate(range(8 * burst, 8 * burst + 8))
    ]
    requests.sort(key=lambda request: request.arrival)
    config = make_config([InstanceRole(role) for role in roles], Sizes(placement="prefix_aware"))
    system = SimulatedSystem(config, steps(), Sizes().num_blocks, TTFT_MS, TPOT_MS)
    system.serve(requests)
    computed = sum(request.prompt_tokens - request.cached_tokens for request in requests)
    assert computed == pytest.approx(2 * 6144 + 16 * 200, rel=0.05)
    steps_of = [instance.work.busy_s for instance in system.core.instances.prefilling]
    assert min(steps_of) > 0.3 * max(steps_of)


@pytest.mark.parametrize("roles", [("unified",), ("prefill", "decode")])
def test_best_effort_fills_what_targeted_requests_leave(roles: tuple[str, ...]) -> None:
    """A backlog of best-effort work makes at most 1 % more requests miss their targets, and gets on meanwhile."""
    ends: dict[int, float] = {}
    median_ms: dict[int, float] = {}
    for num_batch in (0, 40):
        requests = poisson(14.0, 4.0, (500, 1500), (30, 120), seed=3)
        batch = [SimulatedRequest(number / 1000, 1000, 100, is_batch=True) for number in range(num_batch)]
        everything = sorted([*requests, *batch], key=lambda request: request.arrival)
        config = make_config([InstanceRole(role) for role in roles], Sizes(max_num_seqs=64), shares_prefixes=False)
        system = SimulatedSystem(config, steps(), Sizes().num_blocks, TTFT_MS, TPOT_MS)
        system.serve(everything)
        ends[num_batch] = sum(r.ttft_ms <= TTFT_MS and r.tpot_ms <= TPOT_MS for r in requests) / len(requests)
        median_ms[num_batch] = statistics.median(request.ttft_ms for request in requests)
        for request in batch:
            assert request.completion_time is not None
        early = [r for r in batch if r.completion_time is not None and r.completion_time < requests[-1].arrival]
        assert len(early) >= num_batch // 4
    assert median_ms[40] < median_ms[0] + 0.03 * TTFT_MS
    assert ends[40] >= ends[0] - 0.01
    assert ends[0] > 0.9


def test_a_change_of_roles_makes_no_gap_longer() -> None:
    """Streams decode on two instances while prompts arrive. The roles change 24 times, or never."""
    apart, together = (InstanceRole.PREFILL, InstanceRole.DECODE), (InstanceRole.UNIFIED,) * 2
    longest_s = {}
    for changes in (False, True):
        world = SimulatedSystem(
            make_config(together, Sizes(max_chunk_prefill_tokens=512), shares_prefixes=False),
            steps(),
            Sizes().num_blocks,
        )
        token_times: dict[str, list[float]] = {}
        world.on_outputs = partial(note_tokens, world, token_times)
        for number in range(24) if changes else ():
            roles = zip(world.devices, together if number % 2 else apart, strict=True)
            orders = [FromClient(b"", SetRole(number, name, role, deadline_s=60.0)) for name, role in roles]
            for order in orders:
                world.clock.at(2.0 + 0.2503 * number, partial(world.post, order))
        streams = [SimulatedRequest(0.02 * number, 512, 2000) for number in range(24)]
        world.serve(sorted([*streams, *poisson(8.0, 7.0, (512, 512), (200, 200), 1, 1.0)], key=lambda r: r.arrival))
        gaps_s = [b - a for times in token_times.values() for a, b in pairwise(times) if 2.0 < b < 8.0]
        longest_s[changes] = max(gaps_s)
    assert longest_s[True] < 1.02 * longest_s[False]


def note_tokens(world: SimulatedSystem, token_times: dict[str, list[float]], batch: OutputBatch) -> None:
    for output in batch.outputs:
        token_times.setdefault(output.request_id, []).extend([world.clock.now] * len(output.token_ids))
