"""Instances that change their role while the system serves."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import httpx
import pytest

from hbserve import DisaggregatedLLM, PdDisaggConfig, SamplingParams
from hbserve.config import InstanceRole
from hbserve.messages.prediction import CandidatePrediction, PredictionOrders
from hbserve.policy.profile_file import load_profile, save_profile
from hbserve.policy.profile_store import ProfileKey
from hbserve.server import live_page
from hbserve.server.app import create_app
from hbserve.server.fair_gate import FairGate
from hbserve.system.running_plan import RunningPlan, roles_of
from tests.support.engines import assert_no_leaks, greedy_reference, random_prompt
from tests.support.model_zoo import save_model

GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
DEADLINE_S = 90.0


async def test_an_instance_changes_its_role_under_load_and_keeps_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        app = create_app(llm.engine, llm.client, "tiny", running=llm.running_plan)
        live_page.install(app, llm.config, llm.running_plan, llm.engine, llm.client, FairGate(), None, asyncio.Event())
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
        assert {name for name, link in links.items() if link["open"]} >= {"i0->i1", "i0->i2"}
        assert links["i0->i1"]["bytes"] > 0

        for instance_id, role, said in (
            ("i0", "decode", "the only prefill instance"),
            ("nobody", "decode", "no instance 'nobody'"),
            ("i1", "semi_pd", "Input should be 'prefill', 'decode' or 'unified'"),
        ):
            assert said in (await change(instance_id, role) or "")
        unknown = await http.delete("/v1/instances/nobody")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "instance_not_found")
        # The workers of i1 and i2 have prepared for both phases, and change at once, with all that they have.
        for instance_id, role in (("i2", "unified"), ("i1", "prefill"), ("i1", "unified"), ("i2", "decode")):
            work = asyncio.create_task(llm.generate(prompts, GREEDY))
            await asyncio.sleep(0.05)
            assert await asyncio.wait_for(change(instance_id, role), DEADLINE_S) is None
            assert not work.done()
            outputs = await asyncio.wait_for(work, DEADLINE_S)
            assert [output["token_ids"] for output in outputs] == expected
            shown = (await http.get("/v1/plan")).json()
            assert shown["instances"][instance_id] == role
            assert shown["mode"] == ("disaggregated" if "prefill" in shown["instances"].values() else "unified")

        async def change_plan(system: str) -> str | None:
            answer = await http.post("/v1/plan", json={"system": system})
            return None if answer.status_code == 200 else answer.json()["error"]["message"]

        assert "3 instances are ready" in (await change_plan("1p1d") or "")
        assert "must be unified*N or XpYd, such as unified*3 or 1p2d" in (await change_plan("2p") or "")
        for system in ("unified*3", "2p1d"):
            work = asyncio.create_task(llm.generate(prompts, GREEDY))
            await asyncio.sleep(0.05)
            assert await asyncio.wait_for(change_plan(system), DEADLINE_S) is None
            outputs = await asyncio.wait_for(work, DEADLINE_S)
            assert [output["token_ids"] for output in outputs] == expected
            header = (await http.get("/live")).json()["server"]
            assert header["mode"] == {"unified*3": "unified", "2p1d": "disaggregated"}[system]
            assert header["plan"] == {"chosen_by": "operator", "why": "an operator has asked for it"}

        # A load for which another plan is predicted to be much better changes the plan at the second look.
        assert llm.plan is not None
        seen: list[PredictionOrders] = []

        def predict(orders: PredictionOrders) -> list[CandidatePrediction]:
            seen.append(orders)
            means = {"unified*3": 0.4, "1p2d": 0.9, "2p1d": 0.4}
            return [CandidatePrediction(system=s, attainment={"recent": means[s]}, bound={}) for s in orders.candidates]

        monkeypatch.setenv("HBSERVE_CACHE", str(tmp_path / "cache"))
        key = ProfileKey.of(llm.config.model, llm.config.kv_cache, "cpu")
        assert key is not None
        key.path.parent.mkdir(parents=True)
        save_profile(load_profile(None), key.path)
        running = RunningPlan(llm.config, llm.plan, llm.client, llm.report_event, predict)
        work = asyncio.create_task(llm.generate(prompts, GREEDY))
        await running.look(0.0)
        assert running.plan.load is not None
        assert running.plan.load["requests"] == len(seen[0].load) >= 50
        assert [change.after for change in running.plan.changes] == ["unified*3", "2p1d"], "one look is not enough"
        await running.look(30.0)
        outputs = await asyncio.wait_for(work, DEADLINE_S)
        assert [output["token_ids"] for output in outputs] == expected
        last = running.plan.changes[-1]
        assert (last.before, last.after, last.by) == ("2p1d", "1p2d", "auto")
        assert "2p1d is predicted to serve 40.0 % within the targets, and 1p2d 90.0 %" in last.why
        assert last.predictions[0]["system"] == "1p2d"
        plan = (await http.get("/v1/plan")).json()
        assert [(change["before"], change["after"], change["by"]) for change in plan["changes"]] == [
            ("a mix of roles", "unified*3", "operator"),
            ("unified*3", "2p1d", "operator"),
        ]
        assert (await llm.client.stats())["events"]["plan"] == 3
        await asyncio.to_thread(assert_no_leaks, llm)
        stats = llm.get_system_stats()
        assert stats["cpu_scheduler"]["retries"] == stats["cpu_scheduler"]["preemptions"] == 0
        found = {name: InstanceRole(each["role"]) for name, each in stats["gpu_instances"].items()}
        assert sorted(found.values()) == ["decode", "decode", "prefill"]
        # What another plan would need is opened before a change, and stays open after it.
        running.prepare()
        await llm.client.set_role("i0", found["i0"], DEADLINE_S)  # the scheduler takes messages in order
        links = llm.get_system_stats()["kv_transfer"]["links"]
        for system in ("1p2d", "2p1d"):
            to = roles_of(system, found)
            for source, target in itertools.permutations(found, 2):
                if (to[source], to[target]) == ("prefill", "decode"):
                    assert f"{source}->{target}" in links
