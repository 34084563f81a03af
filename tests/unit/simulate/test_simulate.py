"""The simulator: exact where it can be computed by hand, conserving, and its command line."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hbserve.bench.request_batch import LengthRange
from hbserve.bench.request_record import RequestTargets
from hbserve.bench.serve_workload import WorkloadSource
from hbserve.config import InstanceRole
from hbserve.errors import ConfigError
from hbserve.messages.worker import InstanceCommand, StepPlan
from hbserve.policy.profile_file import profiled_predictor
from hbserve.policy.step_time_predictor import StepWork, num_pairs
from hbserve.simulate import __main__ as command
from hbserve.simulate.clock import Progress, SimulatedClock
from hbserve.simulate.config import BLOCK_SIZE, Sizes, make_config
from hbserve.simulate.device import DECODE_SLOWDOWN, PLAN_DELAY_S, PROMPT_SLOWDOWN, RESULT_DELAY_S
from hbserve.simulate.planning import plan
from hbserve.simulate.requests import SimulatedRequest, requests_of
from hbserve.simulate.systems import Setting, System, find_highest_rate, simulate
from hbserve.simulate.world import REQUEST_DELAY_S, TOKEN_DELAY_S, SimulatedSystem
from hbserve.slo.constraints import SLOConstraints, SMAllocation
from tests.support.simulated_load import poisson, shared_gpu

STEPS = profiled_predictor()
TRAVEL_MS = 1000 * (REQUEST_DELAY_S + PLAN_DELAY_S + RESULT_DELAY_S + TOKEN_DELAY_S)
SIZES = Sizes(max_chunk_prefill_tokens=2048)
SETTING = Setting(STEPS, STEPS, SIZES, RequestTargets(ttft_ms=400, tpot_ms=25))


def prompt_ms(tokens: int, percentage: int) -> float:
    return 1000 * PROMPT_SLOWDOWN * STEPS.at(percentage).seconds(StepWork(0, 0, tokens, num_pairs(tokens, 0)))


def decode_ms(context: int, percentage: int) -> float:
    return 1000 * DECODE_SLOWDOWN * STEPS.at(percentage).seconds(StepWork(1, context))


def test_work_takes_longer_while_it_is_slowed_down() -> None:
    clock, ends = SimulatedClock(), []
    progress = Progress(clock, 10.0, lambda: ends.append(clock.now))
    clock.at(4.0, lambda: progress.set_speed(0.5))
    clock.at(8.0, lambda: progress.set_speed(1.0))
    clock.run()
    assert ends == [12.0]  # 4 + 2 of the work in 8 seconds, 4 more


def unified(sizes: Sizes = SIZES) -> SimulatedSystem:
    return SimulatedSystem(make_config([InstanceRole.UNIFIED], sizes), STEPS, sizes.num_blocks)


def test_a_lone_request_takes_what_its_steps_and_plans_take() -> None:
    for system in (unified(), shared_gpu(SMAllocation(30, 20), STEPS, SIZES)[0]):
        request = SimulatedRequest(1.0, 2048, 11)
        system.serve([request])
        assert request.ttft_ms == pytest.approx(prompt_ms(2048, 100) + TRAVEL_MS)
        assert request.tpot_ms == pytest.approx(decode_ms(2048 + 6, 100), rel=0.06)


def test_a_prompt_is_in_the_first_step_that_is_planned_after_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    system = unified()
    plans: list[tuple[float, set[int]]] = []
    [worker] = system.devices["unified-0"].workers
    on_command = worker.on_command

    def note(message: InstanceCommand) -> None:
        if isinstance(message, StepPlan):
            new = {state.num_prompt_tokens for state in message.new_sequences}
            plans.append((system.clock.now, new))
        on_command(message)

    monkeypatch.setattr(worker, "on_command", note)
    streams = [SimulatedRequest(0.001 * number, 100 + number, 300) for number in range(48)]
    comers = [SimulatedRequest(1.0 + 0.0877 * number, 1000 + number, 20) for number in range(20)]
    system.serve([*streams, *comers])
    for request in comers:
        new = next(new for planned_at, new in plans if planned_at >= request.arrival + REQUEST_DELAY_S)
        assert request.prompt_tokens in new


def test_right_guesses_save_time_in_every_mode() -> None:
    for roles in ([InstanceRole.UNIFIED], [InstanceRole.PREFILL, InstanceRole.DECODE]):
        times = []
        for acceptance in (None, 0.8):
            request = SimulatedRequest(0.0, 1024, 200)
            system = SimulatedSystem(make_config(roles, SIZES), STEPS, SIZES.num_blocks, acceptance=acceptance)
            system.serve([request])
            times.append(request.tpot_ms)
        assert times[1] < 0.6 * times[0]


def test_without_a_ladder_the_share_stays_where_the_other_phase_is_idle() -> None:
    system, _ = shared_gpu(SMAllocation(50, 40), STEPS, SIZES, levels=())
    request = SimulatedRequest(0.0, 2048, 11)
    system.serve([request])
    assert request.ttft_ms == pytest.approx(prompt_ms(2048, 50) + TRAVEL_MS)
    assert request.tpot_ms == pytest.approx(decode_ms(2048 + 6, 40), rel=0.06)


def test_side_by_side_both_are_slowed_down_as_measured() -> None:
    system, _ = shared_gpu(SMAllocation(80, 50), STEPS, SIZES)
    first, second = SimulatedRequest(0.0, 64, 300), SimulatedRequest(0.5, 2048, 1)
    system.serve([first, second])
    slowdown = STEPS.slowdown(80, 50, decode_ms(0, 50) / 1000, 2048)
    assert second.ttft_ms == pytest.approx(prompt_ms(2048, 80) * slowdown.prefill + TRAVEL_MS, rel=0.05)


def test_a_shared_prefix_is_computed_once() -> None:
    requests = [SimulatedRequest(time, 2048, 2, prefix_blocks=(1, 2, 3, 4)) for time in (0.0, 5.0)]
    unified().serve(requests)
    assert [request.cached_tokens for request in requests] == [0, 2048 - BLOCK_SIZE]
    assert requests[1].ttft_ms < requests[0].ttft_ms / 4
    others = [SimulatedRequest(time, 2048, 2) for time in (0.0, 5.0)]
    unified().serve(others)
    assert [request.cached_tokens for request in others] == [0, 0]  # prompts without names are all different


def test_a_tier_in_the_hosts_memory_keeps_what_the_pool_forgets() -> None:
    sizes = Sizes(kv_tokens=20_000, host_tokens=100_000)
    system = SimulatedSystem(
        make_config([InstanceRole.UNIFIED], sizes), STEPS, sizes.num_blocks, num_host_blocks=sizes.num_host_blocks
    )
    prompt = tuple(range(1, 33))
    requests = [SimulatedRequest(time, 16384, 2, prefix_blocks=prompt) for time in (0.0, 10.0)]
    requests.insert(1, SimulatedRequest(5.0, 16384, 2))  # evicts it
    system.serve(requests)
    assert [request.cached_tokens for request in requests[:2]] == [0, 0]
    assert requests[2].cached_tokens > 14_000  # the beginning may be computed while the end is loaded
    assert requests[2].ttft_ms < requests[0].ttft_ms / 5
    host = system.tier_stats["host"]
    assert host["loaded_blocks"] > 150
    assert host["stored_blocks"] >= 2 * 16384 // BLOCK_SIZE


def test_a_tier_that_is_slower_than_the_device_delays_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes again, the pool is full, and the tier stores a fifth of what is computed."""
    monkeypatch.setattr("hbserve.simulate.tiers._COPY_BYTES_PER_S", 1e9)
    means, slow = [], Sizes(kv_tokens=60_000, host_tokens=1_000_000)
    for num_host_blocks in (0, slow.num_host_blocks):
        config = make_config([InstanceRole.UNIFIED], slow)
        system = SimulatedSystem(config, STEPS, slow.num_blocks, num_host_blocks=num_host_blocks)
        requests = poisson(4.0, 12.0, (2000, 12000), (1, 200), seed=4)
        system.serve(requests)
        means.append(sum(request.ttft_ms for request in requests) / len(requests))
    assert means[0] > 500  # requests wait for the pool
    assert means[1] == pytest.approx(means[0], rel=0.02)
    assert system.tier_stats["host"]["skipped_blocks"] > system.tier_stats["host"]["stored_blocks"]


def test_kv_arrives_at_the_decode_gpu_after_the_prompt() -> None:
    roles = [InstanceRole.PREFILL, InstanceRole.DECODE]
    system = SimulatedSystem(make_config(roles, SIZES), STEPS, SIZES.num_blocks)
    request = SimulatedRequest(0.0, 2048, 11)
    system.serve([request])
    assert request.ttft_ms == pytest.approx(prompt_ms(2048, 100) + TRAVEL_MS)
    assert request.tpot_ms > decode_ms(2048 + 6, 100)
    assert request.tpot_ms < 1.1 * decode_ms(2048 + 6, 100)


def test_a_default_target_grows_with_the_prompt() -> None:
    config = make_config([InstanceRole.UNIFIED], SIZES)
    targets = msgspec.structs.replace(config.scheduler, ttft_ms=50.0, ttft_ms_per_1k_tokens=100.0)
    for scheduler, expected in ((config.scheduler, [None, None]), (targets, [70.0, 250.0])):
        system = SimulatedSystem(msgspec.structs.replace(config, scheduler=scheduler), STEPS, SIZES.num_blocks)
        system.serve([SimulatedRequest(0.0, 200, 1), SimulatedRequest(1.0, 2000, 1)])
        assert [request.ttft_target_ms for request in system.core.metrics.collector.history] == expected


@pytest.mark.parametrize("placement", ["least_loaded", "prefix_aware"])
def test_alike_gpus_share_a_light_load(placement: Literal["least_loaded", "prefix_aware"]) -> None:
    config = make_config([InstanceRole.UNIFIED] * 4, SIZES)
    performance = msgspec.structs.replace(config.performance, placement=placement)
    config = msgspec.structs.replace(config, performance=performance)
    system = SimulatedSystem(config, STEPS, SIZES.num_blocks)
    requests = [SimulatedRequest(0.1 * number, 100, 400) for number in range(8)]
    numbers: list[int] = []
    instances = system.core.instances.values()
    system.clock.at(0.9, lambda: numbers.extend(instance.num_sequences for instance in instances))
    system.serve(requests)
    assert numbers == [2, 2, 2, 2]  # although no prompt waits when a request comes


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.integers(1, 40), st.integers(1, 64), st.integers(3500, 20000), st.integers(0, 4))
def test_every_request_ends_and_every_block_comes_back(rate: int, slots: int, kv_tokens: int, kind: int) -> None:
    sizes = Sizes(max_num_seqs=slots, kv_tokens=kv_tokens)
    requests = poisson(rate, 3, (1, 3000), (1, 40), seed=rate)
    if kind == 0:
        system = unified(sizes)
    elif kind == 1:
        roles = [InstanceRole.PREFILL] * 2 + [InstanceRole.DECODE] * 2
        system = SimulatedSystem(make_config(roles, sizes), STEPS, sizes.num_blocks)
    else:
        slo = SLOConstraints(ttft_target_ms=400, tpot_target_ms=30)
        levels = (100,) if kind == 2 else ()
        system, rotation = shared_gpu(SMAllocation(60, 40, mixed=kind == 4), STEPS, sizes, slo, levels=levels)
        for flip in range(8 if kind == 4 else 0):  # mixed and side by side again, while it serves
            split = SMAllocation(60, 40 + 10 * (flip % 3), mixed=bool(flip % 2))
            system.clock.at(0.4 * flip, partial(rotation.change, split))
    system.serve(requests)
    for request in requests:
        assert request.first_token_time is not None
        assert request.completion_time is not None
        assert request.arrival < request.first_token_time <= request.completion_time
    for instance in system.core.instances.values():
        assert instance.pool.num_free_blocks == sizes.num_blocks
        assert not instance.num_sequences


def source(duration_s: float, num_requests: int | None = None) -> WorkloadSource:
    return WorkloadSource(
        vocab_size=1000,
        duration_s=duration_s,
        num_requests=num_requests,
        input_len=LengthRange(300, 2500),
        output_len=LengthRange(50, 200),
    )


def test_a_run_is_the_same_each_time() -> None:
    loads = [poisson(10, 8, (300, 2500), (50, 200), seed=5) for _ in range(2)]
    first, second = (simulate(System.parse("slo@70-30"), SETTING, load) for load in loads)
    assert first == second


def test_the_highest_rate_of_two_replicas_is_more_than_that_of_one() -> None:
    one, two = (
        find_highest_rate(System.parse(name), SETTING, source(3), 1, precision=0.2) for name in ("unified", "unified*2")
    )
    assert one is not None
    assert two is not None
    assert two.rate > 1.5 * one.rate
    assert one.attainment >= 0.9


@pytest.mark.slow
def test_a_plan_keeps_the_targets_and_begins_with_the_cheapest() -> None:
    systems = [System.parse("semi_pd@100-100"), System.parse("2p1d")]
    found = plan(systems, SETTING, source(8, 150), 1, 40.0)
    assert [system.num_gpus for system, _ in found] == sorted(system.num_gpus for system, _ in found)
    assert len(found) == 2
    assert all(outcome.attainment >= 0.9 for _, outcome in found)


@pytest.mark.slow
def test_a_plan_finds_the_ratio_of_prefill_to_decode() -> None:
    even, best = (plan([System.parse(name)], SETTING, source(5, 150), 1, 60.0)[0] for name in ("1p1d", "xpyd"))
    assert best[1].attainment >= 0.9
    assert best[0].num_gpus < even[0].num_gpus
    for fewer in ((best[0].num_prefill - 1, best[0].num_decode), (best[0].num_prefill, best[0].num_decode - 1)):
        if all(fewer):
            smaller = simulate(
                System.parse("{}p{}d".format(*fewer)), SETTING, requests_of(source(5, 150).workload(60.0, 1))
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


def test_the_command_line_compares_with_a_tier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.json"
    lines = [
        {
            "timestamp": 2000 * n,
            "input_length": 8192,
            "output_length": 2,
            "hash_ids": [*range(16 * (n % 2), 16 * (n % 2) + 16)],
        }
        for n in range(4)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    goal = ["--goodput", "ttft:400,tpot:25", "--system", "unified", "--kv-tokens", "9000", "--host-tokens", "50000"]
    assert command.main([*goal, "--trace", str(trace), "--json", str(out)]) == 0
    without, with_tier = json.loads(out.read_text())
    assert (without["system"], with_tier["system"]) == ("unified", "unified+host")
    assert without["cached_share"] < 0.1 < 0.4 < with_tier["cached_share"]
    assert (without["loaded_bytes"], without["stored_bytes"]) == (0, 0)
    assert 0 < with_tier["loaded_bytes"] <= with_tier["stored_bytes"]
    assert "loaded" in capsys.readouterr().out
    plan_out = tmp_path / "plan.json"
    arguments = [*goal, "--trace", str(trace), "--plan", "0.4", "--json", str(plan_out)]
    assert command.main(arguments) == 0
    assert {outcome["system"] for outcome in json.loads(plan_out.read_text())} == {"unified*1", "unified*1+host"}


def test_the_command_line_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, complaint in ((["ttft:400"], "needs ttft and tpot"), (["ttft:4,tpot:2", "--system", "xpyd"], "--plan")):
        monkeypatch.setattr("sys.argv", ["hbserve", "--rate", "4", "--goodput", *wrong])
        assert command.main() == 1
        assert complaint in capsys.readouterr().err
    load = ["--rate", "4", "--num-requests", "1", "--goodput", "ttft:400,tpot:40", "--system", "unified"]
    assert command.main(load) == 1
    assert "all requests come at once" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main([*load, "--seed", "-1"])
    assert "'-1' is not a whole number from 0 to 2^32 - 1" in capsys.readouterr().err
