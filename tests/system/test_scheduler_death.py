"""The scheduler is killed and stopped under load: every request goes on as if nothing had been.

``HBSERVE_SCHEDULER_KILLS`` is the number of kills in each mode, 2 by default.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import zmq

from hbserve import DisaggregatedLLM, PdDisaggConfig, SamplingParams
from hbserve.bench.target import EngineTarget
from hbserve.config import Config, InstanceRole, ServerConfig, from_dict
from hbserve.errors import EngineDeadError, RequestFailedError, SchedulerRestartingError
from hbserve.frontend.outputs import GenerationOutput
from hbserve.messages.worker import Ping
from hbserve.rpc.cluster_key import ClusterKey
from hbserve.semi_pd.process_rotation_manager import SMAllocation
from hbserve.server import create_app, serve
from tests.support.engines import assert_no_leaks, random_prompt
from tests.support.poisoned_scheduler import POISON
from tests.support.ports import free_ports
from tests.support.scheduler_parts import DEMO

NUM_KILLS = int(os.environ.get("HBSERVE_SCHEDULER_KILLS", "2"))
DEADLINE_S = 60.0 + 2.0 * NUM_KILLS
MODEL = {"path": str(DEMO), "device": "cpu", "dtype": "float32", "max_model_len": 512}
SHAPE = {"model": MODEL, "performance": {"num_blocks": 256}, "chunked_prefill": {"chunk_size": 32}}
NUM_TOKENS = 60
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + 10 * NUM_KILLS)]


def workload() -> tuple[list[list[int]], list[SamplingParams]]:
    """Requests of every kind whose state a new scheduler could get wrong."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.9, "seed": 1, "n": 3},
        {"temperature": 0.9, "seed": 2, "logprobs": 2},
        {"temperature": 0, "prompt_logprobs": 1},
        {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
        {"temperature": 0.8, "seed": 4, "min_tokens": 40, "ignore_eos": False, "stop_token_ids": list(range(256, 290))},
        {"temperature": 1.0, "seed": 5, "ignore_eos": False, "grammar": 'start: /[a-z]{3,9}/ (", " /[0-9]{2,4}/)*'},
        {"temperature": 0.8, "seed": 6, "stop": ["e", "th"], "min_tokens": 20},
    ]
    prompts = [random_prompt(30 + 25 * index, seed=index) for index in range(len(kinds))]
    return prompts, [SamplingParams(**{"max_tokens": NUM_TOKENS, "ignore_eos": True} | kind) for kind in kinds]


def assert_same(outputs: Iterable[GenerationOutput], expected: Iterable[GenerationOutput]) -> None:
    """Compare everything but the last bits of log-probabilities, and what came from the prefix cache."""

    def chosen(output: Any) -> list[float]:
        return [max(entry.values()) for entry in output["logprobs"] or []]

    for output, other in zip(outputs, expected, strict=True):
        assert output["num_prompt_tokens"] == other["num_prompt_tokens"]
        scores, other_scores = output["prompt_logprobs"], other["prompt_logprobs"]
        assert (scores is None) == (other_scores is None)
        if scores is not None and other_scores is not None:
            assert len(scores) == len(other_scores) == output["num_prompt_tokens"]
            values = [[max(entry.values()) for entry in entries if entry] for entries in (scores, other_scores)]
            assert values[0] == pytest.approx(values[1], abs=1e-4)
        for sample, other_sample in zip(output["samples"], other["samples"], strict=True):
            for key in ("token_ids", "text", "finish_reason", "stop_reason"):
                assert sample[key] == other_sample[key]
            assert chosen(sample) == pytest.approx(chosen(other_sample), abs=1e-4)


class System:
    """A running system whose scheduler dies."""

    def __init__(self, llm: DisaggregatedLLM) -> None:
        self.llm = llm
        self.chance = random.Random(3)
        self.num_deaths = 0

    @property
    def scheduler_pid(self) -> int:
        return self.llm.launcher.scheduler.pid

    async def until(self, holds: Callable[[], Any]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not holds():  # noqa: ASYNC110 - the states of other processes have no event
                await asyncio.sleep(0.005)

    async def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End the scheduler, and return when the client has noticed it."""
        os.kill(self.scheduler_pid, number)
        self.num_deaths += 1
        await self.until(lambda: self.llm.client.restarting is not None)

    async def until_back(self) -> None:
        await self.until(lambda: self.llm.client.restarting is None)

    async def generate(self) -> list[GenerationOutput]:
        return await asyncio.wait_for(self.llm.generate(*workload()), DEADLINE_S)

    async def kill_under_load(self, expected: list[GenerationOutput]) -> None:
        """Kill the scheduler `NUM_KILLS` times, at moments that differ, with a load that is always there."""
        work: set[asyncio.Task[list[GenerationOutput]]] = set()
        for _ in range(NUM_KILLS):
            work |= {task for task in (asyncio.create_task(self.generate()),) if len(work) < 2}
            await asyncio.sleep(self.chance.uniform(0.0, 0.5))
            await self.kill()
            await self.until_back()
            for task in [task for task in work if task.done()]:
                assert_same(task.result(), expected)
                work.discard(task)
        for outputs in await asyncio.gather(*work):
            assert_same(outputs, expected)

    async def events(self) -> dict[str, int]:
        stats = await self.llm.client.stats()
        return {kind: count for kind, count in stats["events"].items() if count}

    async def assert_whole(self) -> None:
        """Nothing is left behind, and every death is counted."""
        await asyncio.to_thread(assert_no_leaks, self.llm)
        events = await self.events()
        assert (events["scheduler_lost"], events["scheduler_restarted"]) == (self.num_deaths, self.num_deaths)
        assert self.llm.client.num_open == 0


@asynccontextmanager
async def running(config: Config | PdDisaggConfig) -> AsyncIterator[System]:
    async with DisaggregatedLLM(config) as llm:
        yield System(llm)


@asynccontextmanager
async def served(llm: DisaggregatedLLM) -> AsyncIterator[httpx.AsyncClient]:
    """Serve a system over HTTP; yield a client."""
    stop = asyncio.Event()
    listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    app = create_app(llm.engine, llm.client, "demo")
    serving = asyncio.create_task(serve(app, ServerConfig(port=0), stop, listening.set_result, 1))
    try:
        url = f"http://127.0.0.1:{await asyncio.wait_for(listening, DEADLINE_S)}"
        async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as http:
            yield http
    finally:
        stop.set()
        await asyncio.wait_for(serving, DEADLINE_S)


async def read_stream(http: httpx.AsyncClient, seed: int, started: list[int]) -> tuple[str, str, dict[str, int]]:
    """Read an answer as it comes; return its text, its finish reason and its usage."""
    messages = [{"role": "user", "content": f"Remember: dog parrot, eagle maple. Count from 3 to {60 + seed}."}]
    body = {"messages": messages, "seed": seed, "temperature": 0.7, "max_tokens": 200}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    text = finish_reason = ""
    usage: dict[str, int] = {}
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            for choice in event["choices"]:
                text += choice["delta"].get("content") or ""
                finish_reason = choice["finish_reason"] or finish_reason
                started.append(seed)
            usage = event.get("usage") or usage
    return text, finish_reason, {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}


async def test_streams_go_on_when_the_scheduler_is_killed_or_stopped_and_a_request_that_kills_it_is_given_up() -> None:
    config = PdDisaggConfig.from_arguments(
        str(DEMO),
        mode="unified",
        device="cpu",
        dtype="float32",
        num_blocks=256,
        max_model_len=512,
        chunk_size=32,
        heartbeat_timeout_s=3.0,
        max_restarts=100 + NUM_KILLS,
        scheduler="tests.support.poisoned_scheduler:PoisonedScheduler",
        log_level="ERROR",
    )
    async with running(config) as system, served(system.llm) as http:
        llm, client = system.llm, system.llm.client

        async def streams(started: list[int]) -> list[tuple[str, str, dict[str, int]]]:
            return await asyncio.gather(*(read_stream(http, seed, started) for seed in range(4)))

        expected, expected_streams = await system.generate(), await streams([])
        await system.kill_under_load(expected)

        # HTTP streams, and what a client sees while there is no scheduler.
        started: list[int] = []
        work = asyncio.create_task(streams(started))
        await system.until(lambda: len(set(started)) == 4)
        aborted = asyncio.create_task(llm.engine.generate([1, 2, 3], SamplingParams(max_tokens=400), "aborted"))
        await system.until(lambda: client.num_open == 5)
        await system.kill()
        health = await http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "restarting")
        assert (await http.get("/ready")).status_code == 503
        with pytest.raises(SchedulerRestartingError):
            await client.stats(timeout_s=0.01)
        llm.abort("aborted")
        assert (await asyncio.wait_for(aborted, DEADLINE_S))["finish_reason"] == "abort"
        late = asyncio.create_task(system.generate())
        metrics = await http.get("/metrics")
        assert f'hbserve_events_total{{kind="scheduler_restarted"}} {float(system.num_deaths)}' in metrics.text
        assert (await http.get("/health")).status_code == 200
        assert await work == expected_streams
        assert_same(await late, expected)

        # A stopped scheduler keeps its connections.
        started.clear()
        work = asyncio.create_task(streams(started))
        await system.until(lambda: len(set(started)) == 4)
        await system.kill(signal.SIGSTOP)
        assert "no sign of life" in (client.restarting or "")
        assert await work == expected_streams

        # The planted request ends the scheduler three times, and then is not sent again.
        started.clear()
        work = asyncio.create_task(streams(started))
        await system.until(lambda: len(set(started)) == 4)
        with pytest.raises(RequestFailedError, match="failed 3 times in a row with this request"):
            await asyncio.wait_for(llm.engine.generate([*POISON, 1], SamplingParams(max_tokens=4)), DEADLINE_S)
        system.num_deaths += 3
        assert await work == expected_streams
        await system.assert_whole()
        assert (await system.events())["given_up"] == 1

        # Benchmarks let the same instances serve under a scheduler of another configuration.
        target, frozen = EngineTarget(llm, SamplingParams()), config.freeze()
        other = msgspec.structs.replace(frozen.scheduler, policy="fcfs")
        await target.restart_scheduler(msgspec.structs.replace(frozen, scheduler=other))
        described = (await target.describe())["config"]
        assert (described["scheduler"]["policy"], described["model"]["path"]) == ("fcfs", DEMO.name)
        assert_same(await system.generate(), expected)


async def test_workers_that_share_memory_finish_the_steps_of_the_dead_scheduler_first() -> None:
    config = PdDisaggConfig.from_arguments(
        str(DEMO),
        mode="semi_pd",
        device="cpu",
        dtype="float32",
        num_blocks=256,
        max_model_len=512,
        chunk_size=32,
        max_restarts=NUM_KILLS + 5,
        log_level="ERROR",
    )
    async with running(config) as system:
        expected = await system.generate()
        await system.kill_under_load(expected)

        # While the split changes, old and new workers are on the same memory.
        [manager] = system.llm.supervisors.values()
        work = asyncio.create_task(system.generate())
        manager.request_sm_reallocation(SMAllocation(40, 60))
        await system.until(lambda: any(worker["state"] != "active" for worker in manager.get_status()["workers"]))
        await system.kill()
        assert_same(await work, expected)
        assert await asyncio.to_thread(manager.wait_until_settled, DEADLINE_S)
        assert manager.current_sm_allocation == SMAllocation(40, 60)
        await system.assert_whole()


async def test_instances_on_tcp_meet_the_new_scheduler_and_obey_no_other(tmp_path: Path) -> None:
    key_file = tmp_path / "cluster.key"
    key = ClusterKey.generate()
    key.save(key_file)
    port, joined_port, *ports = free_ports(4)
    instances = [
        {"instance_id": f"{role}-0", "instance_type": role, "num_threads": 1, "port": instance_port}
        for role, instance_port in zip(("prefill", "decode"), ports, strict=True)
    ]
    rpc = {"port": port, "key_file": str(key_file), "max_restarts": NUM_KILLS + 5}
    document = SHAPE | {"mode": "disaggregated", "kv_transfer": {"backend": "shm"}, "gpu_instances": instances}
    config = from_dict(document | {"rpc": rpc, "logging": {"level": "ERROR"}})
    async with running(config) as system:
        client = system.llm.client
        command = [sys.executable, "-m", "hbserve.join", f"tcp://127.0.0.1:{port}", "--role", "decode"]
        command += ["--instance-id", "decode-1", "--num-threads", "1", "--key-file", str(key_file)]
        command += ["--port", str(joined_port)]
        joined = await asyncio.create_subprocess_exec(*command)
        try:

            async def until_whole(role: str) -> None:
                async with asyncio.timeout(DEADLINE_S):
                    while True:
                        found = (await client.stats())["gpu_instances"]
                        if found.get("decode-1", {}).get("role") == role and all(
                            instance["status"] == "ready" for instance in found.values()
                        ):
                            return
                        await asyncio.sleep(0.05)

            await until_whole("decode")
            expected = await system.generate()
            await system.kill_under_load(expected)
            await until_whole("decode")

            # An instance keeps the role that an operator has given it; a change under way has an unknown end.
            await client.set_role("decode-1", InstanceRole.PREFILL)
            busy = asyncio.create_task(system.generate())
            await system.until(lambda: client.num_open > 5)
            change = asyncio.create_task(client.set_role("prefill-0", InstanceRole.DECODE))
            await asyncio.sleep(0)
            await system.kill()
            with pytest.raises(SchedulerRestartingError, match="unknown what has changed"):
                await change
            assert_same(await busy, expected)
            await until_whole("prefill")

            # One that an operator has removed is not waited for.
            await client.remove_instance("prefill-0")
            await system.kill()
            await until_whole("prefill")
            assert set((await client.stats())["gpu_instances"]) == {"decode-0", "decode-1"}
            assert_same(await system.generate(), expected)
            await system.assert_whole()

            # Another host's scheduler takes an instance: this one must not go on.
            with zmq.Context() as context, context.socket(zmq.DEALER) as other:
                other.linger = 0
                key.for_connecting(other, f"tcp://127.0.0.1:{joined_port}")
                other.connect(f"tcp://127.0.0.1:{joined_port}")
                other.send(msgspec.msgpack.encode(Ping(scheduler_epoch=2**62, known_epoch=0)))
                await system.until(lambda: client.dead is not None)
            assert "obey another scheduler" in str(client.dead)
            with pytest.raises(EngineDeadError):
                await system.llm.generate([1], SamplingParams(max_tokens=1))
        finally:
            joined.kill()
            await joined.wait()
