"""Instances that change their role while the system serves."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx

from hbserve import DisaggregatedLLM, PdDisaggConfig, SamplingParams
from hbserve.server.app import create_app
from tests.support.engines import assert_no_leaks, greedy_reference, random_prompt
from tests.support.model_zoo import save_model

GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
DEADLINE_S = 90.0


async def test_an_instance_changes_its_role_under_load_and_keeps_its_weights(tmp_path: Path) -> None:
    model = save_model(tmp_path, "smollm3")
    prompts = [random_prompt(30 + 17 * index, seed=index) for index in range(8)]
    expected = [greedy_reference(model, prompt, 60) for prompt in prompts]
    roles = ["prefill", "prefill", "decode"]
    config = PdDisaggConfig.from_arguments(
        str(tmp_path),
        device="cpu",
        dtype="float32",
        num_blocks=256,
        max_model_len=256,
        chunk_size=32,
        log_level="ERROR",
        gpu_instances=[
            {"instance_id": f"i{number}", "instance_type": role, "num_threads": 1} for number, role in enumerate(roles)
        ],
    )
    async with DisaggregatedLLM(config) as llm:
        app = create_app(llm.engine, llm.client, "tiny")
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=DEADLINE_S)

        async def change(instance_id: str, role: str, deadline_s: float = 60.0) -> str | None:
            """What is said where it is refused."""
            answer = await http.post(f"/v1/instances/{instance_id}/role", json={"role": role, "timeout_s": deadline_s})
            return None if answer.status_code == 200 else answer.json()["error"]["message"]

        pids = {name: each["pid"] for name, each in llm.get_system_stats()["gpu_instances"].items()}

        async def drain_too_long() -> None:
            """A worker that is not prepared for a role is drained first, and keeps its own if that takes too long."""
            long = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
            busy = [asyncio.create_task(llm.generate(prompts[0], long)) for _ in range(6)]
            while llm.get_system_stats()["gpu_instances"]["i2"]["active_requests"] < 2:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.01)
            said = await change("i2", "prefill", 0.01) or ""
            assert "requests at the deadline; it stays decode" in said
            for task in busy:
                assert len((await task)[0]["token_ids"]) == 200

        for instance_id, role in (("i1", "decode"), ("i2", "prefill"), ("i1", "decode"), ("i2", "decode")):
            if (instance_id, role) == ("i2", "prefill"):
                await drain_too_long()
            work = asyncio.create_task(llm.generate(prompts, GREEDY))
            await asyncio.sleep(0.05)  # somewhere in the middle of it
            assert await asyncio.wait_for(change(instance_id, role), DEADLINE_S) is None
            assert llm.get_system_stats()["gpu_instances"][instance_id]["role"] == role
            outputs = await asyncio.wait_for(work, DEADLINE_S)
            assert [output["token_ids"] for output in outputs] == expected
        await asyncio.to_thread(assert_no_leaks, llm)
        stats = llm.get_system_stats()
        assert {name: each["pid"] for name, each in stats["gpu_instances"].items()} == pids
        assert stats["cpu_scheduler"]["retries"] == 0
        links = stats["kv_transfer"]["links"]
        assert {name for name, link in links.items() if link["open"]} == {"i0->i1", "i0->i2"}
        assert links["i0->i1"]["bytes"] > 0

        for instance_id, role, said in (
            ("i0", "decode", "the only prefill instance"),
            ("nobody", "decode", "no instance 'nobody'"),
            ("i1", "semi_pd", "Input should be 'prefill', 'decode' or 'unified'"),
        ):
            assert said in (await change(instance_id, role) or "")
        unknown = await http.delete("/v1/instances/nobody")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "instance_not_found")
        for instance_id, role in (
            ("i2", "unified"),
            ("i1", "prefill"),
            ("i1", "unified"),
            ("i2", "prefill"),
            ("i1", "decode"),
            ("i2", "decode"),
        ):  # their workers have prepared for both phases, and change at once, with all that they have
            work = asyncio.create_task(llm.generate(prompts, GREEDY))
            await asyncio.sleep(0.05)
            assert await asyncio.wait_for(change(instance_id, role), DEADLINE_S) is None
            assert not work.done()
            outputs = await asyncio.wait_for(work, DEADLINE_S)
            assert [output["token_ids"] for output in outputs] == expected
        await asyncio.to_thread(assert_no_leaks, llm)
        stats = llm.get_system_stats()
        assert stats["cpu_scheduler"]["retries"] == stats["cpu_scheduler"]["preemptions"] == 0
        assert {name for name, link in stats["kv_transfer"]["links"].items() if link["open"]} == {"i0->i1", "i0->i2"}
