"""Faults of a running system: each is one event, which the scheduler keeps and counts for all processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from hbserve import DisaggregatedLLM, SamplingParams
from hbserve.config import from_dict
from hbserve.errors import EngineDeadError
from tests.support.http_server import served
from tests.support.scheduler_parts import DEMO

DEADLINE_S = 120.0


async def test_lost_restarted_and_given_up_processes_are_events_by_name() -> None:
    """An instance that is given up leaves the rest degraded; when the last one is given up, so is the system."""
    names = ("unified-0", "unified-1")
    instances = [{"instance_id": name, "instance_type": "unified", "num_threads": 1} for name in names]
    rpc = {"max_restarts": 1, "recovery_timeout_s": 1.0}
    model = {"path": str(DEMO), "device": "cpu"}
    document = {"mode": "unified", "model": model, "gpu_instances": instances, "rpc": rpc}
    config = from_dict(document | {"performance": {"num_blocks": 64}, "logging": {"level": "WARNING"}})
    async with DisaggregatedLLM(config, text_in_processes=True) as llm, served(llm.engine, llm.client) as url:

        async def until(holds: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
            async with asyncio.timeout(DEADLINE_S):
                while not holds(stats := await llm.client.stats(recent=True)):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            return stats

        async def kill(name: str) -> None:
            stats = await until(lambda stats: stats["gpu_instances"][name]["status"] == "ready")
            os.kill(stats["gpu_instances"][name]["pid"], signal.SIGKILL)
            await until(lambda now: now["events"]["lost"] > stats["events"]["lost"])

        def faults(stats: dict[str, Any]) -> dict[str, int]:
            return {kind: count for kind, count in stats["events"].items() if count and kind != "ready"}

        async def health() -> tuple[int, Any]:
            async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as http:
                answer = await http.get("/health")
            return answer.status_code, answer.json()

        async def generate() -> None:
            [output] = await llm.generate(["Hello!"], SamplingParams(max_tokens=4, ignore_eos=True))
            assert len(output["token_ids"]) == 4

        texts = llm.text_processes
        assert texts is not None
        assert faults(await llm.client.stats()) == {}
        os.kill(texts.report()["detokenizer"]["pid"], signal.SIGKILL)
        assert faults(await until(faults)) == {"text_restarted": 1}
        await generate()

        await kill("unified-0")
        expected = {"text_restarted": 1, "lost": 1, "instance_restarted": 1}
        stats = await until(lambda stats: stats["events"]["instance_restarted"])
        assert faults(stats) == expected
        await kill("unified-0")
        stats = await until(lambda stats: stats["events"]["given_up"])
        assert faults(stats) == expected | {"lost": 2, "given_up": 1}
        [event] = [event for event in stats["recent"]["events"] if event["kind"] == "given_up"]
        assert event["subject"] == "unified-0"
        assert "rpc.max_restarts" in event["text"]
        status, report = await health()
        assert (status, report["status"]) == (200, "degraded")
        assert report["missing"]["unified-0"].startswith("given up: it ended with exit code -9")
        await generate()

        await kill("unified-1")
        with contextlib.suppress(EngineDeadError):  # the end may be known before the loss
            await kill("unified-1")
        async with asyncio.timeout(DEADLINE_S):
            while llm.client.dead is None:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        with pytest.raises(EngineDeadError, match=r"no instance that prefills comes back: unified-0: .*; unified-1: "):
            await generate()
        status, report = await health()
        assert (status, report["status"]) == (503, "dead")
