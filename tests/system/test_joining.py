"""Instances that join a running system, and leave it while it serves."""

from __future__ import annotations

import asyncio
import copy
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import torch

from hbserve import DisaggregatedLLM, SamplingParams
from hbserve.config import from_dict
from hbserve.rpc.cluster_key import ClusterKey
from hbserve.server.app import create_app
from tests.support import fork_server
from tests.support.engines import assert_no_leaks, greedy_reference, random_prompt
from tests.support.model_zoo import save_model
from tests.support.ports import free_ports

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
DEADLINE_S = 60.0


class Joiner:
    """``python -m hbserve.join`` as an operator starts it."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments

    async def __aenter__(self) -> asyncio.subprocess.Process:
        command = fork_server.program("-m", "hbserve.join", *self._arguments)
        environment = os.environ | fork_server.environment()
        self._process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, env=environment)
        return self._process

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()


async def until(llm: DisaggregatedLLM, names: set[str]) -> dict[str, Any]:
    """Wait until exactly these instances are there and ready, with every link between them open."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            stats = await llm.client.stats()
            instances, links = stats["gpu_instances"], stats["kv_transfer"]["links"]
            if set(instances) == names and all(each["status"] == "ready" for each in instances.values()):
                roles = [each["role"] for each in instances.values()]
                num_links = roles.count("prefill") * roles.count("decode")
                if len(links) == num_links and all(link["open"] for link in links.values()):
                    return stats
            await asyncio.sleep(0.05)


async def test_instances_join_and_leave_while_the_system_serves(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = save_model(folder, "qwen3")
    other = tmp_path / "finetuned"
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight.add_(0.01)
    tuned.save_pretrained(other)
    prompts = [random_prompt(40 + 19 * index, seed=index) for index in range(8)]
    expected = [greedy_reference(model, prompt, 40) for prompt in prompts]
    key_file = tmp_path / "cluster.key"
    ClusterKey.generate().save(key_file)
    port = free_ports(1)[0]
    config = from_dict(
        {
            "mode": "disaggregated",
            "model": {"path": str(folder), "device": "cpu", "dtype": "float32", "max_model_len": 256},
            "performance": {"num_blocks": 256},
            "chunked_prefill": {"chunk_size": 32},
            "rpc": {"port": port, "heartbeat_timeout_s": 3.0, "key_file": str(key_file)},
            "logging": {"level": "INFO"},
            "gpu_instances": [
                {"instance_id": f"{role}-0", "instance_type": role, "num_threads": 1} for role in ("prefill", "decode")
            ],
        }
    )
    scheduler = f"tcp://127.0.0.1:{port}"

    def joiner(role: str, name: str, *more: str) -> Joiner:
        key = () if "--key-file" in more else ("--key-file", str(key_file))
        return Joiner(scheduler, "--role", role, "--instance-id", name, "--num-threads", "1", *key, *more)

    async def refused(role: str, name: str, *more: str) -> str:
        async with joiner(role, name, *more) as process:
            _, said = await asyncio.wait_for(process.communicate(), DEADLINE_S)
            assert process.returncode == 1
            return said.decode()

    async with DisaggregatedLLM(config) as llm:

        async def answer() -> None:
            outputs = await asyncio.wait_for(llm.generate(prompts, GREEDY), DEADLINE_S)
            assert [output["token_ids"] for output in outputs] == expected

        app = create_app(llm.engine, llm.client, "tiny")
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=DEADLINE_S)
        everybody = {"prefill-0", "prefill-1", "decode-0", "decode-1"}
        async with joiner("decode", "decode-1") as decode, joiner("prefill", "prefill-1"):
            said = await asyncio.gather(
                refused("unified", "decode-2"),
                refused("decode", "decode-0"),
                refused("decode", "decode-2", "--model", str(other)),
            )
            for text, part in zip(said, ("has no unified instances", "there is decode-0", "model"), strict=True):
                assert part in text
            assert (await llm.client.stats())["events"]["join_refused"] == 3
            await until(llm, everybody)
            await answer()
            assert all(each["steps"] > 0 for each in (await llm.client.stats())["gpu_instances"].values())

            # One is lost, and asks to be taken back when it wakes up.
            work = asyncio.create_task(answer())
            while not (await llm.client.stats())["gpu_instances"]["decode-1"]["active_requests"]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            decode.send_signal(signal.SIGSTOP)
            await work
            await until(llm, everybody - {"decode-1"})
            decode.send_signal(signal.SIGCONT)
            stats = await until(llm, everybody)

            # One is told to end, and the scheduler is told to do without another; one of them the launcher's own.
            retries = stats["cpu_scheduler"]["retries"]
            work = asyncio.create_task(answer())
            await asyncio.sleep(0.05)  # somewhere in the middle of it
            decode.send_signal(signal.SIGTERM)
            assert (await http.delete("/v1/instances/prefill-0")).status_code == 200
            assert await asyncio.wait_for(decode.wait(), DEADLINE_S) == 0
            await work
            stats = await until(llm, {"prefill-1", "decode-0"})
            assert stats["cpu_scheduler"]["retries"] == retries
            refusal = await http.delete("/v1/instances/decode-0")
            assert refusal.status_code == 400
            assert "the only decode instance" in refusal.text
            await answer()
            await asyncio.to_thread(assert_no_leaks, llm)
