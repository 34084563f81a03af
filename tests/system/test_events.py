"""Faults of a running system: each is one event, which the scheduler keeps and counts for all processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

from hbserve import DisaggregatedLLM, PdDisaggConfig, SamplingParams
from tests.support.scheduler_parts import DEMO

DEADLINE_S = 120.0


async def test_lost_restarted_and_given_up_processes_are_events_by_name() -> None:
    config = PdDisaggConfig(
        DEMO, mode="unified", device="cpu", num_blocks=64, max_restarts=1, recovery_timeout_s=1.0, log_level="WARNING"
    )
    async with DisaggregatedLLM(config, text_in_processes=True) as llm:

        async def until(holds: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
            async with asyncio.timeout(DEADLINE_S):
                while not holds(stats := await llm.client.stats(recent=True)):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            return stats

        def faults(stats: dict[str, Any]) -> dict[str, int]:
            return {kind: count for kind, count in stats["events"].items() if count and kind != "ready"}

        texts = llm.text_processes
        assert texts is not None
        assert faults(await llm.client.stats()) == {}
        os.kill(texts.report()["detokenizer"]["pid"], signal.SIGKILL)
        assert faults(await until(faults)) == {"text_restarted": 1}
        [output] = await llm.generate(["Hello!"], SamplingParams(max_tokens=4, ignore_eos=True))
        assert len(output["token_ids"]) == 4

        pid = (await llm.client.stats())["gpu_instances"]["unified-0"]["pid"]
        os.kill(pid, signal.SIGKILL)
        stats = await until(lambda stats: stats["gpu_instances"]["unified-0"].get("pid") not in (None, pid))
        assert faults(stats) == {"text_restarted": 1, "lost": 1}
        os.kill(stats["gpu_instances"]["unified-0"]["pid"], signal.SIGKILL)
        stats = await until(lambda stats: stats["events"]["given_up"] and stats["events"]["lost"] == 2)
        assert faults(stats) == {"text_restarted": 1, "lost": 2, "given_up": 1}
        [event] = [event for event in stats["recent"]["events"] if event["kind"] == "given_up"]
        assert event["subject"] == "unified-0"
        assert "rpc.max_restarts" in event["text"]
