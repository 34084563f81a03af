"""Instances on one GPU that change their roles or join: they answer right and run captured steps."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from hbserve import DisaggregatedLLM, SamplingParams
from hbserve.config import InstanceRole, from_dict
from hbserve.policy.profile_file import LearntProfile, load_profile, profiled_predictor
from hbserve.policy.step_time_predictor import StepWork
from tests.support.engines import assert_no_leaks
from tests.support.paths import ROOT
from tests.support.ports import free_ports

DEMO = str(ROOT / "examples" / "models" / "hbserve-demo")
sys.path.insert(0, str(ROOT / "examples"))

import demo_language as language  # noqa: E402

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(temperature=0, max_tokens=64)
DEADLINE_S = 120.0


async def test_a_changed_role_and_a_joined_instance_run_captured(capfd: pytest.CaptureFixture[str]) -> None:
    port = free_ports(1)[0]
    config = from_dict(
        {
            "mode": "disaggregated",
            "model": {"path": DEMO, "device": "cuda", "dtype": "bfloat16"},
            "performance": {"num_blocks": 1024, "max_num_seqs": 64},
            "rpc": {"port": port},
            "gpu_instances": [
                {"instance_id": "p0", "instance_type": "prefill", "gpu_id": 0},
                {"instance_id": "p1", "instance_type": "prefill", "gpu_id": 0},
                {"instance_id": "d0", "instance_type": "decode", "gpu_id": 0},
            ],
        }
    )
    rng = random.Random(7)
    questions = [language.recall_question(rng, rng.randint(3, 150)) for _ in range(60)]

    async with DisaggregatedLLM(config) as llm:

        async def answer() -> float:
            started = time.monotonic()
            asked = [llm.chat(question.messages, GREEDY) for question in questions]
            outputs = await asyncio.wait_for(asyncio.gather(*asked), DEADLINE_S)
            right = sum(o["text"] == question.answer for o, question in zip(outputs, questions, strict=True))
            assert right >= 57
            return time.monotonic() - started

        await answer()
        first = await answer()
        assert "p1: captured decode graphs" not in capfd.readouterr().err
        work = asyncio.create_task(answer())
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await llm.client.set_role("p1", InstanceRole.DECODE, DEADLINE_S)
        change_s = time.monotonic() - began
        await work
        assert "p1: captured decode graphs" in capfd.readouterr().err
        await llm.client.set_role("d0", InstanceRole.PREFILL, DEADLINE_S)  # only p1 decodes now; d0 has another cache
        await answer()
        changed = await answer()
        steps = (await llm.client.stats())["gpu_instances"]["p1"]["steps"]
        assert steps > 0

        command = f"tcp://127.0.0.1:{port} --role decode --instance-id d1 --gpu-id 0".split()
        joiner = await asyncio.create_subprocess_exec(sys.executable, "-m", "hbserve.join", *command)
        try:
            async with asyncio.timeout(DEADLINE_S):
                while (await llm.client.stats())["gpu_instances"].get("d1", {}).get("status") != "ready":  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            await answer()
            assert (await llm.client.stats())["gpu_instances"]["d1"]["steps"] > 0
            work = asyncio.create_task(answer())
            await asyncio.sleep(0.05)
            joiner.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(joiner.wait(), DEADLINE_S) == 0
            await work
        finally:
            if joiner.returncode is None:
                joiner.kill()
                await joiner.wait()
        await asyncio.to_thread(assert_no_leaks, llm)
        stats = await llm.client.stats()
        assert stats["cpu_scheduler"]["retries"] == 0
    with capfd.disabled():
        print(f"60 questions: {first:.2f} s, after the change {changed:.2f} s; the change took {change_s:.2f} s")


async def test_replicas_become_prefill_and_decode_at_once_and_a_profile_is_learnt_before(tmp_path: Path) -> None:
    config = from_dict(
        {
            "mode": "unified",
            "model": {"path": DEMO, "device": "cuda", "dtype": "bfloat16"},
            "performance": {"num_blocks": 2048, "max_num_seqs": 64},
            "kv_transfer": {"backend": "shm"},
            "gpu_instances": [
                {"instance_id": f"u{number}", "instance_type": "unified", "gpu_id": 0} for number in range(2)
            ],
        }
    )
    rng = random.Random(8)
    questions = [language.recall_question(rng, rng.randint(3, 150)) for _ in range(60)]
    llm = DisaggregatedLLM(config)
    llm.launcher.learnt_profile = LearntProfile(str(tmp_path / "profile.json"), "the demo model")
    async with llm:
        async with asyncio.timeout(DEADLINE_S):
            while not (tmp_path / "profile.json").is_file():  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.2)
        profile = load_profile(tmp_path / "profile.json")
        steps = profiled_predictor(profile)
        assert len(profile.steps) >= 8
        assert 0 < steps.seconds(StepWork(1, 1024)) < steps.seconds(StepWork(64, 64 * 4096)) < 0.1

        async def answer() -> None:
            asked = [llm.chat(question.messages, GREEDY) for question in questions]
            outputs = await asyncio.wait_for(asyncio.gather(*asked), DEADLINE_S)
            right = sum(o["text"] == question.answer for o, question in zip(outputs, questions, strict=True))
            assert right >= 57

        running = llm.running_plan
        assert running is not None
        for system in ("1p1d", "unified*2"):
            work = asyncio.create_task(answer())
            await asyncio.sleep(0.05)
            await running.change_to(system, DEADLINE_S)
            await work
            await answer()
        await asyncio.to_thread(assert_no_leaks, llm)
        stats = await llm.client.stats()
        assert stats["cpu_scheduler"]["retries"] == 0
        assert stats["kv_transfer"]["links"]["u0->u1"]["transfers"] > 0
