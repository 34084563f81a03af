"""Semi-PD on a GPU: MPS and shares, arenas by IPC, rotation, share levels, and recovery from a fault of the GPU."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from benchmarks import gpu_fault
from hbserve import DisaggregatedLLM, PdDisaggConfig, SamplingParams
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager, SMAllocation
from tests.support.engines import assert_no_leaks
from tests.support.paths import ROOT

DEMO = str(ROOT / "examples" / "models" / "hbserve-demo")
sys.path.insert(0, str(ROOT / "examples"))

import demo_language as language  # noqa: E402

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(temperature=0, max_tokens=64)


@asynccontextmanager
async def system(**settings: Any) -> AsyncIterator[tuple[DisaggregatedLLM, ProcessRotationManager]]:
    arguments: dict[str, Any] = {
        "mode": "semi_pd",
        "device": "cuda",
        "dtype": "bfloat16",
        "num_blocks": 4096,
        "chunk_size": 64,
        "prefill_percentage": 60,
        "decode_percentage": 40,
        "ladder": {"prefill": [100], "decode": [100]},
    }
    async with DisaggregatedLLM(PdDisaggConfig.from_arguments(DEMO, **(arguments | settings))) as llm:
        manager = llm.supervisors["semi-0"]
        assert isinstance(manager, ProcessRotationManager)
        yield llm, manager


async def ask(llm: DisaggregatedLLM, count: int) -> None:
    rng = random.Random(7)
    questions = [language.recall_question(rng, rng.randint(3, 150)) for _ in range(count)]
    outputs = await asyncio.gather(*(llm.chat(question.messages, GREEDY) for question in questions))
    right = sum(output["text"] == question.answer for output, question in zip(outputs, questions, strict=True))
    assert right >= 0.95 * count


def _registered(llm: DisaggregatedLLM) -> list[dict[str, Any]]:
    workers = llm.get_system_stats()["gpu_instances"]["semi-0"]["workers"].values()
    return [worker for worker in workers if worker["device"] is not None]


async def test_shares_rotation_and_ladder() -> None:
    async with system(ladder={"prefill": [100], "decode": [100], "unified": [100]}) as (llm, manager):
        deadline = time.monotonic() + 30
        while len(workers := _registered(llm)) < 5:
            assert time.monotonic() < deadline, "not all workers have come"
            await asyncio.sleep(0.05)
        share = {worker["percentage"]: int(worker["device"].split()[-2]) for worker in workers}
        assert share[40] < share[60] < share[100], share
        await ask(llm, 100)
        for split in (SMAllocation(80, 50), SMAllocation(50, 30)):
            asked = asyncio.create_task(ask(llm, 200))
            manager.request_sm_reallocation(split)
            assert await asyncio.to_thread(manager.wait_until_settled, 60), manager.get_status()
            await asked
        assert manager.get_status()["statistics"]["rotations"] == 2
        cores = os.sched_getaffinity(0)
        if len(cores) >= 8:  # one core is reserved for processes that end
            serving = [os.sched_getaffinity(worker["pid"]) for worker in _registered(llm)]
            assert serving == [cores - {max(cores)}] * len(serving)
        asked = asyncio.create_task(ask(llm, 400))
        while not asked.done():  # messages alone switch between mixed and separate roles
            split = manager.current_sm_allocation
            mixed = SMAllocation(split.prefill_percentage, split.decode_percentage, not split.mixed)
            manager.request_sm_reallocation(mixed)
            assert await asyncio.to_thread(manager.wait_until_settled, 60), manager.get_status()
            await asyncio.sleep(0.02)
        await asked
        tokens = {worker["role"]: worker["generated_tokens"] for worker in _registered(llm)}
        changes = manager.get_status()["statistics"]["rotations"] - 2
        print(f"{changes} changes; tokens by a worker of each role: {tokens}")
        assert tokens["unified"] > 0
        await asyncio.to_thread(assert_no_leaks, llm)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
async def test_two_ranks_share_two_gpus_and_rotate() -> None:
    async with system(tensor_parallel_size=2, ladder={"prefill": [], "decode": []}) as (llm, manager):
        asked = asyncio.create_task(ask(llm, 200))
        manager.request_sm_reallocation(SMAllocation(70, 50))
        assert await asyncio.to_thread(manager.wait_until_settled, 100), manager.get_status()
        await asked
        await ask(llm, 100)
        assert manager.get_status()["statistics"]["rotations"] == 1
        await asyncio.to_thread(assert_no_leaks, llm)


async def test_a_worker_that_ends_costs_no_request() -> None:
    async with system() as (llm, manager):
        asked = asyncio.create_task(ask(llm, 400))
        await asyncio.sleep(0.05)
        for worker in manager.get_status()["workers"][:2]:
            os.kill(worker["pid"], signal.SIGTERM)
        await asked
        deadline = time.monotonic() + 60
        while manager.get_status()["statistics"]["replaced_workers"] < 2:
            assert time.monotonic() < deadline, manager.get_status()
            await asyncio.sleep(0.05)
        assert await asyncio.to_thread(manager.wait_until_settled, 60), manager.get_status()
        await ask(llm, 20)
        await asyncio.to_thread(assert_no_leaks, llm)


async def test_a_fault_of_the_gpu_costs_no_request() -> None:
    async with system() as (llm, manager):
        recovered = asyncio.Event()

        async def ask_on() -> None:
            while not recovered.is_set():
                await ask(llm, 300)

        asked = asyncio.create_task(ask_on())
        mps = manager.get_status()["mps"]
        assert mps is not None
        started = time.monotonic()
        environment = {name: value for name, value in mps.items() if name != "is_ours"}
        fault = await asyncio.to_thread(gpu_fault.fault, environment)
        assert fault.returncode != 0
        assert b"CUDA error" in fault.stderr or b"Triton Error [CUDA]" in fault.stderr, fault.stderr
        while manager.get_status()["statistics"]["recoveries"] < 1:
            assert time.monotonic() < started + 120, manager.get_status()
            await asyncio.sleep(0.05)
        recovered.set()
        await asyncio.wait_for(asked, 120)
        print(f"all answers {time.monotonic() - started:.1f} s after the fault")
        assert await asyncio.to_thread(manager.wait_until_settled, 60), manager.get_status()
        await ask(llm, 20)
        await asyncio.to_thread(assert_no_leaks, llm)
