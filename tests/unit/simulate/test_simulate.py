"""The simulator: exact where it can be computed by hand, conserving, and its command line."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbserve.bench.request_batch import LengthRange
from hbserve.bench.request_record import RequestTargets
from hbserve.bench.serve_workload import WorkloadSource
from hbserve.errors import ConfigError
from hbserve.policy.profile_file import profiled_predictor
from hbserve.policy.step_time_predictor import StepWork, num_pairs
from hbserve.simulate import __main__ as command
from hbserve.simulate.clock import Progress, SimulatedClock
from hbserve.simulate.prompts import PrefixCache, Sizes
from hbserve.simulate.requests import SimulatedRequest, requests_of
from hbserve.simulate.systems import Setting, System, find_highest_rate, plan, simulate
from hbserve.simulate.units import DisaggregatedUnit, SemiPDUnit, UnifiedUnit, Unit, serve
from hbserve.slo.constraints import SMAllocation
from tests.support.simulated_load import poisson

STEPS = profiled_predictor()
SIZES = Sizes(chunk_size=2048)
SETTING = Setting(STEPS, STEPS, SIZES, RequestTargets(ttft_ms=400, tpot_ms=25))


def prompt_ms(tokens: int, percentage: int) -> float:
    return 1000 * STEPS.at(percentage).seconds(StepWork(0, 0, tokens, num_pairs(tokens, 0)))


def decode_ms(context: int, percentage: int) -> float:
    return 1000 * STEPS.at(percentage).seconds(StepWork(1, context))


def test_work_takes_longer_while_it_is_slowed_down() -> None:
    clock, ends = SimulatedClock(), []
    progress = Progress(clock, 10.0, lambda: ends.append(clock.now))
    clock.at(4.0, lambda: progress.set_speed(0.5))
    clock.at(8.0, lambda: progress.set_speed(1.0))
    clock.run()
    assert ends == [12.0]  # 4 + 2 of the work in 8 seconds, 4 more


def test_a_lone_request_takes_what_its_steps_take() -> None:
    for unit_of in (UnifiedUnit, lambda *rest: SemiPDUnit(*rest, SMAllocation(30, 20))):
        clock = SimulatedClock()
        request = SimulatedRequest(1.0, 2048, 11)
        serve(clock, [unit_of(clock, STEPS, SIZES)], [request])
        assert request.ttft_ms == pytest.approx(prompt_ms(2048, 100))
        assert request.tpot_ms == pytest.approx(decode_ms(2048 + 6, 100), rel=0.001)


def test_without_a_ladder_the_share_stays_where_the_other_phase_is_idle() -> None:
    clock = SimulatedClock()
    request = SimulatedRequest(0.0, 2048, 11)
    serve(clock, [SemiPDUnit(clock, STEPS, SIZES, SMAllocation(50, 40), None)], [request])
    assert request.ttft_ms == pytest.approx(prompt_ms(2048, 50))
    assert request.tpot_ms == pytest.approx(decode_ms(2048 + 6, 40), rel=0.001)


def test_side_by_side_both_are_slowed_down_as_measured() -> None:
    clock = SimulatedClock()
    unit = SemiPDUnit(clock, STEPS, SIZES, SMAllocation(80, 50))
    first, second = SimulatedRequest(0.0, 64, 5000), SimulatedRequest(1.0, 2048, 1)
    serve(clock, [unit], [first, second])
    slowdown = STEPS.slowdown(80, 50, decode_ms(0, 50) / 1000, 2048)
    assert second.ttft_ms == pytest.approx(prompt_ms(2048, 80) * slowdown.prefill, rel=0.01)


def test_a_shared_prefix_is_computed_once() -> None:
    clock = SimulatedClock()
    requests = [SimulatedRequest(time, 2048, 2, prefix_blocks=(1, 2, 3, 4)) for time in (0.0, 5.0)]
    serve(clock, [UnifiedUnit(clock, STEPS, SIZES)], requests)
    assert [request.cached_tokens for request in requests] == [0, 2047]
    assert requests[1].ttft_ms < requests[0].ttft_ms / 4
    cache = PrefixCache(1024)
    cache.insert(requests[0])
    assert cache.match(requests[0]) == 0  # the first blocks have gone


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 64), st.integers(1000, 20000), st.integers(0, 4))
def test_every_request_ends_and_every_place_comes_back(rate: int, seats: int, kv_tokens: int, kind: int) -> None:
    clock = SimulatedClock()
    sizes = Sizes(max_num_seqs=seats, kv_tokens=kv_tokens)
    unit: Unit = [
        lambda: UnifiedUnit(clock, STEPS, sizes),
        lambda: SemiPDUnit(clock, STEPS, sizes, SMAllocation(60, 40)),
        lambda: SemiPDUnit(clock, STEPS, sizes, SMAllocation(60, 40), None),
        lambda: DisaggregatedUnit(clock, STEPS, sizes, num_prefill=2, num_decode=2),
        lambda: SemiPDUnit(clock, STEPS, sizes, SMAllocation(60, 40, mixed=True), decode_interval_s=0.03),
    ][kind]()
    if kind == 4:
        assert isinstance(unit, SemiPDUnit)
        for flip in range(25):  # mixed and parted again, while it serves
            clock.at(0.4 * flip, partial(setattr, unit, "allocation", SMAllocation(60, 40, mixed=bool(flip % 2))))
    requests = poisson(rate, 10, (1, 3000), (1, 60), seed=rate)
    serve(clock, [unit], requests)
    assert all(request.completion_time is not None for request in requests)
    assert all(request.computed_tokens == request.prompt_tokens for request in requests)
    assert unit._num_open == unit._kv_tokens == unit.num_decoding == unit.load_tokens == 0
    assert unit.metrics.open_requests == {}
    for request in requests:
        assert request.first_token_time is not None
        assert request.arrival < request.first_token_time <= request.completion_time


def source(duration_s: float) -> WorkloadSource:
    lengths = {"input_len": LengthRange(300, 2500), "output_len": LengthRange(50, 400)}
    return WorkloadSource(vocab_size=1000, duration_s=duration_s, **lengths)


def test_a_run_is_the_same_each_time() -> None:
    loads = [poisson(10, 20, (300, 2500), (50, 400), seed=5) for _ in range(2)]
    first, second = (simulate(System.parse("slo@70-30"), SETTING, load) for load in loads)
    assert first == second


def test_the_highest_rate_of_two_replicas_is_more_than_that_of_one() -> None:
    one, two = (
        find_highest_rate(System.parse(name), SETTING, source(20), 1, precision=0.1) for name in ("1p1d", "1p1d*2")
    )
    assert one is not None
    assert two is not None
    assert two.rate > 1.5 * one.rate
    assert one.attainment >= 0.9


@pytest.mark.slow
def test_a_plan_keeps_the_targets_and_begins_with_the_cheapest() -> None:
    systems = [System.parse("semi_pd@100-100"), System.parse("2p1d")]
    found = plan(systems, SETTING, source(20), 1, 40.0)
    assert [system.num_gpus for system, _ in found] == sorted(system.num_gpus for system, _ in found)
    assert len(found) == 2
    assert all(outcome.attainment >= 0.9 for _, outcome in found)


@pytest.mark.slow
def test_a_plan_finds_the_ratio_of_prefill_to_decode() -> None:
    even, best = (plan([System.parse(name)], SETTING, source(5), 1, 120.0)[0] for name in ("1p1d", "xpyd"))
    assert best[1].attainment >= 0.9
    assert best[0].num_gpus < even[0].num_gpus
    for fewer in ((best[0].num_prefill - 1, best[0].num_decode), (best[0].num_prefill, best[0].num_decode - 1)):
        if all(fewer):
            smaller = simulate(
                System.parse("{}p{}d".format(*fewer)), SETTING, requests_of(source(5).workload(120.0, 1))
            )
            assert smaller.attainment < 0.9


def test_no_plan_keeps_what_a_lone_request_misses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["hbserve", "--goodput", "ttft:4,tpot:1", "--plan", "5", "--duration", "5"])
    assert command.main() == 1  # it does not go on to look at lower and lower rates
    assert "none of the systems" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["semi_pd", "unified@", "0p1d", "slo@80", "slo@80-50*0", "other"])
def test_an_unknown_system_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="none of"):
        System.parse(text)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    arguments = ["--goodput", "ttft:400,tpot:25", "--rate", "4", "--duration", "5", "--json", str(out)]
    monkeypatch.setattr("sys.argv", ["hbserve", *arguments])
    assert command.main() == 0
    outcomes = json.loads(out.read_text())
    assert len(outcomes) == 6
    assert all(outcome["attainment"] == 1 for outcome in outcomes)
    assert "semi_pd@80-50" in capsys.readouterr().out


def test_the_command_line_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, complaint in ((["ttft:400"], "needs ttft and tpot"), (["ttft:4,tpot:2", "--system", "xpyd"], "--plan")):
        monkeypatch.setattr("sys.argv", ["hbserve", "--rate", "4", "--goodput", *wrong])
        assert command.main() == 1
        assert complaint in capsys.readouterr().err
