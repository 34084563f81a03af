"""Semi-PD with real processes and real shared memory: rotation, ladder, kills; nothing lost, nothing left."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI

from hbserve import LLM, DisaggregatedLLM, PdDisaggConfig, SamplingParams
from hbserve.config import InstanceRole
from hbserve.errors import ConfigError, OverloadedError
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager, SMAllocation
from hbserve.semi_pd.semi_pd_coordinator import create_semi_pd_coordinator
from hbserve.server import errors, semi_pd_routes
from hbserve.server.prometheus import render
from hbserve.top import draw
from tests.support.engines import HAS_MOONCAKE, assert_no_leaks, random_prompt
from tests.support.model_zoo import save_head, save_model
from tests.support.paths import ROOT
from tests.support.store_process import running_store

DEADLINE_S = 120.0
NUM_REQUESTS = 100
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "num_blocks": 400,
    "max_model_len": 640,
    "max_num_seqs": 32,
    "chunk_size": 32,
    "max_chunk_prefill_tokens": 64,
    "log_level": "WARNING",
    "host_bytes": 64 << 20,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("glm4_moe")
    save_model(folder, "glm4_moe")
    return str(folder)


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts that share prefixes, and sampling of every kind that keeps state on a worker."""
    rng = random.Random(11)
    prefix = random_prompt(64, seed=999)
    prompts, sampling = [], []
    for index in range(NUM_REQUESTS):
        prompt = random_prompt(rng.randint(5, 120), seed=index)
        prompts.append(prefix + prompt if index % 4 == 0 else prompt)
        sampling.append(
            SamplingParams(
                temperature=0 if index % 3 == 0 else 0.9,
                seed=index,
                max_tokens=rng.randint(60, 110),
                ignore_eos=True,
                priority="batch" if index % 6 == 1 else None,
                repetition_penalty=1.3 if index % 5 == 0 else 1.0,
            )
        )
    return prompts, sampling


def with_predictions(sampling: list[SamplingParams], expected: list[list[int]]) -> list[SamplingParams]:
    """Let a third of the requests predict their outputs, each with some wrong tokens."""
    return [
        msgspec.structs.replace(one, prediction=[7 if place % 6 == 5 else token for place, token in enumerate(output)])
        if index % 3 == 2
        else one
        for index, (one, output) in enumerate(zip(sampling, expected, strict=True))
    ]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(what: Callable[[], Any], deadline_s: float = DEADLINE_S) -> Any:
    deadline = time.monotonic() + deadline_s
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return found


def arena_mappings() -> set[int]:
    """Processes that have one of our arenas mapped."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if "hbserve-arena" in maps.read_text():
                found.add(int(maps.parent.name))
        except OSError:
            continue
    return found


def pids_of(manager: ProcessRotationManager) -> set[int]:
    status = manager.get_status()
    resident = status["resident_manager"]["resident_process"]["pid"]
    return {resident, *(worker["pid"] for worker in status["workers"])}


@pytest.fixture(scope="module")
def expected(model: str) -> list[list[int]]:
    """What `unified` makes of the requests, without a KV tier."""
    with LLM(model, mode="unified", **(SETTINGS | {"host_bytes": 0})) as llm:
        return [output["token_ids"] for output in llm.generate(*requests(), use_tqdm=False)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Settings of a store, and of a host tier that is so small that the store is needed."""
    if not HAS_MOONCAKE:
        yield {}
        return
    with running_store(tmp_path) as process:
        yield {"store": process.settings, "host_bytes": 256 << 10}


def test_replicas_beside_a_disaggregated_pair(model: str, expected: list[list[int]]) -> None:
    instances = [
        {"instance_id": "shared-0", "instance_type": "semi_pd"},
        {"instance_id": "shared-1", "instance_type": "semi_pd"},
        {"instance_id": "prefill-0", "instance_type": "prefill"},
        {"instance_id": "decode-0", "instance_type": "decode"},
    ]
    ladder: dict[str, list[int]] = {"prefill": [], "decode": []}
    options = SETTINGS | {"gpu_instances": instances, "ladder": ladder, "num_sleepers": 0}
    drafting = {"speculation_method": "draft_model", "speculation_model": model}
    drafting |= {"scheduler": "tests.support.eager_drafts:EagerDrafts"}
    with LLM(model, mode="semi_pd", **options, **drafting) as llm:
        prompts, sampling = requests()
        outputs = llm.generate(prompts, with_predictions(sampling, expected), use_tqdm=False)
        assert [output["token_ids"] for output in outputs] == expected
        work = llm.get_system_stats()["gpu_instances"]
        assert all(work[name]["generated_tokens"] > 0 for name in work)
        assert llm.get_system_stats()["cpu_scheduler"]["speculation"]["draft_model"]["accepted_tokens"] > 0
        assert_no_leaks(llm)


async def test_rotations_and_kills_change_no_token(
    model: str, expected: list[list[int]], store: dict[str, Any], tmp_path: Path
) -> None:
    """100 seeded requests while the split rotates, phases are mixed and parted again, and processes are killed."""
    save_head(tmp_path / "head")
    prompts, sampling = requests()
    sampling = with_predictions(sampling, expected)
    config = PdDisaggConfig.from_arguments(
        model,
        mode="semi_pd",
        prefill_percentage=50,
        decode_percentage=60,
        ladder={"prefill": [], "decode": [100], "unified": [100]},
        max_restarts=100,
        tpot_target_ms=30.0,  # what a mixed step may take, and whether all take part in it
        scheduler="tests.support.dawdler:Dawdler",
        speculation_method="auto",
        speculation_model=str(tmp_path / "head"),
        **(SETTINGS | store),
    )
    # A request may be in the steps of each worker that is killed, without a token in between.
    frozen = config.freeze()
    patient = msgspec.structs.replace(frozen.kv_transfer, max_attempts=10)
    rng = random.Random(5)
    done = asyncio.Event()
    kills = {"worker": 0, "resident": 0}
    tokens: dict[str, int] = {}

    async with DisaggregatedLLM(msgspec.structs.replace(frozen, kv_transfer=patient)) as llm:
        manager = llm.supervisors["semi-0"]
        assert isinstance(manager, ProcessRotationManager)
        seen = pids_of(manager)

        def steps() -> int:
            stats = llm.get_system_stats()["gpu_instances"]["semi-0"]
            for worker in stats["workers"].values():
                tokens[worker["role"]] = max(tokens.get(worker["role"], 0), worker["generated_tokens"])
            return int(stats["steps"])

        async def after_steps(number: int) -> bool:
            """Wait until so many more steps are confirmed; False if the work ended before."""
            target = steps() + number
            while steps() < target and not done.is_set():  # noqa: ASYNC110 - steps of other processes have no event
                await asyncio.sleep(0.01)
            return not done.is_set()

        async def rotate() -> None:
            shares = 50, 60
            while not done.is_set():
                for mixed in (True, False, True):
                    assert manager.request_sm_reallocation(SMAllocation(*shares, mixed=mixed))
                    await asyncio.to_thread(manager.wait_until_settled, DEADLINE_S)
                    seen.update(pids_of(manager))
                    # Phases stay parted until a prefill worker has given a first token, however busy the machine is.
                    while await after_steps(4) and not (mixed or tokens.get("prefill")):
                        pass
                shares = rng.choice([40, 50, 70]), rng.choice([40, 60, 80])

        async def kill() -> None:
            while await after_steps(rng.randint(15, 30)):
                status = manager.get_status()
                if sum(kills.values()) == 3:
                    kills["resident"] += 1
                    os.kill(status["resident_manager"]["resident_process"]["pid"], signal.SIGKILL)
                    continue
                active = [worker for worker in status["workers"] if worker["state"] == "active"]
                if active and kills["worker"] < 4:
                    kills["worker"] += 1
                    os.kill(rng.choice(active)["pid"], signal.SIGKILL)

        chaos = [asyncio.create_task(rotate()), asyncio.create_task(kill())]
        outputs = await asyncio.wait_for(llm.generate(prompts, sampling), DEADLINE_S)
        done.set()
        await asyncio.wait_for(asyncio.gather(*chaos), DEADLINE_S)
        assert [output["token_ids"] for output in outputs] == expected
        assert kills["worker"] >= 3
        assert kills["resident"] == 1
        assert await asyncio.to_thread(manager.wait_until_settled, DEADLINE_S), str(manager.get_status())
        status = manager.get_status()
        assert status["statistics"]["rotations"] >= 1, str(status)
        assert status["statistics"]["recoveries"] == 1
        assert status["statistics"]["replaced_workers"] >= 1
        assert min(tokens[role] for role in ("prefill", "decode", "unified")) > 0, tokens
        await asyncio.to_thread(assert_no_leaks, llm)
        tiers = llm.get_system_stats()["kv_tiers"]
        assert all(tier["stored_blocks"] > 0 for tier in tiers.values()), tiers
        seen |= pids_of(manager)
    assert not any(is_running(pid) for pid in seen)
    assert not arena_mappings() & seen


def events_of(llm: LLM) -> list[dict[str, Any]]:
    """As the live page shows them, oldest first."""
    recent: list[dict[str, Any]] = llm._run(llm._llm.client.stats(recent=True))["recent"]["events"]
    return recent


def new_kinds(llm: LLM, before: dict[str, int]) -> dict[str, int]:
    """Numbers of the faults since ``before``, by kind."""
    usual = ("ready", "retired", "rotation")
    counts = llm.get_system_stats()["events"]
    return {kind: counts[kind] - before[kind] for kind in counts if counts[kind] > before[kind] and kind not in usual}


def workers_of(llm: LLM) -> list[dict[str, Any]]:
    """As the scheduler knows them."""
    return list(llm.get_system_stats()["gpu_instances"]["semi-0"]["workers"].values())


@pytest.fixture(scope="module")
def running(model: str) -> Iterator[LLM]:
    with LLM(
        model,
        mode="semi_pd",
        prefill_percentage=60,
        decode_percentage=40,
        ladder={"prefill": [100], "decode": [100], "unified": [100]},
        **SETTINGS,
    ) as llm:
        # One worker of each phase is enough to be ready; these tests want all of them.
        wait_for(lambda: sum(w["status"] == "ready" for w in workers_of(llm)) == 5)
        yield llm


def test_a_phase_that_is_alone_gets_its_largest_level(running: LLM) -> None:
    def tokens() -> dict[tuple[str, int], int]:
        return {(w["role"], w["percentage"]): w["generated_tokens"] for w in workers_of(running)}

    assert set(tokens()) == {("prefill", 60), ("prefill", 100), ("decode", 40), ("decode", 100), ("unified", 100)}
    alone = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    running.generate([1, 2, 3], alone, use_tqdm=False)
    levels = {("prefill", 60): 0, ("prefill", 100): 1, ("decode", 40): 0, ("decode", 100): 39, ("unified", 100): 0}
    assert tokens() == levels
    prompts = [random_prompt(200, seed=seed) for seed in range(20)]
    running.generate(prompts, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    assert tokens() == levels | {("prefill", 100): 21}  # no request decodes, not even while last chunks are in flight
    running.generate(prompts, alone, use_tqdm=False)
    assert tokens()["decode", 40] > 0  # while other prompts were computed
    assert tokens()["prefill", 60] > 0
    assert_no_leaks(running)


def test_a_split_between_warm_levels_costs_no_process(running: LLM) -> None:
    manager = running.supervisors["semi-0"]
    assert isinstance(manager, ProcessRotationManager)
    manager.request_sm_reallocation(SMAllocation(80, 40))
    assert manager.wait_until_settled(DEADLINE_S)
    before = pids_of(manager)
    assert manager.get_status()["warm_percentages"] == {"prefill": [80, 100], "decode": [40, 100], "unified": [100]}
    manager.request_sm_reallocation(SMAllocation(80, 100))
    assert manager.wait_until_settled(DEADLINE_S)
    assert manager.current_sm_allocation == SMAllocation(80, 100)
    assert pids_of(manager) < before  # the decode worker of 40 % has ended, and no process has started
    wait_for(lambda: sum(event["kind"] == "retired" for event in events_of(running)) == 2)
    run_dir = Path(running._llm._launcher.make_run_dir())
    assert len(list(run_dir.glob("0.*.sock"))) == len(manager.get_status()["workers"]), (
        "an ended worker left its socket"
    )
    for event in events_of(running):
        assert event["kind"] in ("ready", "retired", "rotation"), "a rotation is no fault"
        assert "connection" not in event["text"]


def test_a_preparation_that_fails_leaves_serving_as_it_is(running: LLM) -> None:
    manager = running.supervisors["semi-0"]
    assert isinstance(manager, ProcessRotationManager)
    before, split = pids_of(manager), manager.current_sm_allocation
    events = running.get_system_stats()["events"]
    manager.delayed_switching.preparation_timeout = 0.01
    try:
        manager.request_sm_reallocation(SMAllocation(33, 33))
        assert manager.wait_until_settled(DEADLINE_S)
    finally:
        manager.delayed_switching.preparation_timeout = 60.0
    status = manager.get_status()
    assert status["statistics"]["failed_rotations"] == 1
    wait_for(lambda: new_kinds(running, events))
    assert new_kinds(running, events) == {"rotation_failed": 1}
    assert "no rotation to (33, 33)" in events_of(running)[-1]["text"]
    assert "33" in status["last_error"]
    assert "in time" in status["last_error"] or "within" in status["last_error"]
    assert manager.current_sm_allocation == split
    assert pids_of(manager) == before
    assert len(running.generate([1, 2, 3], SamplingParams(max_tokens=4), use_tqdm=False)[0]["token_ids"]) == 4


@pytest.mark.parametrize("victim", ["resident", "new worker"])
def test_an_accepted_split_comes_into_force_although_a_process_dies_while_it_is_prepared(
    running: LLM, victim: str
) -> None:
    manager = running.supervisors["semi-0"]
    assert isinstance(manager, ProcessRotationManager)
    before, events = manager.get_status(), running.get_system_stats()["events"]
    split = SMAllocation(30, 50) if victim == "resident" else SMAllocation(70, 20)
    assert manager.request_sm_reallocation(split)

    def preparing() -> list[int]:
        return [worker["pid"] for worker in manager.get_status()["workers"] if worker["state"] == "preparing"]

    pid = wait_for(preparing)[0]
    os.kill(pid if victim == "new worker" else before["resident_manager"]["resident_process"]["pid"], signal.SIGKILL)
    assert manager.wait_until_settled(DEADLINE_S)
    status = manager.get_status()
    assert manager.current_sm_allocation == split
    assert not status["switch_requested"]
    counts, counts_before = status["statistics"], before["statistics"]
    assert counts["recoveries"] == counts_before["recoveries"] + (victim == "resident")
    assert counts["failed_rotations"] == counts_before["failed_rotations"]
    assert counts["rotations"] == counts_before["rotations"] + 1
    if victim == "resident":  # its workers end with it; the scheduler may notice one of them first
        wait_for(lambda: new_kinds(running, events) | {"lost": 0} == {"memory_lost": 1, "recovered": 1, "lost": 0})
    else:
        wait_for(lambda: new_kinds(running, events) == {"lost": 1})
    assert (
        f'hbserve_events_total{{kind="memory_lost"}} {float(running.get_system_stats()["events"]["memory_lost"])}'
        in (render(running.get_system_stats(), "", {})[0].decode())
    )
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    assert len(running.generate([1, 2, 3], sampling, use_tqdm=False)[0]["token_ids"]) == 4


def test_a_killed_worker_is_one_event(running: LLM) -> None:
    manager = running.supervisors["semi-0"]
    assert isinstance(manager, ProcessRotationManager)
    assert manager.wait_until_settled(DEADLINE_S)
    events = running.get_system_stats()["events"]
    victim = next(worker for worker in manager.get_status()["workers"] if worker["role"] == "prefill")
    os.kill(victim["pid"], signal.SIGKILL)
    wait_for(lambda: new_kinds(running, events))
    assert manager.wait_until_settled(DEADLINE_S)
    assert new_kinds(running, events) == {"lost": 1}
    [lost] = [
        event for event in events_of(running) if event["subject"] == victim["worker_id"] and event["kind"] == "lost"
    ]
    assert lost["text"]


def test_no_process_and_no_memory_outlives_a_killed_parent(model: str, short_path: Path) -> None:
    """The manager alone, as a user's program has it; that program is killed."""
    program = short_path / "program.py"
    program.write_text(
        "import os, signal\n"
        "from hbserve import PdDisaggConfig\n"
        "from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager, SMAllocation\n"
        f"config = PdDisaggConfig.from_arguments({model!r}, **{SETTINGS | {'num_sleepers': 0}!r})\n"
        "manager = ProcessRotationManager(server_args=config, port_args=None, gpu_id=0, tp_rank=0,\n"
        "    initial_sm_allocation=SMAllocation(prefill_percentage=100, decode_percentage=100))\n"
        "assert manager.start()\n"
        "status = manager.get_status()\n"
        "print(status['resident_manager']['resident_process']['pid'], *(w['pid'] for w in status['workers']))\n"
        "import sys; sys.stdout.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"TMPDIR": str(short_path)}
    output = subprocess.run(
        [sys.executable, str(program)], stdout=subprocess.PIPE, env=environment, timeout=DEADLINE_S
    ).stdout
    pids = {int(pid) for pid in output.split()}
    assert len(pids) == 3
    wait_for(lambda: not any(is_running(pid) for pid in pids))
    wait_for(lambda: not any(name.startswith("hbserve-") for name in os.listdir(short_path)))
    assert not [name for name in os.listdir("/dev/shm") if "hbserve" in name or any(str(pid) in name for pid in pids)]
    assert not arena_mappings() & pids


def test_the_coordinator_joins_processes_and_pool(model: str) -> None:
    config = PdDisaggConfig.from_arguments(
        model, ladder={"prefill": [], "decode": []}, **SETTINGS | {"num_sleepers": 0}
    )
    coordinator = create_semi_pd_coordinator(config, None, 70, 30, ttft_target_ms=100.0, tpot_target_ms=50.0)
    try:
        assert coordinator.start()
        assert coordinator.health_check() == {
            "healthy": True,
            "parts": {"resident_process": True, "prefill": True, "decode": True},
        }
        handles = coordinator.allocate_kv_blocks("a", 10, InstanceRole.PREFILL)
        assert len(set(handles)) == 10
        with pytest.raises(OverloadedError):
            coordinator.allocate_kv_blocks("b", 400, InstanceRole.PREFILL)
        status = coordinator.get_comprehensive_status()
        assert status["storage"]["free_blocks"] == status["storage"]["total_blocks"] - 10
        assert status["slo_controller"]["running"]
        assert coordinator.slo_controller is not None
        coordinator.slo_controller.stop_monitoring()  # it would move the split for a request that waits below
        coordinator.deallocate_kv_blocks("a")
        # Alone, without a scheduler, a rotation works as well; what overlaps it says nothing about either split.
        collector = coordinator.metrics_collector
        collector.record_request_arrival("before", 10)
        assert coordinator.request_sm_reallocation(SMAllocation(60, 40))
        assert coordinator.rotation_manager.wait_until_settled(DEADLINE_S)
        collector.record_request_arrival("after", 10)
        for name in ("before", "after"):
            collector.record_first_token(name)
        assert collector.get_current_window_metrics().ttft.count == 1
        assert coordinator.rotation_manager.get_status()["warm_percentages"] == {
            "prefill": [60],
            "decode": [40],
            "unified": [],
        }
        with pytest.raises(ConfigError, match="no worker of both phases"):
            coordinator.request_sm_reallocation(SMAllocation(60, 40, mixed=True))
    finally:
        coordinator.stop()
    assert not coordinator.health_check()["healthy"]


def test_a_split_has_one_controller(model: str, caplog: pytest.LogCaptureFixture) -> None:
    slo = {"ttft_target_ms": 100.0, "tpot_target_ms": 50.0}
    config = PdDisaggConfig.from_arguments(model, mode="semi_pd", slo=slo, **SETTINGS)
    with pytest.raises(ConfigError, match="targets in the configuration and in the arguments"):
        create_semi_pd_coordinator(config, ttft_target_ms=200.0, tpot_target_ms=50.0)
    assert create_semi_pd_coordinator(config).slo_controller is not None
    assert not ProcessRotationManager(config).start()
    assert "without a scheduler there are no latencies to read" in caplog.text


async def test_status_and_split_over_http(running: LLM) -> None:
    app = FastAPI()
    errors.install(app, {})
    semi_pd_routes.install(app, running.supervisors)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        status = (await client.get("/v1/semi_pd/status")).json()["instances"]["semi-0"]
        split = status["current_sm_allocation"]
        assert status["state"] == "running"
        stats = running.get_system_stats()
        assert f"split {split['prefill_percentage']} / {split['decode_percentage']} %" in draw(
            stats, {"instances": {"semi-0": status}}
        )
        answer = await client.post("/v1/semi_pd/allocation", json=split | {"decode_percentage": 100, "mixed": True})
        assert answer.status_code == 202
        for wrong, param in (({"decode_percentage": 101}, "decode_percentage"), ({"instance": "semi-1"}, "instance")):
            answer = await client.post("/v1/semi_pd/allocation", json=split | wrong)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == param
        answer = await client.post("/v1/semi_pd/allocation", json=split | {"mix": True})
        assert "unknown parameter 'mix'; did you mean 'mixed'" in answer.json()["error"]["message"]
    manager = running.supervisors["semi-0"]
    assert isinstance(manager, ProcessRotationManager)
    assert await asyncio.to_thread(manager.wait_until_settled, DEADLINE_S)
    assert manager.current_sm_allocation == SMAllocation(split["prefill_percentage"], 100, mixed=True)
    [unified] = [worker["worker_id"] for worker in manager.get_status()["workers"] if worker["role"] == "unified"]
    await asyncio.to_thread(running.generate, [1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    stats = running.get_system_stats()["gpu_instances"]["semi-0"]
    assert stats["is_mixed"]
    assert stats["workers"][unified]["generated_tokens"] == 4  # the first one, too
    counts = semi_pd_routes.rotation_counts(running.supervisors)
    scraped = {
        name.partition("{")[0]: value
        for line in render(running.get_system_stats(), "", counts)[0].decode().splitlines()
        for name, _, value in [line.rpartition(" ")]
        if 'role="decode"' in line or 'instance="semi-0"}' in line
    }
    assert scraped["hbserve_semi_pd_share_ratio"] == scraped["hbserve_semi_pd_mixed"] == "1.0"
    assert scraped["hbserve_semi_pd_rotations_total"] == str(float(manager.get_status()["statistics"]["rotations"]))
    dashboard = (ROOT / "configs" / "grafana" / "hbserve.json").read_text()
    assert set(re.findall(r"hbserve_semi_pd_\w+", dashboard)) <= set(scraped)
