"""The order of prompts, and the refusal of requests under overload."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Sequence as Items
from contextlib import aclosing
from typing import Literal

import pytest

from hbserve import DisaggregatedLLM, PdDisaggConfig, SamplingParams
from hbserve.config import SchedulerConfig, from_dict
from hbserve.errors import InvalidRequestError, OverloadedError
from hbserve.messages.client import AddRequest
from hbserve.policy.queue_policy import OVERDUE_TARGETS, SAFETY_FACTOR, QueuePolicy, make_policy
from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork
from hbserve.scheduler.instance import Instances
from hbserve.scheduler.queue.waiting_queue import WaitingQueue
from hbserve.scheduler.sequence import Sequence
from tests.support.engines import assert_no_leaks
from tests.support.paths import ROOT
from tests.support.scheduler_parts import SchedulerParts

DEMO = str(ROOT / "examples" / "models" / "hbserve-demo")
DEADLINE_S = 60.0
arrivals = itertools.count(1)


def waiting(
    policy: QueuePolicy,
    arrival_time: float,
    length: int,
    ttft_ms: float | None = None,
    priority: Literal["batch"] | None = None,
) -> Sequence:
    """A request that has just arrived, with this TTFT target."""
    request = AddRequest(
        request_id="r",
        prompt_token_ids=[1] * length,
        end_token_ids=[],
        sampling=SamplingParams(ttft_ms=ttft_ms, priority=priority),
    )
    sequence = Sequence(b"", request, next(arrivals), [1] * length, frozenset(), 1000, arrival_time=arrival_time)
    policy.on_waiting(sequence)
    sequence.rank = policy.rank(sequence)
    return sequence


def predictor(s_per_token: float) -> StepTimePredictor:
    """A predictor that has seen prompts, in steps that are too short to matter."""
    known = StepTimePredictor()
    known.observe(StepWork(0, 0, 1e-3, 0.0), 1e-3 * s_per_token)
    return known


def policy(name: str, prefill_s_per_token: float = 0.01, **settings: float | bool) -> QueuePolicy:
    config = SchedulerConfig(policy=name, **settings)  # type: ignore[arg-type]
    return make_policy(config, predictor(prefill_s_per_token / SAFETY_FACTOR))


def served(
    policy: QueuePolicy, sequences: list[Sequence], now: float, admitted: Items[tuple[Sequence, int]] = ()
) -> list[int]:
    """The order, as indices; ``admitted`` have an allocation and that many tokens computed."""
    queue = sorted(sequences, key=lambda sequence: sequence.rank)
    return [sequences.index(sequence) for sequence in policy.order(queue, now, lambda: (admitted, 1))]


def test_fcfs_is_by_arrival_alone() -> None:
    fcfs = policy("fcfs")
    requests = [waiting(fcfs, 0.0, 500, 1.0), waiting(fcfs, 1.0, 5), waiting(fcfs, 2.0, 50, 1e6)]
    assert served(fcfs, requests, 100.0) == [0, 1, 2]


def test_short_prompts_pass_long_ones_but_not_for_ever() -> None:
    shortest = policy("shortest_prompt_first", ageing_tokens_per_s=100.0)
    long = waiting(shortest, 0.0, 900)
    short = [waiting(shortest, float(second), 50) for second in range(12)]
    order = served(shortest, [long, *short], 12.0)
    assert order.index(0) == 9  # passed by those that arrived in the first 8.5 seconds


def test_where_targets_are_a_guess_short_prompts_pass_long_ones_and_none_is_given_up() -> None:
    guess = {"ttft_ms": 100.0, "ttft_ms_per_1k_tokens": 200.0, "targets_are_soft": True}
    soft = policy("slo_aware", prefill_s_per_token=1e-3, **guess)
    slow = waiting(soft, 0.0, 3000)
    assert served(soft, [slow], 0.0) == [0]  # it takes 3 s; others may wait for three quarters of that
    late = 50.0  # all are far beyond 100 ms and are not given up
    long, short, batch = waiting(soft, late, 900), waiting(soft, late, 100), waiting(soft, late, 1, priority="batch")
    assert served(soft, [batch, long, short], late) == [2, 1, 0]
    begun = [(long, 400), (waiting(soft, late, 600), 0)]  # with an allocation, they count with what is left
    assert served(soft, [short], late, begun) == [0]
    keys = [soft.key(sequence, start, late) for sequence, start in [(short, 0), *begun]]
    assert keys == sorted(keys)
    late = 90.0
    assert soft.has_missed_target(long, late)
    assert not soft.gives_way(long, late)
    assert soft.tightest_ttft_s == pytest.approx(0.12)  # of the shortest of them
    waiting(soft, 60.0, 10, 500.0)  # a request with a target of its own: the guesses count as targets beside it
    cached = waiting(soft, 60.0, 1000)
    assert cached.rank[1] == pytest.approx(60.3)  # due 0.1 s and 0.2 s for each 1000 tokens later


def test_what_is_cached_needs_no_time() -> None:
    slo = policy("slo_aware", ttft_ms=1500.0)
    requests = [waiting(slo, 0.0, 200), waiting(slo, 0.0, 200)]  # 2 s each
    requests[1].expected_cached_tokens = 150
    assert served(slo, requests, 0.0) == [1, 0]  # the first cannot be in time, the second can


def test_what_an_earlier_prompt_has_in_common_needs_time_once_and_only_if_that_one_is_computed() -> None:
    slo = policy("slo_aware", ttft_ms=1500.0)

    def in_time(first: Sequence, second: Sequence, num_alike_tokens: int) -> list[bool]:
        second.alike, second.num_alike_tokens = first, num_alike_tokens
        slo.order([first, second], 0.0, lambda: ((), 1))
        return [not slo.key(sequence, 0, 0.0)[0] for sequence in (first, second)]

    assert in_time(waiting(slo, 0.0, 100), waiting(slo, 0.0, 100), 0) == [True, False]  # 1 s each
    assert in_time(waiting(slo, 0.0, 100), waiting(slo, 0.0, 100), 90) == [True, True]
    assert in_time(waiting(slo, 0.0, 160), waiting(slo, 0.0, 160), 90) == [False, False]  # the first cannot be in time
    # To defer the first saves 0.1 s of its own, so the second is still too late.
    assert in_time(waiting(slo, 0.0, 130), waiting(slo, 0.0, 180), 120) == [True, False]


def test_a_prompt_is_computed_by_one_of_several_workers() -> None:
    """Two workers end the prompts before it twice as soon, but not its own."""
    slo = policy("slo_aware", ttft_ms=5000.0)
    first, second = waiting(slo, 0.0, 100, 3000.0), waiting(slo, 0.0, 250, 3100.0)  # 1 s and 2.5 s, due at 3 and 3.1
    for now, deferred in ((0.0, False), (0.2, True)):  # the second one begins half a second later
        slo.order([first, second], now, lambda: ((), 2))
        assert bool(slo.key(second, 0, now)[0]) is deferred


def test_the_earliest_deadline_first_and_the_hopeless_last() -> None:
    slo = policy("slo_aware", ttft_ms=5000.0)
    relaxed = waiting(slo, 0.0, 10, 9000.0)  # 0.1 s, due at 9
    long = waiting(slo, 1.0, 200, 7000.0)  # 2 s, due at 8
    default = waiting(slo, 2.0, 50)  # 0.5 s, due at 7
    hopeless = waiting(slo, 2.5, 100, 500.0)  # 1 s, due at 3
    resumed = waiting(slo, 3.0, 100, 500.0)
    resumed.first_token_time = 3.5
    resumed.rank = slo.rank(resumed)
    requests = [relaxed, long, default, hopeless, resumed]
    assert served(slo, requests, 4.0) == [4, 2, 1, 0, 3]
    soon = waiting(slo, 3.0, 100, 3500.0)  # 1 s, due at 6.5
    # The longest of those in time gives way, but not to the late one.
    assert served(slo, requests, 4.0, [(soon, 0)]) == [4, 2, 0, 1, 3]
    for computed, gives_way in (
        (0, True),
        (150, False),
    ):  # an admitted one gives way too, if most of it is still to compute
        assert served(slo, [default], 4.0, [(long, computed), (soon, 0), (resumed, 0)]) == [0]
        assert bool(slo.key(long, computed, 4.0)[0]) is gives_way
        assert not slo.key(soon, 0, 4.0)[0]
    keyed = sorted(requests, key=lambda sequence: slo.key(sequence, 0, 6.1))
    assert [requests.index(sequence) for sequence in keyed] == [4, 2, 0, 3, 1]
    assert not slo.key(long, 100, 6.1)[0], "half is done: it can be there at 7.1"
    assert [slo.has_missed_target(sequence, 4.0) for sequence in requests] == [False, False, False, True, False]


def test_without_targets_the_order_is_that_of_arrival() -> None:
    slo = policy("slo_aware")
    requests = [waiting(slo, float(second), length) for second, length in enumerate((9000, 1, 500, 20))]
    assert served(slo, requests, 1000.0) == [0, 1, 2, 3]
    assert sorted(requests, key=lambda sequence: slo.key(sequence, 0, 1000.0)) == requests
    assert not any(slo.gives_way(sequence, 1000.0) for sequence in requests)
    assert slo.tightest_ttft_s == math.inf


def test_overdue_prompts_have_a_share_in_the_order_of_their_deadlines() -> None:
    slo = policy("slo_aware", ttft_ms=1000.0)
    overdue = [waiting(slo, 0.1 * number, 100) for number in range(3)]  # 1 s each
    now, order = 0.1 + OVERDUE_TARGETS, []
    for _ in range(100):
        fresh = waiting(slo, now, 50)  # there is always one that can be in time
        first = slo.order(sorted([*overdue, fresh], key=lambda s: s.rank), now, lambda: ((), 1))[0]
        assert slo.key(first, 0, now) == min(slo.key(s, 0, now) for s in (*overdue, fresh))
        assert slo.gives_way(overdue[-1], now) or overdue[-1] is first
        slo.on_planned(first, len(first.tokens), 0, now)
        order.append(first)
        overdue = [sequence for sequence in overdue if sequence is not first]
        now += 0.5
        if not overdue:
            break
    places = [place for place, sequence in enumerate(order) if len(sequence.tokens) == 100]
    assert [order[place].arrival_time for place in places] == pytest.approx([0.0, 0.1, 0.2])
    # A prompt of 1 s is paid for by 10 s of others, in steps of 0.5 s.
    assert all(later - sooner <= 21 for sooner, later in itertools.pairwise([-1, *places]))
    assert max(later - sooner for sooner, later in itertools.pairwise(places)) >= 18


def test_best_effort_comes_last_and_has_no_targets() -> None:
    for name in ("slo_aware", "fcfs", "shortest_prompt_first"):
        order = policy(name, ttft_ms=1000.0) if name == "slo_aware" else policy(name)
        batch = waiting(order, 0.0, 1, priority="batch")
        other = waiting(order, 5.0, 90)
        assert served(order, [batch, other], 99.0) == [1, 0]
        assert order.key(other, 0, 99.0) < order.key(batch, 0, 99.0)
        assert order.gives_way(batch, 5.0)
        assert not order.gives_way(other, 5.0)
        assert not order.has_missed_target(batch, 99.0)
    with pytest.raises(InvalidRequestError, match=r"^ttft_ms cannot be combined with priority"):
        SamplingParams(priority="batch", ttft_ms=1.0)
    with pytest.raises(InvalidRequestError, match=r"^priority: .*'urgent'"):
        SamplingParams(priority="urgent")  # type: ignore[arg-type]


def test_no_order_keeps_more_deadlines() -> None:
    """Against every subset of small queues."""
    rng = random.Random(3)
    slo = policy("slo_aware")
    for _ in range(60):
        requests = [waiting(slo, 0.0, rng.randint(1, 300), rng.uniform(100, 8000)) for _ in range(7)]
        requests.sort(key=lambda sequence: sequence.rank)

        def num_in_time(order: Items[Sequence]) -> int:
            ends = itertools.accumulate(0.01 * len(sequence.tokens) for sequence in order)
            return sum(end <= sequence.rank[1] for end, sequence in zip(ends, order, strict=True))

        subsets = (itertools.combinations(requests, count) for count in range(8))
        best = max(len(subset) for subset in itertools.chain(*subsets) if num_in_time(subset) == len(subset))
        assert num_in_time(slo.order(requests, 0.0, lambda: ((), 1))) >= best


async def test_a_system_serves_by_deadline_and_counts_targets() -> None:
    config = PdDisaggConfig(
        DEMO, mode="unified", max_num_seqs=1, scheduling_policy="slo_aware", device="cpu", log_level="WARNING"
    )
    ended: list[str] = []
    async with asyncio.timeout(DEADLINE_S), DisaggregatedLLM(config) as llm:

        async def ask(name: str, length: int, ttft_ms: float) -> None:
            await llm.generate([5] * length, SamplingParams(max_tokens=4, ignore_eos=True, ttft_ms=ttft_ms))
            ended.append(name)

        async with aclosing(llm.stream([7], SamplingParams(max_tokens=None, ignore_eos=True))) as endless:
            await anext(endless)  # it has the only allocation
            asks = []
            for number, (name, length, target_s) in enumerate(
                [("300 s", 9, 300), ("hopeless", 9, 0.001), ("200 s", 9, 200), ("100 s", 90, 100)], start=1
            ):
                asks.append(asyncio.create_task(ask(name, length, 1000 * target_s)))
                while (await llm.client.stats())["cpu_scheduler"]["waiting_requests"] < number:
                    pass
        await asyncio.gather(*asks)
        assert [name for name in ended if name != "hopeless"] == ["100 s", "200 s", "300 s"]
        assert ended[0] != "hopeless", "once it is overdue it gets a share, but not the first one"
        window = (await llm.client.stats())["metrics"]["window"]
        assert (window["num_met"], window["num_missed"]) == (3, 1)
        await asyncio.to_thread(assert_no_leaks, llm)


def test_the_rate_of_freed_slots_counts_from_when_a_request_waits() -> None:
    queue = WaitingQueue(from_dict({"model": {"path": DEMO}}))
    instances = SchedulerParts().instances

    def predicted(now: float) -> float:
        one, another = waiting(queue.policy, now, 5), waiting(queue.policy, now, 5)
        queue.insert(one)
        predicted_s = queue.predicted_ttft_s(another, instances, slots_are_full=True, now=now)
        queue.remove(one)
        return predicted_s

    for begin in (0.0, 1000.0):  # no request waits in between
        queue.on_first_waiting(begin)
        assert predicted(begin + 0.5) == 0
        queue.on_request_ended(begin + 1)
        queue.on_request_ended(begin + 2)
        assert predicted(begin + 3) == 2 * 3 / 2


def test_a_prediction_is_no_arrival() -> None:
    """The limits of steps follow the targets of requests that have come, not of those that were only asked about."""
    queue = WaitingQueue(from_dict({"model": {"path": DEMO}}))
    asked = waiting(QueuePolicy(), 0.0, 5, ttft_ms=100)
    assert queue.predicted_ttft_s(asked, Instances(), slots_are_full=False, now=0.0) == 0
    assert queue.policy.tightest_ttft_s == math.inf
    queue.insert(asked)
    assert queue.policy.tightest_ttft_s == 0.1


async def test_overload_is_refused_early() -> None:
    config = PdDisaggConfig(DEMO, mode="unified", max_queue_s=1e-9, device="cpu", log_level="WARNING")
    async with asyncio.timeout(DEADLINE_S), DisaggregatedLLM(config) as llm:
        for _ in range(2):  # nothing is known yet, and no request is before the second: neither is refused
            await llm.generate([5] * 40, SamplingParams(max_tokens=2))
        asks = (llm.generate([token] * 4000, SamplingParams(max_tokens=2)) for token in (6, 7))
        first, second = await asyncio.gather(*asks, return_exceptions=True)
        assert not isinstance(first, BaseException)
        assert isinstance(second, OverloadedError)
        assert "max_queue_s" in str(second)
        assert 0 < second.retry_after_s < 60
        stats = await llm.client.stats()
        assert stats["cpu_scheduler"]["refused_requests"] == 1
        await asyncio.to_thread(assert_no_leaks, llm)
