"""Instances that die, hang and lie under load: nothing is lost, nothing is wrong, nothing hangs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hbserve import DisaggregatedLLM, PdDisaggConfig, SamplingParams
from hbserve.errors import EngineDeadError, RequestFailedError
from tests.support.engines import assert_no_leaks, greedy_reference, random_prompt
from tests.support.model_zoo import save_model

DEADLINE_S = 90.0
NUM_TOKENS = 120
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = tmp_path_factory.mktemp("qwen3_moe")
    return str(folder), save_model(folder, "qwen3_moe")


@pytest.fixture(scope="module")
def references(model: tuple[str, Any]) -> list[tuple[list[int], list[int]]]:
    prompts = [random_prompt(30 + 20 * index, seed=index) for index in range(12)]
    return [(prompt, greedy_reference(model[1], prompt, NUM_TOKENS)) for prompt in prompts]


@asynccontextmanager
async def system(
    model_path: str, standbys: int = 0, step_timeout_s: float = 120.0, **settings: Any
) -> AsyncIterator[DisaggregatedLLM]:
    """Start a system; with ``standbys``, two of them become its instances, and the others end."""
    arguments: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "num_blocks": 512,
        "max_model_len": 640,
        "chunk_size": 32,
        "log_level": "ERROR",
        "kv_timeout_s": 10.0,
        "heartbeat_timeout_s": 5.0,
        "host_bytes": 64 << 20,
    }
    config = PdDisaggConfig.from_arguments(model_path, **(arguments | settings)).freeze()
    rpc = msgspec.structs.replace(config.rpc, step_timeout_s=step_timeout_s)
    llm = DisaggregatedLLM(msgspec.structs.replace(config, rpc=rpc))
    llm.launcher.stand_by(standbys, num_ranks=1)
    waiting = list(llm.launcher._standbys)
    async with llm:
        if standbys:
            used = {pid_of(llm, name) for name in ("prefill-0", "decode-0")}
            assert used == {process.pid for process in waiting[:2]}
            assert all([await asyncio.to_thread(process.wait_exit, DEADLINE_S) for process in waiting[2:]])
        yield llm


def pid_of(llm: DisaggregatedLLM, instance: str) -> int:
    return int(llm.get_system_stats()["gpu_instances"][instance]["pid"])


async def wait_for(what: Any, deadline_s: float = DEADLINE_S) -> None:
    """Poll until ``what()`` holds."""
    async with asyncio.timeout(deadline_s):
        while not what():  # noqa: ASYNC110 - the states of other processes have no event
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=str)
async def test_instances_that_die_under_load_cost_no_request(
    model: tuple[str, Any], references: list[tuple[list[int], list[int]]], number: signal.Signals
) -> None:
    standbys = 3 if number is signal.SIGKILL else 0
    async with system(model[0], standbys, scheduler="tests.support.dawdler:Dawdler") as llm:
        prompts = [prompt for prompt, _ in references]
        for victim in ("prefill-0", "decode-0"):
            steps = llm.get_system_stats()["gpu_instances"][victim]["steps"]
            work = asyncio.create_task(llm.generate(prompts, GREEDY))
            await wait_for(lambda v=victim, n=steps: llm.get_system_stats()["gpu_instances"][v]["steps"] >= n + 3)
            pid = pid_of(llm, victim)
            os.kill(pid, number)
            outputs = await asyncio.wait_for(work, DEADLINE_S)
            assert [output["token_ids"] for output in outputs] == [tokens for _, tokens in references]
            await wait_for(lambda v=victim: llm.get_system_stats()["gpu_instances"][v]["status"] == "ready")
            assert pid_of(llm, victim) != pid
        # They are back, and serve.
        again = await asyncio.wait_for(llm.generate(prompts[:2], GREEDY), DEADLINE_S)
        assert [output["token_ids"] for output in again] == [tokens for _, tokens in references[:2]]
        await asyncio.to_thread(assert_no_leaks, llm)


async def test_an_instance_that_stops_answering_is_given_up_and_taken_back(
    model: tuple[str, Any], references: list[tuple[list[int], list[int]]]
) -> None:
    async with system(model[0], heartbeat_timeout_s=2.0) as llm:
        work = asyncio.create_task(llm.generate([prompt for prompt, _ in references], GREEDY))  # noqa: RUF006 - it is awaited below
        await wait_for(lambda: llm.get_system_stats()["gpu_instances"]["decode-0"]["steps"] >= 5)
        pid = pid_of(llm, "decode-0")
        os.kill(pid, signal.SIGSTOP)
        try:
            await wait_for(lambda: llm.get_system_stats()["gpu_instances"]["decode-0"]["status"] == "lost")
        finally:
            os.kill(pid, signal.SIGCONT)
        outputs = await asyncio.wait_for(work, DEADLINE_S)
        assert [output["token_ids"] for output in outputs] == [tokens for _, tokens in references]
        await asyncio.to_thread(assert_no_leaks, llm)


async def test_an_instance_in_which_nothing_runs_any_more_is_killed_and_started_again(
    model: tuple[str, Any], references: list[tuple[list[int], list[int]]]
) -> None:
    async with system(model[0], heartbeat_timeout_s=1.0, step_timeout_s=6.0) as llm:
        work = asyncio.create_task(llm.generate([prompt for prompt, _ in references], GREEDY))  # noqa: RUF006 - it is awaited below
        await wait_for(lambda: llm.get_system_stats()["gpu_instances"]["decode-0"]["steps"] >= 5)
        frozen = pid_of(llm, "decode-0")
        os.kill(frozen, signal.SIGSTOP)  # it gets no SIGCONT, and cannot end itself
        outputs = await asyncio.wait_for(work, DEADLINE_S)
        assert [output["token_ids"] for output in outputs] == [tokens for _, tokens in references]
        assert pid_of(llm, "decode-0") != frozen
        assert llm.get_system_stats()["events"]["instance_restarted"] == 1
        await asyncio.to_thread(assert_no_leaks, llm)


@pytest.mark.parametrize(("mode", "victim"), [("disaggregated", "decode-0"), ("unified", "unified-0")])
async def test_requests_fail_with_a_typed_error_when_an_instance_does_not_come_back(
    model: tuple[str, Any], mode: str, victim: str
) -> None:
    async with system(model[0], mode=mode, heartbeat_timeout_s=1.0, recovery_timeout_s=1.0) as llm:
        pid = pid_of(llm, victim)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(RequestFailedError, match=victim):
                await asyncio.wait_for(llm.generate([1, 2, 3], GREEDY), DEADLINE_S)
        finally:
            os.kill(pid, signal.SIGCONT)


async def test_a_scheduler_that_is_not_started_again_ends_every_request_with_a_typed_error(
    model: tuple[str, Any],
) -> None:
    async with system(model[0], mode="unified", max_restarts=0) as llm:
        work = asyncio.create_task(llm.generate([1, 2, 3], SamplingParams(max_tokens=600, ignore_eos=True)))
        await wait_for(lambda: llm.get_system_stats()["gpu_instances"]["unified-0"]["steps"] >= 3)
        os.kill(llm.launcher.scheduler.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="too often to start it again"):
            await asyncio.wait_for(work, DEADLINE_S)
        with pytest.raises(EngineDeadError):
            await llm.generate([1], GREEDY)


async def test_aborts_in_every_state_return_all_blocks(model: tuple[str, Any]) -> None:
    async with system(model[0], scheduler="tests.support.dawdler:Dawdler") as llm:

        async def some_of(index: int) -> None:
            prompt = random_prompt(200 + index, seed=index)
            stream = llm.stream(prompt, GREEDY, request_id=f"r{index}")
            async for delta in stream:
                if index % 3 == 0:
                    break  # leaves in the middle
                if index % 3 == 1:
                    llm.abort(f"r{index}")
                if delta.finish_reason is not None:
                    assert delta.finish_reason == ("abort" if index % 3 == 1 else "length")
            await stream.aclose()

        tasks = [asyncio.create_task(some_of(index)) for index in range(24)]
        cancelled = [asyncio.create_task(llm.generate(random_prompt(300, seed=50 + n), GREEDY)) for n in range(8)]
        for index, task in enumerate(cancelled):  # before, while and after their prompts are prefilled
            await asyncio.sleep(0.02 * index)
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_S)
        await asyncio.gather(*cancelled, return_exceptions=True)
        await asyncio.to_thread(assert_no_leaks, llm)


async def test_corrupted_blocks_would_be_seen_by_these_tests(
    model: tuple[str, Any], references: list[tuple[list[int], list[int]]]
) -> None:
    async with system(model[0], kv_transfer_backend="tests.support.faulty_transfers:CorruptingKVTransfer") as llm:
        some = references[:4]
        outputs = await asyncio.wait_for(llm.generate([prompt for prompt, _ in some], GREEDY), DEADLINE_S)
        wrong = sum(o["token_ids"] != tokens for o, (_, tokens) in zip(outputs, some, strict=True))
        assert wrong  # every second transfer is damaged, and a request has one or several


async def test_failed_transfers_are_done_again_and_end_in_a_typed_error_if_they_always_fail(
    model: tuple[str, Any], references: list[tuple[list[int], list[int]]]
) -> None:
    async with system(
        model[0],
        kv_transfer_backend="tests.support.faulty_transfers:FailingKVTransfer",
        kv_verify=True,
        kv_timeout_s=3.0,
    ) as llm:
        prompt, expected = references[0]
        outputs = await asyncio.wait_for(llm.generate(prompt, GREEDY), DEADLINE_S)
        assert outputs[0]["token_ids"] == expected
        stats = llm.get_system_stats()
        assert stats["cpu_scheduler"]["retries"] == 2
        (link,) = stats["kv_transfer"]["links"].values()
        assert link["failures"] == {"backend": 1, "checksum": 1}
        with pytest.raises(RequestFailedError, match="line is dead"):
            await asyncio.wait_for(llm.generate([1, 2, 3], GREEDY), DEADLINE_S)
        await asyncio.to_thread(assert_no_leaks, llm)


async def test_a_users_scheduling_policy_is_used(
    model: tuple[str, Any], references: list[tuple[list[int], list[int]]]
) -> None:
    settings: dict[str, Any] = {
        "mode": "unified",
        "max_num_seqs": 1,
        "scheduler": "tests.support.newest_first:NewestFirst",
    }
    async with system(model[0], **settings) as llm:
        finished: list[int] = []

        async def one(index: int) -> None:
            prompt, expected = references[index]
            outputs = await llm.generate(prompt, GREEDY)
            assert outputs[0]["token_ids"] == expected
            finished.append(index)

        pid = llm.get_system_stats()["gpu_instances"]["unified-0"]["pid"]
        os.kill(pid, signal.SIGSTOP)  # the first request is not to end before all wait
        try:
            first = asyncio.create_task(one(0))
            await wait_for(lambda: llm.get_system_stats()["gpu_instances"]["unified-0"]["active_requests"])
            others = []
            for index in (1, 2, 3):
                others.append(asyncio.create_task(one(index)))
                await wait_for(lambda n=index: llm.get_system_stats()["cpu_scheduler"]["total_requests"] > n)
        finally:
            os.kill(pid, signal.SIGCONT)
        await asyncio.wait_for(asyncio.gather(first, *others), DEADLINE_S)
        assert finished == [0, 3, 2, 1]


async def test_no_process_outlives_a_killed_parent(model: tuple[str, Any], short_path: Path) -> None:
    program = short_path / "program.py"
    program.write_text(
        "import os, signal\n"
        "from hbserve import LLM\n"
        f"llm = LLM({model[0]!r}, device='cpu', dtype='float32', num_blocks=64, log_level='ERROR')\n"
        "children = [c.pid for c in llm._llm._launcher._children]\n"
        "print(*children, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"TMPDIR": str(short_path)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(program), stdout=subprocess.PIPE, env=environment
    )
    output, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    pids = [int(pid) for pid in output.split()]
    assert len(pids) == 3
    await wait_for(lambda: not any(is_running(pid) for pid in pids))
    assert not any(name.startswith("hbserve-") for name in os.listdir(short_path)), "the folder of sockets is left"


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie (its new parent may be slow to reap it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
